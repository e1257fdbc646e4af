"""Nearest centroids in blocks of distances, for the encoder and for k-means."""

from __future__ import annotations

import torch
from torch import Tensor

# A block of distances stays in a CPU's cache; on a GPU it is large enough to fill it.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
_ARGMIN_BLOCK = 32


def block_elements(device: torch.device) -> int:
    """Distances to compute at a time on `device`."""
    return _BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]


def first_argmin(values: Tensor) -> Tensor:
    """argmin over the last dimension, the first of equals: [..., C] contiguous, C = 2^nbits -> int64 [...].

    On a CPU torch's argmin is scalar where amin is vectorised, so the block that holds the minimum is found
    first (twice as fast for C = 256).
    """
    C = values.shape[-1]
    if values.device.type != "cpu" or C <= _ARGMIN_BLOCK:
        return values.argmin(-1)
    blocks = values.view(-1, C // _ARGMIN_BLOCK, _ARGMIN_BLOCK)
    block = blocks.amin(-1).argmin(-1)
    first_block = torch.arange(0, blocks.shape[0] * blocks.shape[1], blocks.shape[1])
    within = blocks.flatten(0, 1).index_select(0, first_block + block).argmin(-1)
    return (block * _ARGMIN_BLOCK + within).view(values.shape[:-1])


def near_argmin(values: Tensor) -> Tensor:
    """argmin over the last dimension up to a relative difference of 2^-14: float32 [..., C] -> int64 [...].

    Overwrites the values, which must be non-negative up to rounding.  On a CPU, for C <= 256, the index takes
    the place of the lowest bits of the mantissa and comes out of a vectorised amin (twice as fast again).
    """
    C = values.shape[-1]
    if values.device.type != "cpu" or C > 256:
        return first_argmin(values)
    values.view(torch.int32).bitwise_and_(-C).bitwise_or_(torch.arange(C, dtype=torch.int32))
    return values.amin(-1).view(torch.int32).bitwise_and_(C - 1).long()
