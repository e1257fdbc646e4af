"""RULER with the cache under test and the dense cache: the same prompts, greedy answers, scores 0 to 100.

Each question has a random stream of its own (seed, task, length, number), so questions stay the same when
others are added.  Other differences from RULER's own runner: essays begin at a random sentence, keys of one
prompt are distinct, words of the lists come from the prose, a passage never stands twice in a prompt, and the
example of cwe stands in the user's turn with the question.

Prompts go through the cache with quantized prefill unless `prefill` says otherwise.  None is ever cut:
haystacks are made as large as the length allows, the answer's tokens included, and the tables say how many
tokens that was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.journal import Journal, Journals
from million_cli.paired import bootstrap
from million_cli.progress import progress
from million_cli.tasks.answers import greedy, stop_tokens
from million_cli.tasks.base import (
    CacheFactory,
    Prefill,
    Scalar,
    TaskResult,
    check_context,
    check_task,
    dense_cache,
    finite,
    longest_context,
    memory_of_prompt,
)
from million_cli.tasks.ruler.aggregation import vocabulary
from million_cli.tasks.ruler.definitions import DEFINITIONS, Definition, Material
from million_cli.tasks.ruler.fitting import fitted
from million_cli.tasks.ruler.niah import Essay
from million_cli.tasks.ruler.prompt import Prompt, encode
from million_cli.tasks.ruler.qa import Passages, read
from million_cli.text import Text, TextConfig, load_text

logger = logging.getLogger("million")

RESUMABLE = True
SLACK = 100  # a haystack that leaves a hundredth of the length free is large enough
CHAT = ("auto", "true", "false")


@dataclass
class Config(TextConfig):
    """Prose for essays and word lists (see `TextConfig`), tasks and their settings.

    Attributes:
        tasks: some of the thirteen; null is all, qa_1 and qa_2 only with `squad` and `hotpotqa`.
        lengths: of prompt and answer together, in tokens; null is a quarter, a half and all of the model's
            context, up to 4096.
        samples: questions a task and length; RULER's own runs have 500.
        squad: SQuAD's JSON file (dev-v2.0.json is RULER's).
        hotpotqa: HotpotQA's JSON file (hotpot_dev_distractor_v1.json is RULER's).
        batch: prompts at once, padded on the left.
        prefill: `quantized` or `exact`.
        chat: `true` puts the text into the user's turn of the tokenizer's chat template and begins the
            assistant's with RULER's prefix; `auto` does so where there is a template.
    """

    name: str = "ruler"
    tasks: list[str] | None = None
    lengths: list[int] | None = None
    samples: int = 50
    squad: str | None = None
    hotpotqa: str | None = None
    batch: int = 8
    prefill: str = "quantized"
    chat: str = "auto"

    def __post_init__(self) -> None:
        check_task(self, samples=1, batch=1)
        if self.chat not in CHAT:
            raise UserError(f"task.chat={self.chat}: accepted are {', '.join(CHAT)}")
        if self.lengths == []:
            raise UserError("task.lengths=[]: accepted are some lengths in tokens")
        for task in self.tasks or []:
            if task not in DEFINITIONS:
                raise UserError(f"task.tasks={task}: accepted are {', '.join(DEFINITIONS)}")
            dataset = DEFINITIONS[task].dataset
            if dataset and not getattr(self, dataset):
                raise UserError(f"task.tasks={task}: needs the file of {dataset}; name it by task.{dataset}=")
        if not self.selected:
            raise UserError(f"task.tasks=[]: accepted are some of {', '.join(DEFINITIONS)}")

    @property
    def selected(self) -> list[str]:
        """Tasks, each once."""
        if self.tasks is not None:
            return list(dict.fromkeys(self.tasks))
        return [name for name, each in DEFINITIONS.items() if not each.dataset or getattr(self, each.dataset)]


@dataclass(frozen=True)
class Source(Text):
    """Prose, the datasets that are given as files, and the files' SHA-256."""

    passages: Mapping[str, Passages] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A prompt; `key` names all that its answer depends on, beside model, cache and code."""

    number: int
    ids: list[int]
    answers: tuple[str, ...]
    key: str


def load(config: Config) -> Source:
    """Read the text and the datasets of a configuration.

    Raises:
        UserError: as `text.load_text` and `qa.read`.
    """
    text = load_text(config)
    paths = {name: path for name in ("squad", "hotpotqa") if (path := getattr(config, name))}
    passages = {name: read(path, name) for name, path in paths.items()}
    files = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in paths.items()}
    return Source(text.content, text.source, passages, files)


@finite("ruler")
@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    caches: CacheFactory,
    source: Source,
    config: Config,
    seed: int,
    journals: Journals | None = None,
) -> TaskResult:
    """Answer and score every question with the cache and with the dense cache.

    Args:
        source: from `load`.
        journals: hold the answers made so far; new ones are added.  None keeps none.

    Returns:
        ruler_average (mean over tasks and lengths, 0 to 100), ruler_<length> (mean over tasks), each also
        with `_dense`; ruler_difference (average less dense) with its 95 % interval `_low`, `_high`; ruler_n
        (questions), ruler_chat (whether the chat template was used); the bytes of `memory_metrics` for the
        longest prompt.  The table `ruler` has a row a task and length, `ruler_samples` a row a question.

    Raises:
        UserError: a length that the model does not take, too short for a task or too long for its material;
            more samples than a dataset has; a chat template that is not there.
    """
    lengths = sorted(set(config.lengths or default_lengths(model)))
    for length in lengths:
        check_context("task.lengths", length, model)
    chat = uses_chat(tokenizer, config.chat)
    material = Material(Essay(source.content), vocabulary(source.content), source.passages)
    journals = journals or Journals()
    prefill: Prefill = "exact" if config.prefill == "exact" else "quantized"
    makers: list[tuple[Journal, Callable[[], Cache]]] = [
        (journals.cache, lambda: caches(prefill)),
        (journals.dense, lambda: dense_cache(model)),
    ]
    stops = stop_tokens(model, tokenizer)
    cells: list[dict[str, Scalar]] = []
    rows: list[dict[str, Scalar]] = []
    longest: list[int] = []
    with progress(len(lengths) * len(config.selected) * config.samples, "RULER", "question") as bar:
        for length in lengths:
            for name in config.selected:
                definition = DEFINITIONS[name]
                questions = ask(tokenizer, material, name, length, config, seed, chat)
                longest = max(longest, *(question.ids for question in questions), key=len)
                found = []
                for start in range(0, len(questions), config.batch):
                    part = questions[start : start + config.batch]
                    ours, dense = (
                        answer(model, tokenizer, part, definition.new_tokens, stops, *maker)
                        for maker in makers
                    )
                    found += [
                        _row(name, length, definition, *each) for each in zip(part, ours, dense, strict=True)
                    ]
                    bar.update(len(part))
                rows += found
                cells.append(_cell(name, length, found, seed))
                bar.clear()
                logger.info("%s, %d: %.1f, dense %.1f", name, length, cells[-1]["score"], cells[-1]["dense"])
    memory = memory_of_prompt(model, caches(prefill), longest)
    return TaskResult(
        {**_metrics(cells, rows, seed), "ruler_chat": chat, **memory},
        {"ruler": cells, "ruler_samples": rows},
    )


def default_lengths(model: PreTrainedModel) -> list[int]:
    """A quarter, a half and all of the longest text: the model's context, at most 4096 tokens."""
    longest = min(4096, longest_context(model))
    return [longest // 4, longest // 2, longest]


def uses_chat(tokenizer: Any, chat: str) -> bool:
    """Whether prompts go through the chat template.

    Raises:
        UserError: `chat` is true and the tokenizer has no template.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat == "true" and not has:
        raise UserError("task.chat=true: the tokenizer has no chat template; accepted are auto, false")
    return has and chat != "false"


def ask(
    tokenizer: Any, material: Material, name: str, length: int, config: Config, seed: int, chat: bool
) -> list[Question]:
    """The questions of a task and length, each at most `length` tokens long with its answer.

    The haystack is the largest that fits, or one that leaves at most 1 % of the length free.

    Raises:
        UserError: the length does not fit the task or its material.
    """
    definition = DEFINITIONS[name]
    writer = definition.make(
        material,
        length,
        lambda said: len(tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]),
    )
    room = length - definition.new_tokens
    if definition.dataset and config.samples > len(material.passages[definition.dataset].items):
        few = len(material.passages[definition.dataset].items)
        raise UserError(f"task.samples={config.samples}: {definition.dataset} has {few} questions")

    questions: list[Question] = []
    size: int | None = None
    for number in range(config.samples):
        made: dict[int, tuple[Prompt, list[int]]] = {}

        def tokens(size: int, number: int = number, made: dict[int, Any] = made) -> int:
            if size not in made:
                rng = random.Random(f"{seed}/{name}/{length}/{number}")
                prompt = writer(rng, size, number)
                made[size] = prompt, encode(tokenizer, prompt, chat)
            return len(made[size][1])

        size = fitted(tokens, room, writer.least, writer.most, size, room // SLACK)
        if size is None:
            least = tokens(writer.least) + definition.new_tokens
            raise UserError(
                f"task.lengths={length}: question {number} of {name} takes {least} tokens at least"
            )
        if size == writer.most and not definition.dataset:
            raise UserError(
                f"task.lengths={length}: the text has words for {tokens(size)} tokens of {name}; "
                "a longer one (task.path=) has more"
            )
        prompt, ids = made[size]
        asked = json.dumps([ids, definition.new_tokens, config.prefill, config.batch])
        key = hashlib.sha256(asked.encode()).hexdigest()[:24]
        questions.append(Question(number, ids, prompt.answers, key))
    return questions


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    new_tokens: int,
    stops: Sequence[int],
    journal: Journal,
    make: Callable[[], Cache],
) -> list[str]:
    """Greedy answers to questions: the journal's, and one batch for those it lacks."""
    lacking = [question for question in questions if question.key not in journal]
    if lacking:
        prompts = [question.ids for question in lacking]
        found = greedy(model, tokenizer, prompts, make(), new_tokens=new_tokens, stops=stops)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        journal.add({question.key: said for question, said in zip(lacking, texts, strict=True)})
    return [journal[question.key] for question in questions]


def _row(
    name: str, length: int, definition: Definition, question: Question, ours: str, dense: str
) -> dict[str, Scalar]:
    return {
        "task": name,
        "length": length,
        "id": question.number,
        "tokens": len(question.ids),
        "score": 100 * definition.score(ours, question.answers),
        "dense": 100 * definition.score(dense, question.answers),
        "answers": json.dumps(question.answers, ensure_ascii=False),
        "prediction": ours,
        "prediction_dense": dense,
    }


def _cell(name: str, length: int, rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Scalar]:
    differences = [row["score"] - row["dense"] for row in rows]
    low, high = bootstrap([differences], seed)
    return {
        "task": name,
        "length": length,
        "score": fmean(row["score"] for row in rows),
        "dense": fmean(row["dense"] for row in rows),
        "difference": fmean(differences),
        "difference_low": low,
        "difference_high": high,
        "samples": len(rows),
        "tokens": fmean(row["tokens"] for row in rows),
    }


def _metrics(
    cells: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Scalar]:
    metrics: dict[str, Scalar] = {}
    for column, suffix in (("score", ""), ("dense", "_dense")):
        metrics[f"ruler_average{suffix}"] = fmean(cell[column] for cell in cells)
        for length in dict.fromkeys(cell["length"] for cell in cells):
            metrics[f"ruler_{length}{suffix}"] = fmean(
                cell[column] for cell in cells if cell["length"] == length
            )
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["length"]), []).append(row["score"] - row["dense"])
    low, high = bootstrap(list(groups.values()), seed)
    metrics["ruler_difference"] = fmean(cell["difference"] for cell in cells)
    return {**metrics, "ruler_difference_low": low, "ruler_difference_high": high, "ruler_n": len(rows)}
