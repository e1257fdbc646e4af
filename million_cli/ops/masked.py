"""Attention of many queries over two kinds of keys and values, by torch's own attention under a mask.

A query sees the stored vectors of the tokens below its boundary and the exact ones from there on, in one
softmax.  Queries go in blocks, of which each is given only the columns that some query of it sees, so the
work stays near that of causal attention and the mask small.  Everything is differentiable.

Letters: B batch, Hq/Hkv query and KV heads, G = Hq / Hkv, N queries, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ROWS = {"cpu": 256, "cuda": 1024}
"""Queries of a block."""


def masked_attention(
    query: Tensor,
    stored: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    *,
    boundaries: Sequence[int],
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first_valid: Tensor | None = None,
) -> Tensor:
    """Attention of the N newest tokens.

    Args:
        query: `[B, Hq, N, D]`, the tokens length - N .. length - 1.
        stored: keys and values `[B, Hkv, >= boundaries[-1], D]` of the oldest tokens.
        exact: keys and values `[B, Hkv, E, D]` of the tokens boundaries[0] .. length - 1.
        boundaries, scale, mask, softcap, sinks, first_valid: as in `ops.reference.attention`.

    Returns:
        `[B, Hq, N, D]`.  Rows that may see nothing are finite and otherwise undefined.
    """
    N, Hkv, first = query.shape[2], exact[0].shape[1], boundaries[0]
    length = first + exact[0].shape[2]

    def attend(
        q: Tensor, stored_k: Tensor, stored_v: Tensor, k: Tensor, v: Tensor, start: int, stop: int
    ) -> Tensor:
        low, high = boundaries[start], boundaries[stop - 1]
        end = length if mask is not None else length - N + stop
        keys = torch.cat([stored_k[:, :, :high], k[:, :, low - first : end - first]], 2)
        values = torch.cat([stored_v[:, :, :high], v[:, :, low - first : end - first]], 2)
        device = q.device
        tokens = torch.cat([torch.arange(high, device=device), torch.arange(low, end, device=device)])
        is_stored = torch.arange(len(tokens), device=device) < high
        boundary = torch.tensor(boundaries[start:stop], device=device)[:, None]
        seen = (is_stored == (tokens < boundary))[None, None]  # [1, 1, n, columns]
        if mask is None:
            positions = torch.arange(length - N + start, length - N + stop, device=device)
            seen = seen & (tokens <= positions[:, None])
        if first_valid is not None:
            seen = seen & (tokens >= first_valid[:, None, None, None])
        # The heads of a group are rows of one head, so that K and V are not repeated.
        grouped = q.unflatten(1, (Hkv, -1))  # [B, Hkv, G, n, D]
        bias = _with_mask(seen[:, :, None], mask, tokens, slice(start, stop), Hkv)
        bias = bias.expand(*bias.shape[:2], *grouped.shape[2:4], -1).flatten(2, 3)
        rows = grouped.flatten(2, 3)
        if sinks is not None:
            keys, values = (F.pad(x, (0, 0, 0, 1)) for x in (keys, values))
            bias = _with_sinks(bias, sinks.view(Hkv, -1), rows)
        if softcap is None:
            output = F.scaled_dot_product_attention(rows, keys, values, bias, scale=scale)
        else:
            output = _softcapped(rows, keys, values, bias, scale, softcap)
        return output.view_as(grouped).flatten(1, 2)

    outputs = []
    size = _ROWS.get(query.device.type, 256)
    for start in range(0, N, size):
        stop = min(start + size, N)
        parts = (query[:, :, start:stop], *stored, *exact, start, stop)
        if torch.is_grad_enabled():  # scores are computed again for the backward pass, not kept
            outputs.append(checkpoint(attend, *parts, use_reentrant=False))
        else:
            outputs.append(attend(*parts))
    return torch.cat(outputs, 2)


def _with_mask(seen: Tensor, mask: Tensor | None, tokens: Tensor, rows: slice, Hkv: int) -> Tensor:
    """`seen [B or 1, 1, 1, n, columns]` and the given mask together: bool, or additive if the mask is."""
    if mask is not None:
        part = mask[:, :, rows][..., tokens]
        part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, (Hkv, -1))
        if part.dtype != torch.bool:
            return part.masked_fill(~seen, torch.finfo(part.dtype).min)
        seen = seen & part
    return seen | ~seen.any(-1, keepdim=True)  # a row that sees nothing (padding) stays finite


def _with_sinks(bias: Tensor, sinks: Tensor, rows: Tensor) -> Tensor:
    """The mask `[B or 1, Hkv or 1, G * n, columns]` with one column more: the sinks `[Hkv, G]` of its heads.

    A key of zeros scores 0, so that the column's score is the sink.
    """
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=rows.dtype).masked_fill(~bias, torch.finfo(rows.dtype).min)
    column = sinks.to(bias.dtype).repeat_interleave(rows.shape[2] // sinks.shape[1], 1)[None, ..., None]
    shape = (max(bias.shape[0], 1), sinks.shape[0], *bias.shape[2:3])
    return torch.cat([bias.expand(*shape, -1), column.expand(*shape, -1)], -1)


def _softcapped(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention with scores softcap * tanh(scores / softcap), which torch's own has not."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = softcap * torch.tanh(q.to(dtype) @ keys.to(dtype).mT * (scale / softcap))
    if bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, torch.finfo(dtype).min)
    else:
        scores = scores + bias.to(dtype)
    return (scores.softmax(-1) @ values.to(dtype)).to(q.dtype)
