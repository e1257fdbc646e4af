"""The cost of a quantized cache on text: KL from the dense cache, perplexity, agreement.

The text is cut into windows; each is read once with the dense cache and once with the cache under test, and
the two next-token distributions are compared at every position.  `mode` is the way of the second reading:

    parallel  one forward pass, each query seeing exactly what decoding token by token would show it
    step      token by token (slow; equal to `parallel` up to rounding)
    distort   one forward pass, all of K and V coded, no exact window (what the MILLION paper evaluates)

Whether the loss grows with distance shows in the table `positions`: the same sums by place in windows of
several lengths, up to the model's trained context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.hf.compat import check_held
from million_cli.progress import progress
from million_cli.tasks.base import (
    CacheFactory,
    Scalar,
    TaskResult,
    check_context,
    dense_cache,
    finite,
    longest_context,
    memory_metrics,
)
from million_cli.text import Text, TextConfig

MODES = ("parallel", "step", "distort")
USUAL_CONTEXT = 2048
"""Columns without a length in their name are of the longest windows up to so many tokens."""
CHUNK_ELEMENTS = 1 << 24
"""Logits that are compared at once: bounds the float32 copies (a vocabulary of 128K makes 128 positions)."""


@dataclass
class Config(TextConfig):
    """The text (see `TextConfig`) and how it is read.

    Attributes:
        context: tokens of a window, for windows of one length.
        contexts: several lengths of windows.  Without both: 1024, 2048 and the model's trained context, as
            far as the model and the text allow.
        max_tokens: the most tokens of the text to read.
        batch: windows at once.
        mode: `parallel`, `step` or `distort`.
        buckets: rows of the table by position, each an equal share of the window.
    """

    name: str = "perplexity"
    context: int | None = None
    contexts: list[int] | None = None
    max_tokens: int | None = None
    batch: int = 4
    mode: str = "parallel"
    buckets: int = 16

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"task.mode={self.mode}: accepted are {', '.join(MODES)}")
        if self.context is not None and self.contexts is not None:
            raise UserError(f"task.context={self.context}, contexts={self.contexts}: accepted is one of them")
        if self.contexts == []:
            raise UserError("task.contexts=[]: accepted are some numbers of tokens, or null")
        for name in ("batch", "buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name}={getattr(self, name)}: accepted are integers from 1")


@dataclass(frozen=True)
class Head:
    """From hidden states `[..., H]` to logits `[..., V]`; without `project` they are logits already.

    Attributes:
        size: V.
    """

    project: Callable[[Tensor], Tensor] | None
    size: int

    def __call__(self, states: Tensor) -> Tensor:
        return states if self.project is None else self.project(states)


def compare_tokens(
    dense: Tensor, cached: Tensor, targets: Tensor, head: Head | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, negative log-likelihoods with the cache and dense (nats, float64), and agreement; each `[B, T]`.

    Arguments as for `Comparison.add`; all four lie on the CPU.
    """
    rows = max(1, CHUNK_ELEMENTS // (dense.shape[-1] if head is None else head.size))
    head = head or Head(None, dense.shape[-1])
    kl, nll, nll_dense = (torch.zeros(targets.shape, dtype=torch.float64) for _ in range(3))
    agree = torch.zeros(targets.shape, dtype=torch.bool)
    for b in range(len(dense)):
        for start in range(0, dense.shape[1], rows):
            part = slice(start, start + rows)
            p, q = _log_softmax(head(dense[b, part])), _log_softmax(head(cached[b, part]))
            goal = targets[b, part, None]
            nll_dense[b, part] = -p.gather(-1, goal)[:, 0].double().cpu()
            nll[b, part] = -q.gather(-1, goal)[:, 0].double().cpu()
            kl[b, part] = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).cpu()
            agree[b, part] = (p.argmax(-1) == q.argmax(-1)).cpu()
    return kl, nll, nll_dense, agree


