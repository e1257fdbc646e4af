"""Fragment order: codes stored in the order in which the lanes of a warp of the decode kernel read them.

A page is P / 16 groups of 16 tokens, a group 16 * M bytes.  Lane 4 * g + t of 32 owns M / 2 of them, in
chunks of at most 16 bytes, a chunk of all lanes being contiguous.  Which (token, subspace) a lane's bytes are
follows from the kernel's matrix instructions; kernels/layout.cuh states the same order and the reason for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

from million_cli.spec import CodeSpec

GROUP = 16
DSUBS = (1, 2, 4, 8)
"""Dims of a code that have a fragment order."""

Side = Literal["keys", "values"]


def fragment_reason(spec: CodeSpec) -> str | None:
    """None if codes of `spec` have a fragment order, else why not."""
    if spec.head_dim not in (64, 128):
        return f"head_dim={spec.head_dim}, supported are 64 and 128"
    if spec.nbits != 8:
        return f"nbits={spec.nbits}, supported is 8"
    if spec.dsub not in DSUBS:
        accepted = ", ".join(str(spec.head_dim // dsub) for dsub in DSUBS)
        return f"M={spec.M}, supported are {accepted}"
    return None


@dataclass(frozen=True)
class FragmentLayout:
    """`[P / 16, 16 * M]`: groups of 16 tokens, each in the lanes' order.  Keys and values differ."""

    spec: CodeSpec
    page_size: int
    side: Side

    def __post_init__(self) -> None:
        reason = fragment_reason(self.spec)
        assert reason is None, reason
        assert self.page_size % GROUP == 0

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.page_size // GROUP, GROUP * self.spec.M)

    @property
    def page_bytes(self) -> int:
        return prod(self.page_shape)

    def pack(self, codes: Tensor) -> Tensor:
        assert codes.shape[-2] == self.page_size
        groups = codes.unflatten(-2, (*self.page_shape[:1], GROUP)).flatten(-2)
        return groups.index_select(-1, _gather(self.spec, self.side).to(codes.device)).to(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        order = _gather(self.spec, self.side).argsort().to(packed.device)
        return packed.index_select(-1, order).unflatten(-1, (GROUP, self.spec.M)).flatten(-3, -2)


@cache
def _gather(spec: CodeSpec, side: Side) -> Tensor:
    """int64 [16 * M]: entry i is token * M + subspace of the code at byte i of a group."""
    M = spec.M
    index = torch.empty(GROUP * M, dtype=torch.int64)
    position = _key_position if side == "keys" else _value_position
    for token in range(GROUP):
        for s in range(M):
            index[position(spec, token, s)] = token * M + s
    return index


def _offset(M: int, lane: int, byte: int) -> int:
    chunk = min(16, M // 2)
    return byte // chunk * 32 * chunk + lane * chunk + byte % chunk


def _key_position(spec: CodeSpec, token: int, s: int) -> int:
    M, dsub, packed = spec.M, spec.dsub, _packed(spec)
    g, entry = token & 7, s // packed
    unit, half = (entry >> 2) ^ (g & (16 // (dsub * packed) - 1)), token >> 3
    if dsub == 1:
        byte = 4 * unit + 2 * half + s % 2
    elif dsub == 2:
        byte = 4 * (unit % (M // 8)) + 2 * (unit // (M // 8)) + half
    else:
        byte = 2 * unit + half
    return _offset(M, 4 * g + (entry & 3), byte)


def _value_position(spec: CodeSpec, token: int, s: int) -> int:
    M, dsub, packed = spec.M, spec.dsub, _packed(spec)
    t, a = (token & 7) >> 1, (token & 1) + 2 * (token >> 3)
    entry = s // packed
    if dsub == 8:
        g, unit = (entry & 7) ^ (2 * t), entry >> 3
    elif dsub == 4 and M == 32:
        g, unit = (entry & 3) + 4 * (entry >> 4), ((entry >> 2) & 3) ^ t
    else:
        g, unit = entry & 7, (entry >> 3) ^ (t & (min(M // packed // 8, 4) - 1))
    return _offset(M, 4 * g + t, 4 * packed * unit + 4 * (s % packed) + a)


def _packed(spec: CodeSpec) -> int:
    """Codes of an entry: those of one dim go in pairs, a word of the decode kernel's table."""
    return 2 if spec.dsub == 1 else 1
