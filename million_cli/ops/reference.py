"""Attention over codes in torch: the definition that the compiled ops are checked against.

For a query q at position t of a head (equations of the method: MILLION, DAC 2025):

    s_j = scale * q . k_j         k_j decoded from codes for j < boundary(t), exact from there on
    p   = softmax over all j together, after softcap and mask; a head's sink adds exp(sink) to its denominator
    o   = sum_j p_j v_j           v_j likewise

A single query never sees a dense K: its products with all centroids form a lookup table `[M, C]`, and a
score is the sum of M entries chosen by the codes.  Values are decoded span by span into a scratch block and
dropped.  Many queries share each span's decoded keys instead, which gives the same scores by matrix products.
Caches send many queries through `ops.masked`; the form for many stays here as the definition.
The transform, where there is one, is applied to the query and undone on the coded part of the output (see
`pq.transform`).

All arithmetic is float32, or float64 if the query is.  Spans are merged by their running maximum and sum
(online softmax, base e), so memory is bounded whatever the length.

Letters: B batch, Hq/Hkv query and KV heads, G = Hq / Hkv, N queries, T tokens, D head_dim, M subspaces,
C centroids a subspace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from million_cli.ops.codes import CodeReader
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import decode

# Elements of K, and of V, decoded at once (batch, heads, tokens and dimensions), and scores alive at once
# (batch, heads, queries and tokens): about the caches of a CPU, a small part of a GPU's memory.
SPAN_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
SCORE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Rows of a block share the span of keys that any of them sees, so long blocks waste work on masked scores.
_MAX_ROWS = {"cpu": 128, "cuda": 1024}


@torch.no_grad()
def attention(
    query: Tensor,
    key_codes: CodeReader,
    value_codes: CodeReader,
    pq_keys: LayerPQ,
    pq_values: LayerPQ,
    exact_keys: Tensor,
    exact_values: Tensor,
    *,
    boundaries: Sequence[int],
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first_valid: Tensor | None = None,
) -> Tensor:
    """Attention of the N newest tokens; K is never dense when N == 1.

    Args:
        query: `[B, Hq, N, D]`, the tokens length - N .. length - 1.
        key_codes, value_codes: readers of at least boundaries[-1] tokens.
        pq_keys, pq_values: what decodes them.
        exact_keys, exact_values: `[B, Hkv, E, D]`, the tokens boundaries[0] .. length - 1.
        boundaries: N non-decreasing counts, at most the query's own position: query i sees codes of the
            tokens below boundaries[i] and exact vectors from there on.
        scale: factor on the scores.
        mask: None (causal), bool `[B or 1, Hq or 1, N, >= length]` (True = attend), or additive floats of
            that shape.  A given mask is the whole truth: causality is added only when there is none.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sinks: `[Hq]`, a logit a head that takes its share of the softmax and has no value (gpt_oss).
        first_valid: `[B]` integers, tokens before it are not seen; combines with either mask.

    Returns:
        `[B, Hq, N, D]` in the query's dtype.  Rows that may see nothing are finite and otherwise undefined.
    """
    B, Hq, N, D = query.shape
    Hkv, E = exact_keys.shape[1:3]
    length = boundaries[0] + E
    assert len(boundaries) == N, (query.shape, len(boundaries))
    assert Hq % Hkv == 0, (query.shape, exact_keys.shape)
    assert mask is None or (mask.shape[2] == N and mask.shape[3] >= length), mask.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(dtype).unflatten(1, (Hkv, -1)) * scale  # [B, Hkv, G, N, D]
    softmax = OnlineSoftmax(q, sinks)
    visibility = _Visibility(boundaries, length, mask, first_valid, q.device)

    def add(rows: slice, scores: Tensor, values: Tensor, start: int, coded: bool) -> None:
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        softmax.add(rows, visibility.apply(scores, rows, start, coded), values)

    span = _span(B * Hkv * D, q.device)
    coded_length = boundaries[-1]
    start, block, rebase = 0, -1, pq_keys.rebase
    while start < coded_length:
        stop = min(start + span, coded_length)
        if rebase is not None:
            stop = min(stop, (start // rebase.every + 1) * rebase.every)
        if block != (start // rebase.every if rebase else 0):  # another origin, another query
            block = start // rebase.every if rebase else 0
            q_coded = _query_for_codes(q, pq_keys, block)
            table = _lookup_table(q_coded, pq_keys) if N == 1 else None
        codes = key_codes.read(start, stop)
        values = decode(value_codes.read(start, stop), pq_values, dtype, mapped=True)
        if table is not None:
            add(slice(0, 1), _lookup(table, codes), values, start, True)
            start = stop
            continue
        keys = decode(codes, pq_keys, dtype, mapped=True)
        for rows in _row_blocks(N, B * Hq * (stop - start), q.device):
            seen = slice(0, min(stop, boundaries[rows.stop - 1]) - start)
            if seen.stop > 0:
                add(rows, _product(q_coded[..., rows, :], keys[:, :, seen]), values[:, :, seen], start, True)
        start = stop
    if pq_values.transform is not None:
        softmax.output = pq_values.transform.undo(softmax.output.flatten(2, 3)).view_as(q)

    for start in range(boundaries[0], length, span):
        stop = min(start + span, length)
        part = slice(start - boundaries[0], stop - boundaries[0])
        keys, values = exact_keys[:, :, part].to(dtype), exact_values[:, :, part].to(dtype)
        for rows in _row_blocks(N, B * Hq * (stop - start), q.device):
            first = max(start, boundaries[rows.start])
            last = min(stop, length - N + rows.stop) if mask is None else stop
            if first < last:
                seen = slice(first - start, last - start)
                add(rows, _product(q[..., rows, :], keys[:, :, seen]), values[:, :, seen], first, False)
    return softmax.result().flatten(1, 2).to(query.dtype)


def _query_for_codes(q: Tensor, pq: LayerPQ, block: int) -> Tensor:
    """Queries `[B, Hkv, G, N, D]` whose products with the coded keys of a block are the scores."""
    if pq.rebase is not None:
        q = pq.rebase.query(q, block)
    if pq.transform is not None:
        q = pq.transform.query(q.flatten(2, 3)).unflatten(2, q.shape[2:4])
    return q


class OnlineSoftmax:
    """Softmax-weighted sums of values, gathered span by span; `output [B, Hkv, G, N, D]` is not normalised.

    Masked scores are the dtype's least finite number, not -inf: a row of them alone has finite weights, and
    as soon as a row meets a real score, what it gathered from masked ones is scaled to exactly zero.
    """

    def __init__(self, query: Tensor, sinks: Tensor | None = None) -> None:
        self.output = torch.zeros_like(query)
        if sinks is None:
            self._total = torch.zeros_like(query[..., :1])
            self._peak = torch.full_like(self._total, torch.finfo(query.dtype).min)
        else:  # as if a score equal to the sink, with a value of zero, had come first
            self._total = torch.ones_like(query[..., :1])
            self._peak = sinks.to(query.dtype).view(1, *query.shape[1:3], 1, 1).expand_as(self._total).clone()

    def add(self, rows: slice, scores: Tensor, values: Tensor) -> None:
        """Scores `[B, Hkv, G, n, T]` (overwritten) of the queries `rows` and values `[B, Hkv, T, D]`."""
        old_peak = self._peak[..., rows, :]
        peak = torch.maximum(old_peak, scores.amax(-1, keepdim=True))
        weights = scores.sub_(peak).exp_()
        decay = (old_peak - peak).exp_()
        self._peak[..., rows, :] = peak
        self._total[..., rows, :] = self._total[..., rows, :] * decay + weights.sum(-1, keepdim=True)
        gathered = (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])
        self.output[..., rows, :] = self.output[..., rows, :] * decay + gathered

    def result(self) -> Tensor:
        return self.output / self._total


class _Visibility:
    """Which scores count: boundary between codes and exact vectors, causality or the given mask, padding."""

    def __init__(
        self,
        boundaries: Sequence[int],
        length: int,
        mask: Tensor | None,
        first_valid: Tensor | None,
        device: torch.device,
    ) -> None:
        self._boundaries, self._start = boundaries, length - len(boundaries)
        self._mask, self._first_valid, self._device = mask, first_valid, device

    def apply(self, scores: Tensor, rows: slice, start: int, coded: bool) -> Tensor:
        """Scores `[B, Hkv, G, n, T]` of the queries `rows` with the tokens from `start`, changed in place."""
        stop = start + scores.shape[-1]
        least = torch.finfo(scores.dtype).min
        tokens = torch.arange(start, stop, device=self._device)
        low, high = self._boundaries[rows.start], self._boundaries[rows.stop - 1]
        if (coded and low < stop) or (not coded and high > start):
            boundary = torch.tensor(self._boundaries[rows], device=self._device)[:, None]
            scores.masked_fill_(tokens >= boundary if coded else tokens < boundary, least)
        if self._mask is not None:
            mask = self._mask[:, :, rows, start:stop]
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3])
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, least)
            else:
                scores.add_(mask).clamp_(min=least)
        elif stop > self._start + rows.start + 1:
            positions = torch.arange(self._start + rows.start, self._start + rows.stop, device=self._device)
            scores.masked_fill_(tokens > positions[:, None], least)
        if self._first_valid is not None:
            scores.masked_fill_(tokens < self._first_valid.view(-1, 1, 1, 1, 1), least)
        return scores


def _product(query: Tensor, keys: Tensor) -> Tensor:
    """`[B, Hkv, G, n, D]` x `[B, Hkv, T, D]` -> `[B, Hkv, G, n, T]`; a group's heads share K unrepeated."""
    return (query.flatten(2, 3) @ keys.mT).unflatten(2, query.shape[2:4])


