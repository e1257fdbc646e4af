"""Recall: a fact stated somewhere in a long text, asked for at its end, by length and depth.

Prompts are answered in batches, greedily, through `model.generate`.  The prompt itself goes through the cache
with quantized prefill: the question sees the text as codes, as a question after a text that was read before.
(With exact prefill the first word of the answer, which is all that is judged, would depend on no code.)

A difference of one in a hundred shows only over many questions: cells and totals carry Wilson's interval, and
`recall_lost` counts the questions that only the dense cache answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.intervals import wilson
from million_cli.progress import progress
from million_cli.tasks.answers import greedy, stop_tokens
from million_cli.tasks.base import (
    CacheFactory,
    Scalar,
    TaskResult,
    check_context,
    check_task,
    dense_cache,
    finite,
    longest_context,
    memory_metrics,
)
from million_cli.tasks.recall_text import Filler, RecallPrompt, is_correct, recall_grid
from million_cli.text import Text, TextConfig


@dataclass
class Config(TextConfig):
    """Filler text (see `TextConfig`) and the grid of prompts.

    Attributes:
        lengths: of prompts, in tokens; null is a quarter, a half and all of the model's context, up to 1024.
        depths: positions of the asked fact, 0 (start) to 1 (end).
        samples: prompts a cell; all cells together make the total, which the default makes 300.
        facts: facts a prompt; more than one is multi-key recall.
        batch: prompts at once.
        new_tokens: generated for the answer; its first word is judged.
        prefill: `quantized` or `exact`.
    """

    name: str = "passkey"
    lengths: list[int] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 20
    facts: int = 1
    batch: int = 8
    new_tokens: int = 4
    prefill: str = "quantized"

    def __post_init__(self) -> None:
        check_task(self, samples=1, batch=1, new_tokens=1)
        if not self.depths or self.lengths == []:
            raise UserError("task.lengths and task.depths must not be empty")


@dataclass(frozen=True)
class Question:
    length: int
    depth: float
    item: RecallPrompt


@finite("recall")
@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokenizer: Any, caches: CacheFactory, text: Text, config: Config, seed: int
) -> TaskResult:
    """Recall with the cache and with the dense cache, on the same prompts.

    Returns:
        recall and recall_dense (shares of all prompts), recall_low and recall_high (95 % interval of recall),
        recall_lost and recall_gained (prompts that only the dense cache, or only the cache, answers),
        recall_n, the bytes of `memory_metrics` after the last batch; the table `passkey` has a row a cell.

    Raises:
        UserError: a length that the model does not take, or too short for its facts.
    """
    lengths = config.lengths or default_lengths(model, config.new_tokens)
    for length in lengths:
        check_context("task.lengths+new_tokens", length + config.new_tokens, model)
    filler = Filler(text.content, lambda s: len(tokenizer.encode(s, add_special_tokens=False)))
    grid = recall_grid(filler, lengths, config.depths, config.samples, facts=config.facts, seed=seed)
    questions = [Question(*cell) for cell in grid]
    answers: list[tuple[bool, bool]] = []
    memory: dict[str, Scalar] = {}
    with progress(len(questions), f"recall in {text.source}", "prompt") as bar:
        for start in range(0, len(questions), config.batch):
            part = [question.item for question in questions[start : start + config.batch]]
            dense, cache = dense_cache(model), caches(config.prefill)  # type: ignore[arg-type]
            prompts = [item.prompt for item in part]
            theirs = completions(model, tokenizer, prompts, dense, config.new_tokens)
            ours = completions(model, tokenizer, prompts, cache, config.new_tokens)
            answers += [
                (is_correct(a, item), is_correct(b, item))
                for a, b, item in zip(ours, theirs, part, strict=True)
            ]
            memory = memory_metrics(cache, dense)
            bar.update(len(part))
    cells = _cells(questions, answers, config.facts)
    metrics = {f"recall{name}": value for name, value in _summary(answers).items()}
    metrics["recall_lost"] = sum(dense and not ours for ours, dense in answers)
    metrics["recall_gained"] = sum(ours and not dense for ours, dense in answers)
    return TaskResult({**metrics, **memory}, {"passkey": cells})


def default_lengths(model: PreTrainedModel, new_tokens: int) -> list[int]:
    """A quarter, a half and all of the longest prompt: the model's context, at most 1024 tokens."""
    longest = min(1024, longest_context(model) - new_tokens)
    return [longest // 4, longest // 2, longest]


def completions(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], cache: Cache, new_tokens: int
) -> list[str]:
    """The greedy continuation of each prompt of one left-padded batch, decoded with `cache`."""
    answers = greedy(
        model,
        tokenizer,
        tokenizer(list(prompts))["input_ids"],
        cache,
        new_tokens=new_tokens,
        stops=stop_tokens(model, tokenizer),
    )
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def _cells(
    questions: Sequence[Question], answers: Sequence[tuple[bool, bool]], facts: int
) -> list[dict[str, Scalar]]:
    """A row a cell: length and depth, facts a prompt, shares right and their interval, questions."""
    cells: dict[tuple[int, float], list[tuple[bool, bool]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        cells.setdefault((question.length, question.depth), []).append(answer)
    return [
        {
            "length": length,
            "depth": depth,
            "facts": facts,
            **{f"recall{name}": value for name, value in _summary(chosen).items()},
        }
        for (length, depth), chosen in cells.items()
    ]


def _summary(answers: Sequence[tuple[bool, bool]]) -> dict[str, Scalar]:
    """Shares of right answers with both caches, the interval of the cache's, and counts."""
    n = len(answers)
    right, right_dense = (sum(answer[i] for answer in answers) for i in range(2))
    low, high = wilson(right, n)
    return {"": right / n, "_low": low, "_high": high, "_dense": right_dense / n, "_n": n}
