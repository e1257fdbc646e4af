"""The result of one append: all that the new queries of a layer attend to, and attention over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from torch import Tensor

from million_cli.ops.codes import CodeReader
from million_cli.ops.masked import masked_attention
from million_cli.ops.reference import attention
from million_cli.ops.store_ops import DeviceLayer
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import decode
from million_cli.spec import WindowSpec

Prefill = Literal["exact", "quantized"]


@dataclass(frozen=True)
class KVView:
    """Keys and values of one layer as the N tokens just appended see them.

    Token positions are 0 .. length - 1; the N queries are the last N.  Query i sees codes of the tokens below
    `boundaries[i]` and exact vectors from there on.  A view is good until the next change to its store.

    Attributes:
        key_codes, value_codes: codes of the tokens 0 .. coded - 1 (never dense).
        pq_keys, pq_values: the quantizers that decode them.
        exact: makes `keys` and `values` at their first use; compiled kernels never use them.
        exact_start: equals boundaries[0].
        length: tokens a sequence, the new ones included.
        boundaries: N non-decreasing token counts, one a query.
        device_layer: the layer as compiled kernels read it, if the store has `ops` and N is 1.
    """

    key_codes: CodeReader
    value_codes: CodeReader
    pq_keys: LayerPQ
    pq_values: LayerPQ
    exact: Callable[[], tuple[Tensor, Tensor]]
    exact_start: int
    length: int
    boundaries: Sequence[int]
    device_layer: DeviceLayer | None = None

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor]:
        return self.exact()

    @property
    def keys(self) -> Tensor:
        """Exact `[B, Hkv, length - exact_start, D]` of the tokens from exact_start on."""
        return self._exact[0]

    @property
    def values(self) -> Tensor:
        """Like `keys`."""
        return self._exact[1]

    @property
    def num_queries(self) -> int:
        return len(self.boundaries)

    @property
    def coded(self) -> int:
        """Tokens that at least one query sees as codes; 0 means `keys` and `values` are the whole text."""
        return self.boundaries[-1]


def attend(
    query: Tensor,
    view: KVView,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first_valid: Tensor | None = None,
) -> Tensor:
    """Attention of the N newest tokens over a view; see `ops.reference.attention` for the definition.

    One query scores codes by a lookup table.  For several, keys and values are decoded once, in the query's
    dtype, and attended to by `masked_attention`.

    Args:
        query: `[B, Hq, N, D]`, N == view.num_queries, Hq a multiple of Hkv.
        scale: factor on the scores.
        mask: None (causal), bool `[B or 1, Hq or 1, N, >= length]` (True = attend), or additive floats of
            that shape.  A given mask replaces the causal one.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sinks: `[Hq]`, a logit a head that takes its share of the softmax and has no value.
        first_valid: `[B]` integers, tokens before it (left padding) are not seen; combines with either mask.

    Returns:
        `[B, Hq, N, D]` in the query's dtype.
    """
    assert query.shape[2] == view.num_queries, (query.shape, view.num_queries)
    if view.num_queries > 1:
        coded, dtype = view.coded, query.dtype
        stored = (
            decode(view.key_codes.read(0, coded), view.pq_keys, dtype),
            decode(view.value_codes.read(0, coded), view.pq_values, dtype),
        )
        return masked_attention(
            query,
            stored,
            (view.keys, view.values),
            boundaries=view.boundaries,
            scale=scale,
            mask=mask,
            softcap=softcap,
            sinks=sinks,
            first_valid=first_valid,
        )
    return attention(
        query,
        view.key_codes,
        view.value_codes,
        view.pq_keys,
        view.pq_values,
        view.keys,
        view.values,
        boundaries=view.boundaries,
        scale=scale,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        first_valid=first_valid,
    )


@lru_cache(maxsize=64)
def boundaries_of(window: WindowSpec, prefill: Prefill, start: int, end: int) -> tuple[int, ...]:
    """For each of the queries start .. end - 1, how many of the oldest tokens it sees as codes."""
    if prefill == "exact" and end - start > 1:
        return (window.coded_length(start),) * (end - start)
    return tuple(window.coded_length(t + 1) for t in range(start, end))