def _lookup_table(query: Tensor, pq: LayerPQ) -> Tensor:
    """Products of one mapped query `[B, Hkv, G, 1, D]` with all centroids: `[B, Hkv, M, C, G]`."""
    subvectors = query.squeeze(3).unflatten(-1, (pq.spec.M, pq.spec.dsub))
    centroids = pq.centroids.to(query.dtype).expand(query.shape[1], -1, -1, -1)
    return torch.einsum("bhgmd,hmcd->bhmcg", subvectors, centroids)


def _lookup(table: Tensor, codes: Tensor) -> Tensor:
    """Scores `[B, Hkv, G, 1, T]`: for each token the sum over m of table[..., m, codes[..., m], :]."""
    B, Hkv, M, C, G = table.shape
    T = codes.shape[2]
    assert B * Hkv * M * C < 1 << 31
    first_row = torch.arange(0, B * Hkv * M * C, C, dtype=torch.int32, device=codes.device).view(B, Hkv, 1, M)
    rows = (codes.to(torch.int32) + first_row).reshape(-1, M)
    scores = F.embedding_bag(rows, table.reshape(-1, G), mode="sum")
    return scores.view(B, Hkv, T, G).mT.unsqueeze(3).contiguous()


def _span(elements_a_token: int, device: torch.device) -> int:
    """Tokens of a span, a multiple of the largest page; equal for all stores, so their sums round alike."""
    return max(1, _budget(SPAN_ELEMENTS, device) // (elements_a_token * 256)) * 256


def _row_blocks(N: int, elements_a_row: int, device: torch.device) -> Iterator[slice]:
    """Cut N queries into blocks of bounded scores."""
    n = max(1, min(_budget(SCORE_ELEMENTS, device) // elements_a_row, _budget(_MAX_ROWS, device)))
    for start in range(0, N, n):
        yield slice(start, min(start + n, N))


def _budget(table: dict[str, int], device: torch.device) -> int:
    return table["cpu"] if device.type == "cpu" else table["cuda"]
