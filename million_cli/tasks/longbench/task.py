"""LongBench by its published protocol: greedy answers, scored per dataset on 0 to 100.

Prompts go through the cache under test with quantized prefill unless `prefill` says otherwise: the first
token of an answer, often all that matters, is then computed from codes too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.journal import Journal, Journals
from million_cli.progress import progress
from million_cli.tasks.answers import greedy, stop_tokens
from million_cli.tasks.base import (
    CacheFactory,
    Prefill,
    Scalar,
    TaskResult,
    check_context,
    check_extra,
    check_task,
    dense_cache,
    finite,
    longest_context,
    memory_of_prompt,
)
from million_cli.tasks.longbench import data
from million_cli.tasks.longbench.data import Sample, Samples
from million_cli.tasks.longbench.datasets import DATASETS, Dataset
from million_cli.tasks.longbench.prompting import encode, fit, no_room

logger = logging.getLogger("million")

LIBRARIES = ("rouge", "jieba", "rapidfuzz")


@dataclass
class Config:
    """The samples and their settings.

    Attributes:
        path: data.zip, or a folder of <dataset>.jsonl; null downloads the hub's.
        tasks: some of the 21 datasets; null is all.
        samples: number of samples of each dataset, from the first; null is all.
        max_length: tokens a prompt is cut to, in its middle (the published runs used 3500 for a context of
            4096 and 31500 for 32768); null is the model's context less what is generated.
        new_tokens: the most tokens to generate, where the published number is larger; null keeps that.
        batch: prompts at once, padded on the left.  The published runs ask one at a time; with codes, padding
            is coded like text, so larger batches are not exactly the same.
        prefill: `quantized` or `exact`.
        chat: use the tokenizer's chat template, if it has one, for the datasets published with it.
    """

    name: str = "longbench"
    path: str | None = None
    tasks: list[str] | None = None
    samples: int | None = None
    max_length: int | None = None
    new_tokens: int | None = None
    batch: int = 1
    prefill: str = "quantized"
    chat: bool = True

    def __post_init__(self) -> None:
        check_task(self, samples=1, max_length=2, new_tokens=1, batch=1)
        for task in self.selected:
            if task not in DATASETS:
                raise UserError(f"task.tasks={task}: accepted are {', '.join(DATASETS)}")
        if not self.selected:
            raise UserError(f"task.tasks=[]: accepted are some of {', '.join(DATASETS)}")

    @property
    def selected(self) -> list[str]:
        """Datasets, each once."""
        return list(DATASETS) if self.tasks is None else list(dict.fromkeys(self.tasks))


@dataclass(frozen=True)
class Question:
    """A sample's prompt in token ids, the most tokens of its answer, and the tokens that end it.

    `cut` counts the tokens that were cut out of the middle of the prompt.  `key` names the sample and
    everything that its answer depends on, beside model, cache and code.
    """

    sample: Sample
    ids: list[int]
    new_tokens: int
    stops: list[int]
    min_new_tokens: int
    key: str
    cut: int = 0


def load(config: Config) -> Samples:
    """The samples that `config` selects; see `data.read`.

    Raises:
        UserError: a library of the extra `longbench` is missing, or see `data.read`.
    """
    check_extra("LongBench", "longbench", LIBRARIES)
    return data.read(config.path, config.selected, config.samples)


@finite("longbench")
@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    caches: CacheFactory,
    samples: Samples,
    config: Config,
    seed: int,
    journals: Journals | None = None,
) -> TaskResult:
    """Answer and score every sample with the cache and with the dense cache.

    Args:
        samples: from `load`.
        journals: hold the answers made so far; new ones are added.  None keeps none.

    Returns:
        longbench_<dataset> (mean score of its samples, 0 to 100), longbench_average (mean over datasets),
        longbench_overall (mean over categories of their datasets' means, the paper's), each also with
        `_dense`; longbench_n (samples), longbench_cut (those whose prompt was cut);
        the bytes of `memory_metrics` for the longest prompt.  The table
        `longbench` has a row a dataset, `longbench_samples` a row a sample.

    Raises:
        UserError: max_length is more than the model takes, or its context too short for the answers.
    """
    if config.max_length is not None:
        check_context("task.max_length", config.max_length, model)
    for name in samples.datasets:
        if (room := _room(model, name, config)) < 2:
            raise no_room(room)
    journals = journals or Journals()
    prefill: Prefill = "exact" if config.prefill == "exact" else "quantized"
    makers: list[tuple[Journal, Callable[[], Cache]]] = [
        (journals.cache, lambda: caches(prefill)),
        (journals.dense, lambda: dense_cache(model)),
    ]
    summary: list[dict[str, Scalar]] = []
    rows: list[dict[str, Scalar]] = []
    longest: list[int] = []
    with progress(sum(map(len, samples.datasets.values())), "LongBench", "sample") as bar:
        for name, chosen in samples.datasets.items():
            dataset = DATASETS[name]
            questions = [ask(model, tokenizer, name, sample, config) for sample in chosen]
            # Longest first: little padding in a batch, and what does not fit into memory shows at once.
            queue = sorted(questions, key=lambda question: len(question.ids), reverse=True)
            longest = max(longest, queue[0].ids, key=len)
            answers: dict[str, list[str]] = {}
            for start in range(0, len(queue), config.batch):
                part = queue[start : start + config.batch]
                ours, dense = (answer(model, tokenizer, part, *maker) for maker in makers)
                for question, *pair in zip(part, ours, dense, strict=True):
                    answers[question.key] = pair
                bar.update(len(part))
            found = [_row(name, dataset, question, *answers[question.key]) for question in questions]
            rows += found
            summary.append(_summary(name, dataset, found))
            bar.clear()
            logger.info("%s: %.2f, dense %.2f", name, summary[-1]["score"], summary[-1]["dense"])
    memory = memory_of_prompt(model, caches(prefill), longest)
    return TaskResult(
        {
            **_metrics(summary),
            "longbench_n": len(rows),
            "longbench_cut": sum(row["tokens_cut"] > 0 for row in rows),  # type: ignore[operator]
            **memory,
        },
        {"longbench": summary, "longbench_samples": rows},
    )


def ask(model: PreTrainedModel, tokenizer: Any, name: str, sample: Sample, config: Config) -> Question:
    """The question of a sample, cut to fit the model."""
    dataset = DATASETS[name]
    room = _room(model, name, config)
    new_tokens = longest_context(model) - room
    prompt = dataset.prompt.format(context=sample.context, input=sample.input)
    chat = config.chat and dataset.chat and bool(getattr(tokenizer, "chat_template", None))
    ids = fit(tokenizer, prompt, chat, room, config.max_length)
    stops = stop_tokens(model, tokenizer)
    if dataset.stop_at_newline:
        stops.append(tokenizer.encode("\n", add_special_tokens=False)[-1])
    at_least = int(dataset.stop_at_newline)
    text = json.dumps([ids, new_tokens, stops, at_least, config.prefill, config.batch])
    key = f"{name}/{sample.id}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    cut = max(0, len(encode(tokenizer, prompt, chat)) - len(ids))
    return Question(sample, ids, new_tokens, stops, at_least, key, cut)


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    journal: Journal,
    make: Callable[[], Cache],
) -> list[str]:
    """Greedy answers to questions of one dataset: the journal's, and one batch for those it lacks."""
    lacking = [question for question in questions if question.key not in journal]
    if lacking:
        texts = generate(model, tokenizer, lacking, make())
        journal.add({question.key: text for question, text in zip(lacking, texts, strict=True)})
    return [journal[question.key] for question in questions]


