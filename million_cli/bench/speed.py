"""Time to the first token and time per output token, with the cache under test and with the dense cache.

Both run in turns in one process on the same random tokens (what they are does not matter for time): times
depend on the machine, their ratio much less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.bench.stage_clock import StageClock
from million_cli.errors import UserError
from million_cli.progress import progress
from million_cli.tasks.base import (
    CacheFactory,
    Scalar,
    TaskResult,
    check_context,
    dense_cache,
    memory_metrics,
)
from million_cli.text import Text

NAMES = ("dense", "cache")


@dataclass
class Config:
    """What is timed.

    Attributes:
        context: tokens of the prompt.
        new_tokens: decode steps timed.
        batch: sequences at once.
        repeats: runs of each cache, in turns; a first one of each is thrown away.
        breakdown: also time the stages of a decode step.
    """

    name: str = "speed"
    context: int = 1024
    new_tokens: int = 64
    batch: int = 1
    repeats: int = 3
    breakdown: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)}: accepted are integers from 1")


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: object,
    caches: CacheFactory,
    text: Text | None,
    config: Config,
    seed: int,
) -> TaskResult:
    """Times of both caches.

    Returns:
        ttft_ms (median over repeats), tpot_ms and tpot_p90_ms (median and 90th percentile of all steps), the
        same with `_dense_ms`, tpot_ratio (dense / cache; above 1 is faster than dense), tokens_per_s, the
        bytes of `memory_metrics`; with breakdown the table `breakdown`, mean milliseconds a step by stage.

    Raises:
        UserError: context and new tokens are more than the model takes.
    """
    check_context("bench.context+new_tokens", config.context + config.new_tokens, model)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (config.batch, config.context), generator=generator).to(model.device)
    makers: dict[str, Callable[[], Cache]] = {
        "dense": lambda: dense_cache(model),
        "cache": lambda: caches("exact"),
    }
    ttft: dict[str, list[float]] = {name: [] for name in NAMES}
    steps: dict[str, list[float]] = {name: [] for name in NAMES}
    stages: dict[str, dict[str, float]] = {}
    used: dict[str, Cache] = {}
    with progress((config.repeats + 1) * len(NAMES), "timing", "run") as bar:
        for repeat in range(config.repeats + 1):
            for name in NAMES:
                used[name] = makers[name]()
                first, rest = time_generation(model, prompt, used[name], config.new_tokens)
                if repeat:
                    ttft[name].append(first)
                    steps[name] += rest
                bar.update()
    memory = memory_metrics(used["cache"], used["dense"])
    if config.breakdown:
        for name in NAMES:
            stages[name] = time_stages(model, prompt, makers[name](), config.new_tokens)
    metrics: dict[str, Scalar] = {
        "context": config.context,
        "batch": config.batch,
        "ttft_ms": _quantile(ttft["cache"], 0.5),
        "ttft_dense_ms": _quantile(ttft["dense"], 0.5),
        "tpot_ms": _quantile(steps["cache"], 0.5),
        "tpot_p90_ms": _quantile(steps["cache"], 0.9),
        "tpot_dense_ms": _quantile(steps["dense"], 0.5),
        "tpot_p90_dense_ms": _quantile(steps["dense"], 0.9),
        "tpot_ratio": _quantile(steps["dense"], 0.5) / _quantile(steps["cache"], 0.5),
        "tokens_per_s": 1e3 * config.batch / _quantile(steps["cache"], 0.5),
    }
    rows: list[dict[str, Scalar]] = [
        {"stage": stage, **{f"{name}_ms": stages[name].get(stage, 0.0) for name in NAMES}}
        for stage in dict.fromkeys(stage for name in stages for stage in stages[name])
    ]
    return TaskResult({**metrics, **memory}, {"breakdown": rows} if rows else {})


def time_generation(
    model: PreTrainedModel, prompt: Tensor, cache: Cache, new_tokens: int
) -> tuple[float, list[float]]:
    """Milliseconds from prompt `[B, T]` to the first token, and of each of `new_tokens` steps after it."""
    _wait(model)
    clock = time.perf_counter()
    token = next_token(model, prompt, cache)
    _wait(model)
    first = 1e3 * (time.perf_counter() - clock)
    steps = []
    for _ in range(new_tokens):
        clock = time.perf_counter()
        token = next_token(model, token, cache)
        _wait(model)
        steps.append(1e3 * (time.perf_counter() - clock))
    return first, steps


def time_stages(model: PreTrainedModel, prompt: Tensor, cache: Cache, new_tokens: int) -> dict[str, float]:
    """Mean milliseconds of each stage of a decode step, over `new_tokens` steps after the prompt."""
    token = next_token(model, prompt, cache)
    with StageClock(model, cache) as clock:
        for _ in range(new_tokens):
            clock.mark("other")
            token = next_token(model, token, cache)
        clock.stop()
    return {stage: total / new_tokens for stage, total in clock.totals_ms().items()}


def next_token(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """The greedy next token `[B, 1]` after ids `[B, N]` and what the cache holds."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()
