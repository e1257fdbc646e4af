"""What quantizing costs a language model on text: KL from its dense self, perplexity, agreement.

The text is cut into windows; each is read once with the dense cache and once with the cache under test, and
the two next-token distributions are compared at every position.  `mode` says how the second reading goes:

    parallel  one forward pass, each query seeing exactly what decoding token by token would show it
    step      token by token (slow; equal to `parallel` up to rounding)
    distort   one forward pass, all of K and V coded, no exact window (what the MILLION paper evaluates)

Whether the loss grows with distance shows in the table `positions`: the same sums by place in the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.progress import progress
from million_cli.tasks.base import (
    CacheFactory,
    Scalar,
    TaskResult,
    check_context,
    dense_cache,
    longest_context,
    memory_metrics,
)
from million_cli.text import Text, TextConfig

MODES = ("parallel", "step", "distort")
CHUNK_ELEMENTS = 1 << 24
"""Logits that are compared at once: bounds the float32 copies (a vocabulary of 128K makes 128 positions)."""


@dataclass
class Config(TextConfig):
    """Text (see `TextConfig`) and how it is read.

    Attributes:
        context: tokens of a window; null is the model's trained context, at most 2048.
        max_tokens: read at most that many tokens of the text.
        batch: windows at once.
        mode: `parallel`, `step` or `distort`.
        buckets: rows of the table by position, each an equal share of the window.
    """

    name: str = "perplexity"
    context: int | None = None
    max_tokens: int | None = None
    batch: int = 4
    mode: str = "parallel"
    buckets: int = 16

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"task.mode={self.mode}: accepted are {', '.join(MODES)}")
        for name in ("batch", "buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name}={getattr(self, name)}: accepted are integers from 1")


class Comparison:
    """Sums by window and position, in float64.

    KL is KL(dense || cached) = sum_v p_v (ln p_v - ln q_v), in nats.
    """

    def __init__(self) -> None:
        self.agree = 0
        self._kl: list[Tensor] = []  # of each batch, [B, T]
        self._nll: list[Tensor] = []
        self._nll_dense: list[Tensor] = []

    def add(self, dense: Tensor, cached: Tensor, targets: Tensor) -> None:
        """Compare logits `[B, T, V]` of the same positions; targets `[B, T]` are the tokens that follow."""
        rows = max(1, CHUNK_ELEMENTS // dense.shape[-1])
        kl, nll, nll_dense = (torch.zeros(targets.shape, dtype=torch.float64) for _ in range(3))
        for b in range(len(dense)):
            for start in range(0, dense.shape[1], rows):
                part = slice(start, start + rows)
                p, q = _log_softmax(dense[b, part]), _log_softmax(cached[b, part])
                goal = targets[b, part, None]
                nll_dense[b, part] = -p.gather(-1, goal)[:, 0].double().cpu()
                nll[b, part] = -q.gather(-1, goal)[:, 0].double().cpu()
                kl[b, part] = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).cpu()
                self.agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        self._kl.append(kl)
        self._nll.append(nll)
        self._nll_dense.append(nll_dense)

    def metrics(self) -> dict[str, Scalar]:
        """Means over all tokens; see `_means`."""
        kl, nll, nll_dense = self._stacked()
        means = _means(kl, nll, nll_dense)
        return {**means, "top1_agreement": self.agree / kl.numel(), "tokens": kl.numel()}

    def positions(self, buckets: int) -> list[dict[str, Scalar]]:
        """The same by position in the window: a row a bucket, at most `buckets` of equal width.

        `first` to `last` count from 0 the tokens that predict; `tokens` are those in it over all windows.
        """
        stacked = self._stacked()
        length = stacked[0].shape[1]
        width = -(-length // buckets)
        rows: list[dict[str, Scalar]] = []
        for start in range(0, length, width):
            part = [sums[:, start : start + width] for sums in stacked]
            place = {"first": start, "last": min(start + width, length) - 1, "tokens": part[0].numel()}
            rows.append({**place, **_means(*part)})
        return rows

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self._kl), torch.cat(self._nll), torch.cat(self._nll_dense)


def _means(kl: Tensor, nll: Tensor, nll_dense: Tensor) -> dict[str, Scalar]:
    """Means over windows and positions `[windows, T]`, in nats a token.

    The standard error of KL treats windows as independent, and tokens within one as not; one window has none.
    """
    mean, mean_dense = nll.mean().item(), nll_dense.mean().item()
    windows = kl.mean(1)
    error = windows.std().item() / math.sqrt(len(windows)) if len(windows) > 1 else None
    return {
        "perplexity": math.exp(mean),
        "perplexity_dense": math.exp(mean_dense),
        "perplexity_change_percent": 100 * (math.exp(mean - mean_dense) - 1),
        "nll": mean,
        "nll_dense": mean_dense,
        "kl_e3": 1e3 * windows.mean().item(),
        "kl_se_e3": None if error is None else 1e3 * error,
    }


@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokenizer: Any, caches: CacheFactory, text: Text, config: Config, seed: int
) -> TaskResult:
    """Perplexity and KL over all whole windows of the text.

    Returns:
        perplexity(_dense), nll(_dense) in nats a token, kl_e3 (mean KL x 1000, nats) with its standard error,
        top1_agreement, tokens predicted, and the bytes of `memory_metrics` at the end of a window; the table
        `positions` has a row a bucket of positions.

    Raises:
        UserError: the text is shorter than one window, or the window longer than the model's context.
    """
    windows = cut_windows(model, tokenizer, text, config)
    comparison = Comparison()
    memory: dict[str, Scalar] = {}
    with progress(windows.numel(), f"perplexity on {text.source}", "tok") as bar:
        for ids in windows.split(config.batch):
            ids = ids.to(model.device)
            dense = dense_cache(model)
            cache = caches("distort" if config.mode == "distort" else "quantized")
            expected = read_at_once(model, ids[:, :-1], dense)
            read = read_by_step if config.mode == "step" else read_at_once
            comparison.add(expected, read(model, ids[:, :-1], cache), ids[:, 1:])
            memory = memory or memory_metrics(cache, dense)
            bar.update(ids.numel())
    return TaskResult(
        {**comparison.metrics(), "context": windows.shape[1], **memory},
        {"positions": comparison.positions(config.buckets)},
    )


def cut_windows(model: PreTrainedModel, tokenizer: Any, text: Text, config: Config) -> Tensor:
    """Token ids `[windows, context]` int64 of the text, what is left at its end dropped.

    Raises:
        UserError: the text is shorter than one window, or the window longer than the model's context.
    """
    context = config.context or min(longest_context(model), 2048)
    check_context("task.context", context, model)
    ids = tokenizer(text.content, verbose=False)["input_ids"][: config.max_tokens]
    if len(ids) < context:
        raise UserError(
            f"the text {text.source} has {len(ids)} tokens; accepted are at least task.context={context}"
        )
    whole = len(ids) // context
    return torch.tensor(ids[: whole * context], dtype=torch.int64).view(whole, context)


def read_at_once(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits `[B, T, V]` of one forward pass over `ids [B, T]` through an empty cache."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def read_by_step(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """The same, one token a forward pass."""
    return torch.cat([read_at_once(model, column, cache) for column in ids.split(1, dim=1)], dim=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