def generate(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question], cache: Cache
) -> list[str]:
    """The greedy continuation of each question (alike but for sample and ids) of a left-padded batch."""
    first = questions[0]
    answers = greedy(
        model,
        tokenizer,
        [question.ids for question in questions],
        cache,
        new_tokens=first.new_tokens,
        stops=first.stops,
        min_new_tokens=first.min_new_tokens,
    )
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def _room(model: PreTrainedModel, name: str, config: Config) -> int:
    """Tokens of the model's context that an answer leaves for its prompt."""
    new_tokens = DATASETS[name].new_tokens
    return longest_context(model) - min(new_tokens, config.new_tokens or new_tokens)


def _row(name: str, dataset: Dataset, question: Question, ours: str, dense: str) -> dict[str, Scalar]:
    sample = question.sample
    return {
        "task": name,
        "id": sample.id,
        "tokens": len(question.ids),
        "tokens_cut": question.cut,
        "score": 100 * dataset.score(ours, sample.answers, sample.classes),
        "dense": 100 * dataset.score(dense, sample.answers, sample.classes),
        "prediction": ours,
        "prediction_dense": dense,
    }


def _summary(name: str, dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> dict[str, Scalar]:
    return {
        "task": name,
        "category": dataset.category,
        "metric": dataset.metric.__name__,
        "samples": len(rows),
        "score": fmean(row["score"] for row in rows),
        "dense": fmean(row["dense"] for row in rows),
    }


def _metrics(summary: Sequence[Mapping[str, Any]]) -> dict[str, Scalar]:
    metrics: dict[str, Scalar] = {}
    for column, suffix in (("score", ""), ("dense", "_dense")):
        categories: dict[str, list[float]] = {}
        for row in summary:
            metrics[f"longbench_{row['task']}{suffix}"] = row[column]
            categories.setdefault(row["category"], []).append(row[column])
        metrics[f"longbench_average{suffix}"] = fmean(row[column] for row in summary)
        metrics[f"longbench_overall{suffix}"] = fmean(map(fmean, categories.values()))
    return metrics
