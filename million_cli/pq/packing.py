"""Codes as bits: nbits each, no padding between codes, little-endian.

Bit b of code i is bit (i * nbits + b) of the row, and bit k of the row is bit (k mod 8) of byte k // 8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def code_dtype(nbits: int) -> torch.dtype:
    """The dtype of unpacked codes of `nbits`: uint8 up to 8 bits, uint16 above."""
    return torch.uint8 if nbits <= 8 else torch.uint16


def packed_bytes(n: int, nbits: int) -> int:
    """Bytes of a row of n packed codes."""
    return (n * nbits + 7) // 8


def pack_bits(codes: Tensor, nbits: int) -> Tensor:
    """Pack codes [..., n] (uint8 or uint16, each below 2**nbits) into uint8 [..., ceil(n * nbits / 8)].

    Unused bits of the last byte are zero.  For 8 and 16 bits the result is a view of contiguous codes.
    """
    assert codes.dtype == code_dtype(nbits), (codes.dtype, nbits)
    n = codes.shape[-1]
    if nbits in (8, 16):
        return codes.contiguous().view(torch.uint8)
    group, width = _group(nbits)
    words = F.pad(codes.to(torch.int32), (0, -n % group)).unflatten(-1, (-1, group))
    packed = torch.zeros(*words.shape[:-1], width, dtype=torch.int32, device=codes.device)
    for code, byte, shift in _overlaps(nbits):
        word = words[..., code]
        packed[..., byte] |= (word << shift if shift >= 0 else word >> -shift) & 0xFF
    return packed.to(torch.uint8).flatten(-2)[..., : packed_bytes(n, nbits)].contiguous()


def unpack_bits(packed: Tensor, n: int, nbits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., ceil(n * nbits / 8)] -> codes [..., n], uint8 or uint16."""
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == packed_bytes(n, nbits), (packed.shape, n, nbits)
    if nbits in (8, 16):
        return packed.contiguous().view(code_dtype(nbits))
    group, width = _group(nbits)
    data = F.pad(packed.to(torch.int32), (0, -packed.shape[-1] % width)).unflatten(-1, (-1, width))
    words = torch.zeros(*data.shape[:-1], group, dtype=torch.int32, device=packed.device)
    for code, byte, shift in _overlaps(nbits):
        part = data[..., byte]
        words[..., code] |= part >> shift if shift >= 0 else part << -shift
    words &= (1 << nbits) - 1
    return words.flatten(-2)[..., :n].to(code_dtype(nbits))


def _group(nbits: int) -> tuple[int, int]:
    """Codes and bytes of the shortest run of codes that ends on a byte boundary, e.g. 6 bits -> (4, 3)."""
    common = math.gcd(nbits, 8)
    return 8 // common, nbits // common


def _overlaps(nbits: int) -> list[tuple[int, int, int]]:
    """(code, byte, left shift of the code into the byte) for each pair that shares bits within a group."""
    group, width = _group(nbits)
    return [
        (code, byte, code * nbits - byte * 8)
        for code in range(group)
        for byte in range(width)
        if -nbits < code * nbits - byte * 8 < 8
    ]