class Comparison:
    """Sums by window and position, in float64.

    KL is KL(dense || cached) = sum_v p_v (ln p_v - ln q_v), in nats.
    """

    def __init__(self) -> None:
        self.agree = 0
        self._kl: list[Tensor] = []  # of each batch, [B, T]
        self._nll: list[Tensor] = []
        self._nll_dense: list[Tensor] = []

    def add(self, dense: Tensor, cached: Tensor, targets: Tensor, head: Head | None = None) -> None:
        """Compare logits `[B, T, V]` of the same positions; targets `[B, T]` are the tokens that follow.

        With `head` the two are hidden states `[B, T, H]`, which it makes logits of a chunk at a time.
        """
        kl, nll, nll_dense, agree = compare_tokens(dense, cached, targets, head)
        self.agree += int(agree.sum())
        self._kl.append(kl)
        self._nll.append(nll)
        self._nll_dense.append(nll_dense)

    def metrics(self) -> dict[str, Scalar]:
        """Means over all tokens, and KL over the first and the last quarter of positions; see `_means`."""
        kl, nll, nll_dense = self._stacked()
        means = _means(kl, nll, nll_dense)
        quarter = max(1, kl.shape[1] // 4)
        first, last = (1e3 * part.mean().item() for part in (kl[:, :quarter], kl[:, -quarter:]))
        return {
            **means,
            "kl_e3_first_quarter": first,
            "kl_e3_last_quarter": last,
            "kl_growth": last / first if first > 0 else None,
            "top1_agreement": self.agree / kl.numel(),
            "tokens": kl.numel(),
        }

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


@finite("perplexity")
@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokenizer: Any, caches: CacheFactory, text: Text, config: Config, seed: int
) -> TaskResult:
    """Perplexity and KL over all whole windows of the text.

    Returns:
        perplexity(_dense), nll(_dense) in nats a token, kl_e3 (mean KL x 1000, nats) with its standard error,
        kl_e3_first_quarter and kl_e3_last_quarter (of positions in the window), kl_growth (their ratio),
        top1_agreement, tokens predicted, and the bytes of `memory_metrics` at the end of a window: all for
        the longest windows up to 2048 tokens (`context`).  With several lengths each has the columns
        `<metric>_at_<context>` too.  The table `positions` has a row a length and bucket of positions.

    Raises:
        UserError: the text is shorter than one window, or the window longer than the model's context.
    """
    ids = tokenizer(text.content, verbose=False)["input_ids"][: config.max_tokens]
    lengths = context_lengths(model, len(ids), config)
    windows = {context: cut_windows(ids, context, text.source) for context in lengths}
    usual = max((c for c in lengths if c <= USUAL_CONTEXT), default=lengths[0])
    head = find_head(model)
    metrics: dict[str, Scalar] = {}
    rows: list[dict[str, Scalar]] = []
    with progress(sum(w.numel() for w in windows.values()), f"perplexity on {text.source}", "tok") as bar:
        for context, those in windows.items():
            comparison, memory = _compare(model, caches, those, config, head, bar)
            found = comparison.metrics()
            rows += [{"context": context, **row} for row in comparison.positions(config.buckets)]
            if len(windows) > 1:
                metrics |= {f"{name}_at_{context}": value for name, value in found.items()}
            if context == usual:
                metrics = {**found, "context": context, **memory, **metrics}
    return TaskResult(metrics, {"positions": rows})


def _compare(
    model: PreTrainedModel,
    caches: CacheFactory,
    windows: Tensor,
    config: Config,
    head: Head | None,
    bar: tqdm[Any],
) -> tuple[Comparison, dict[str, Scalar]]:
    """Both readings of windows `[n, context]`, and the caches' bytes after the first batch."""
    comparison = Comparison()
    memory: dict[str, Scalar] = {}
    batch = max(1, config.batch * USUAL_CONTEXT // max(windows.shape[1], USUAL_CONTEXT))
    for ids in windows.split(batch):
        ids = ids.to(model.device)
        dense = dense_cache(model)
        cache = caches("distort" if config.mode == "distort" else "quantized")
        pieces = 1 if config.mode == "step" else ids.shape[1]
        expected = read_states(model, ids[:, :-1], dense, head)
        comparison.add(expected, read_states(model, ids[:, :-1], cache, head, pieces), ids[:, 1:], head)
        memory = memory or memory_metrics(cache, dense)
        bar.update(ids.numel())
    return comparison, memory


def context_lengths(model: PreTrainedModel, tokens: int, config: Config) -> list[int]:
    """Lengths of windows in ascending order; see `Config`.

    Args:
        tokens: of the text.

    Raises:
        UserError: a length that the model does not take.
    """
    given = [config.context] if config.context is not None else config.contexts
    if given is not None:
        for context in given:
            check_context("task.context" if config.context else "task.contexts", context, model)
        return sorted(set(given))
    longest = longest_context(model)
    usual = {min(context, longest) for context in (1024, USUAL_CONTEXT, longest)}
    return [c for c in sorted(usual) if c <= tokens] or [min(usual)]


def cut_windows(ids: Sequence[int], context: int, source: str) -> Tensor:
    """Token ids `[windows, context]` int64 of a text, without the rest at its end.

    Raises:
        UserError: the text, named `source`, is shorter than one window.
    """
    if len(ids) < context:
        raise UserError(
            f"the text {source} has {len(ids)} tokens; accepted are at least task.context={context}"
        )
    whole = len(ids) // context
    return torch.tensor(ids[: whole * context], dtype=torch.int64).view(whole, context)


def find_head(model: PreTrainedModel) -> Head | None:
    """The map from the decoder's last states to logits, where it is the output projection alone.

    Logits of 8192 tokens and 49K words take 1.6 GB in float32, twice; states take a hundredth, and logits are
    then made a chunk at a time.  Some models scale or cap their logits: whether there is more than the
    projection is tried on a few tokens.  None if so.
    """
    project, decoder = model.get_output_embeddings(), model.get_decoder()
    if project is None or decoder is None:
        return None
    ids = torch.arange(8, device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    states = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return Head(project, logits.shape[-1]) if torch.equal(project(states), logits) else None


def read_states(
    model: PreTrainedModel, ids: Tensor, cache: Cache, head: Head | None, pieces: int | None = None
) -> Tensor:
    """Read `ids [B, T]` through `cache`: states `[B, T, H]` for `head`, or logits `[B, T, V]` without a head.

    Args:
        pieces: tokens a forward pass; None is all at once.
    """
    found = []
    for part in ids.split(pieces or ids.shape[1], dim=1):
        if head is None:
            found.append(read_at_once(model, part, cache))
        else:
            held = int(cache.get_seq_length())
            output = model.get_decoder()(input_ids=part, past_key_values=cache, use_cache=True)
            check_held(cache, held + part.shape[1])
            found.append(output.last_hidden_state)
    return torch.cat(found, dim=1)


def read_at_once(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits `[B, T, V]` of one forward pass over `ids [B, T]` through an empty cache."""
    held = int(cache.get_seq_length())
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    check_held(cache, held + ids.shape[1])
    return logits


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
