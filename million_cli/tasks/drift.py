"""Drift over long answers: how a cache changes the hundreds or thousands of tokens that a model writes.

Prompts are cut from a text and answered greedily with the dense cache and with the cache under test.

    forced   the cache reads prompt and dense answer: KL and agreement by position in the answer.  One pass
             with quantized prefill shows each token what decoding token by token would have shown it.
    free     each cache writes its own answer: the first token that differs, length, repetition

All generation settings are stated (see `tasks.answers`): greedy, no penalties, up to `new_tokens` or a stop.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.journal import Journal, Journals
from million_cli.progress import progress
from million_cli.tasks.answers import greedy, stop_tokens
from million_cli.tasks.base import (
    CacheFactory,
    Scalar,
    TaskResult,
    check_context,
    check_finite,
    check_task,
    dense_cache,
    finite,
    memory_of_prompt,
)
from million_cli.tasks.perplexity import Head, compare_tokens, find_head, read_states
from million_cli.text import Text, TextConfig

RESUMABLE = True


@dataclass
class Config(TextConfig):
    """The text (see `TextConfig`) and the settings of its continuations.

    Attributes:
        prompts: number of prompts, cut from the text at even distances.
        prompt_tokens: tokens of a prompt.
        new_tokens: an answer has at most so many tokens; it ends sooner at a token that ends a text.
        batch: prompts at once; all have the same length, so batches change nothing.
        buckets: rows of the table by position, each an equal share of `new_tokens`.
        ngram: length of the n-grams whose repetition within an answer is counted.
    """

    name: str = "drift"
    prompts: int = 32
    prompt_tokens: int = 256
    new_tokens: int = 512
    batch: int = 8
    buckets: int = 16
    ngram: int = 8

    def __post_init__(self) -> None:
        check_task(self, prompts=1, prompt_tokens=1, new_tokens=1, batch=1, buckets=1, ngram=1)


@dataclass(frozen=True)
class Forced:
    """A dense answer as both caches predict it, by token: KL and log-likelihoods in nats, agreement."""

    kl: list[float]
    nll: list[float]
    nll_dense: list[float]
    agree: list[bool]


@dataclass(frozen=True)
class Answers:
    """The results of one prompt: both answers in tokens, and the predictions of the dense one."""

    dense: list[int]
    free: list[int]
    forced: Forced

    @property
    def first_difference(self) -> int | None:
        """Place of the first token that differs, counted from 0; None if the answers are the same."""
        for at, (ours, dense) in enumerate(zip(self.free, self.dense, strict=False)):
            if ours != dense:
                return at
        return None if len(self.free) == len(self.dense) else min(len(self.free), len(self.dense))


@finite("drift")
@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    caches: CacheFactory,
    text: Text,
    config: Config,
    seed: int,
    journals: Journals | None = None,
) -> TaskResult:
    """Answer every prompt with both caches, and read the dense answers with the cache under test.

    Args:
        journals: hold the answers made so far; new ones are added.  None keeps none.

    Returns:
        Forced: drift_kl_e3 (mean over all tokens x 1000, nats) with its standard error over prompts,
        drift_top1_agreement, drift_perplexity(_dense), drift_kl_e3_first_quarter and _last_quarter (of
        `new_tokens`; None where no answer is that long).  Free: drift_same (share of equal answers),
        drift_first_difference (median over prompts; an equal answer counts with its length), and each also
        with `_dense`: drift_length (mean tokens), drift_repetition (share of n-grams that the answer had
        before).  drift_n, drift_stops, the bytes of `memory_metrics` for the longest text.  The table `drift`
        has a row a bucket of positions, `drift_answers` a row a prompt.

    Raises:
        UserError: prompt and answer are more than the model takes, or the text is shorter than the prompts.
    """
    check_context("task.prompt_tokens+new_tokens", config.prompt_tokens + config.new_tokens, model)
    prompts = cut_prompts(tokenizer(text.content, verbose=False)["input_ids"], text.source, config)
    stops, journals, head = stop_tokens(model, tokenizer), journals or Journals(), find_head(model)
    keys = [_key(ids, stops, config) for ids in prompts]
    made: list[Answers] = []

    def answer(
        journal: Journal,
        batch: Mapping[str, list[int]],
        make: Callable[[], Cache],
    ) -> list[list[int]]:
        lacking = {key: ids for key, ids in batch.items() if f"answer/{key}" not in journal}
        if lacking:
            found = greedy(
                model, tokenizer, list(lacking.values()), make(), new_tokens=config.new_tokens, stops=stops
            )
            journal.add({f"answer/{key}": ids for key, ids in zip(lacking, found, strict=True)})
        return [journal[f"answer/{key}"] for key in batch]

    with progress(len(prompts), f"drift on {text.source}", "answer") as bar:
        for start in range(0, len(prompts), config.batch):
            batch = dict(zip(keys[start : start + config.batch], prompts[start:], strict=False))
            dense = answer(journals.dense, batch, lambda: dense_cache(model))
            free = answer(journals.cache, batch, lambda: caches("quantized"))
            lacking = [i for i, key in enumerate(batch) if f"forced/{key}" not in journals.cache]
            names = list(batch)
            if lacking:
                texts = [(batch[names[i]], dense[i]) for i in lacking]
                found = read_answers(model, caches, texts, head)
                for forced in found:
                    check_finite("drift", {"KL": sum(forced.kl)})
                rows = {f"forced/{names[i]}": vars(f) for i, f in zip(lacking, found, strict=True)}
                journals.cache.add(rows)
            forced_rows = [Forced(**journals.cache[f"forced/{key}"]) for key in batch]
            made += [Answers(*parts) for parts in zip(dense, free, forced_rows, strict=True)]
            bar.update(len(batch))
    longest = max(range(len(made)), key=lambda i: len(made[i].dense))
    memory = memory_of_prompt(model, caches("quantized"), [*prompts[longest], *made[longest].dense])
    metrics = {**summary(made, config), "drift_stops": json.dumps(stops), **memory}
    return TaskResult(
        metrics,
        {"drift": positions(made, config), "drift_answers": _answer_rows(tokenizer, made, config)},
    )


def cut_prompts(ids: Sequence[int], source: str, config: Config) -> list[list[int]]:
    """Prompts of `prompt_tokens` each, spread evenly over the text; they do not overlap.

    Raises:
        UserError: the text, named `source`, is too short for them.
    """
    length, wanted = config.prompt_tokens, config.prompts
    if len(ids) < length * wanted:
        raise UserError(
            f"task.prompts={wanted}: the text {source} has {len(ids)} tokens; accepted are up to "
            f"{len(ids) // length} prompts of task.prompt_tokens={length}"
        )
    spacing = len(ids) / wanted
    return [list(ids[int(i * spacing) : int(i * spacing) + length]) for i in range(wanted)]


def read_answers(
    model: PreTrainedModel,
    caches: CacheFactory,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    head: Head | None,
) -> list[Forced]:
    """Both caches' predictions of answers that follow prompts of one length.

    Shorter texts are padded on the right, which causal attention hides from all tokens.

    Args:
        texts: token ids of each prompt and answer.
    """
    begin = len(texts[0][0])
    rows = [[*prompt, *answer] for prompt, answer in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    both = [
        read_states(model, ids[:, :-1], cache, head)[:, begin - 1 :]
        for cache in (dense_cache(model), caches("quantized"))
    ]
    sums: list[Tensor] = [t.cpu() for t in compare_tokens(both[0], both[1], ids[:, begin:], head)]
    found = []
    for i, (_, answer) in enumerate(texts):
        kl, nll, nll_dense, agree = (t[i, : len(answer)].tolist() for t in sums)
        found.append(Forced(kl, nll, nll_dense, agree))
    return found


def summary(made: Sequence[Answers], config: Config) -> dict[str, Scalar]:
    """The metrics of all prompts; see `measure`."""
    quarter = max(1, config.new_tokens // 4)
    first = _tokens(made, 0, quarter)
    last = _tokens(made, config.new_tokens - quarter, config.new_tokens)
    differences = [
        len(a.dense) if a.first_difference is None else a.first_difference for a in made
    ]  # of equal answers their length
    means = {f"drift_{name}": value for name, value in _means(_tokens(made, 0, config.new_tokens)).items()}
    metrics: dict[str, Scalar] = {
        **means,
        "drift_kl_e3_first_quarter": _means(first)["kl_e3"],
        "drift_kl_e3_last_quarter": _means(last)["kl_e3"] if any(f.kl for f in last) else None,
        "drift_same": fmean(a.first_difference is None for a in made),
        "drift_first_difference": float(median(differences)),
        "drift_n": len(made),
    }
    for suffix, answers in (("", [a.free for a in made]), ("_dense", [a.dense for a in made])):
        metrics[f"drift_length{suffix}"] = fmean(map(len, answers))
        metrics[f"drift_repetition{suffix}"] = fmean(repetition(ids, config.ngram) for ids in answers)
    return metrics


def repetition(ids: Sequence[int], n: int) -> float:
    """Share of an answer's n-grams that it had before; 0 for an answer shorter than n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def positions(made: Sequence[Answers], config: Config) -> list[dict[str, Scalar]]:
    """A row a bucket of positions that some answer reaches; the columns of perplexity's table."""
    width = -(-config.new_tokens // config.buckets)
    rows: list[dict[str, Scalar]] = []
    for start in range(0, config.new_tokens, width):
        part = _tokens(made, start, start + width)
        tokens = sum(len(f.kl) for f in part)
        if tokens:
            place = {"first": start, "last": min(start + width, config.new_tokens) - 1, "tokens": tokens}
            rows.append({"what": "answers", "context": config.new_tokens, **place, **_means(part)})
    return rows


def _tokens(made: Sequence[Answers], start: int, stop: int) -> list[Forced]:
    """The tokens `start` to `stop` of each forced answer."""
    return [Forced(*(values[start:stop] for values in vars(a.forced).values())) for a in made]


def _means(part: Sequence[Forced]) -> dict[str, Scalar]:
    """Means over all tokens; the standard error of KL takes answers as independent."""
    nll = fmean([x for f in part for x in f.nll] or [math.nan])
    nll_dense = fmean([x for f in part for x in f.nll_dense] or [math.nan])
    answers = [fmean(f.kl) for f in part if f.kl]
    error = stdev(answers) / math.sqrt(len(answers)) if len(answers) > 1 else None
    return {
        "perplexity": math.exp(nll),
        "perplexity_dense": math.exp(nll_dense),
        "perplexity_change_percent": 100 * (math.exp(nll - nll_dense) - 1),
        "kl_e3": 1e3 * fmean([x for f in part for x in f.kl] or [math.nan]),
        "kl_se_e3": None if error is None else 1e3 * error,
        "top1_agreement": fmean([x for f in part for x in f.agree] or [math.nan]),
    }


def _answer_rows(tokenizer: Any, made: Sequence[Answers], config: Config) -> list[dict[str, Scalar]]:
    return [
        {
            "task": "drift",
            "id": i,
            "first_difference": answers.first_difference,
            "tokens": len(answers.free),
            "tokens_dense": len(answers.dense),
            "repetition": repetition(answers.free, config.ngram),
            "repetition_dense": repetition(answers.dense, config.ngram),
            "prediction": tokenizer.decode(answers.free),
            "prediction_dense": tokenizer.decode(answers.dense),
        }
        for i, answers in enumerate(made)
    ]


def _key(prompt: Sequence[int], stops: Sequence[int], config: Config) -> str:
    """A key of a prompt and all that its answers depend on, beside model, cache and code."""
    content = json.dumps([prompt, stops, config.new_tokens, config.batch])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
