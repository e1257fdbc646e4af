"""Keys relative to the origin of their block, so that one codebook serves every position.

A rotary embedding turns pairs of a key's dimensions by angles that grow with the position, and a codebook
knows only the angles that it was trained on.  So positions are cut into blocks of `every` tokens, and a key
is coded as if its block began at position 0: turned back by the angle of the block's origin.  Turning a
query back by the same angle leaves the score as it was, (q A) . (k A) = q . k for a rotation A.  The angles
that a codebook meets are those of the positions 0 .. every - 1, however long the text is.

Letters: B batch, H heads, T tokens, D head_dim, n rotated pairs of dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Layout = Literal["halves", "neighbours"]
"""Pairs of dimensions (i, i + n) or (2 i, 2 i + 1); dimensions from 2 n on are not rotated."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True, eq=False)
class Rebase:
    """How the keys of one layer are brought to the origin of their block.

    every: tokens a block; frequencies: float64 [n] on the CPU, radians a token; layout: which dimensions are
    pairs; scale: the factor that the rotary embedding of the calibrated model put on rotated dimensions
    (YaRN's, 1 for most); gain: that of the served model over `scale`, which is taken out of keys.
    """

    every: int
    frequencies: Tensor
    layout: Layout
    scale: float = 1.0
    gain: float = 1.0

    def served(self, frequencies: Tensor, scale: float) -> Rebase:
        """This rebase for a model with the same keys before RoPE and another scaling of its positions."""
        return replace(self, frequencies=frequencies, gain=scale / self.scale)

    def same_angles(self, other: Rebase) -> bool:
        """Whether the other's frequencies are these, but for float32's rounding."""
        return torch.allclose(self.frequencies, other.frequencies, rtol=1e-4, atol=0)

    def relative(self, keys: Tensor, start: int) -> Tensor:
        """Keys [..., T, D] of the tokens start, start + 1, ... as they are coded, in their own dtype."""
        return self._turned(keys, start, -1, 1 / self.gain)

    def absolute(self, keys: Tensor, start: int) -> Tensor:
        """The inverse of `relative`."""
        return self._turned(keys, start, 1, self.gain)

    def query(self, query: Tensor, block: int) -> Tensor:
        """Queries [..., D] whose products with the coded keys of a block are the scores."""
        cos, sin = self.forms(torch.tensor([block]))
        return turn(query, cos, -sin, self.layout)

    def forms(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, times the gain, of the angles of blocks' origins: [...] -> float64 [..., n]."""
        angles = self._angles(blocks)
        return self.gain * angles.cos(), self.gain * angles.sin()

    def matrix(self, block: int, head_dim: int) -> Tensor:
        """float32 [D, D], A of `relative`: k A for a key of the block."""
        angles = self._angles(torch.tensor([block]))
        one = torch.eye(head_dim, dtype=torch.float64)
        return turn(one, angles.cos() / self.gain, -angles.sin() / self.gain, self.layout).float()

    def _angles(self, blocks: Tensor) -> Tensor:
        origins = blocks.double().cpu() * self.every
        return torch.remainder(origins[..., None] * self.frequencies, 2 * torch.pi)

    def _turned(self, keys: Tensor, start: int, sign: int, factor: float) -> Tensor:
        stop = start + keys.shape[-2]
        if stop <= self.every and factor == 1:
            return keys
        first, last = start // self.every, (stop - 1) // self.every
        angles = self._angles(torch.arange(first, last + 1))
        cos, sin = factor * angles.cos(), factor * sign * angles.sin()
        if first < last:
            at = torch.arange(start, stop) // self.every - first
            cos, sin = cos[at], sin[at]
        return turn(keys, cos, sin, self.layout)


def turn(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Each pair of x [..., T, D] turned by an angle, given as cosine and sine [T or 1, n] or [..., T, n].

    A factor in both goes onto the pairs.  The arithmetic is float32, or float64 if x is.
    """
    n = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(x.device, dtype), sin.to(x.device, dtype)
    pairs, rest = x[..., : 2 * n].to(dtype), x[..., 2 * n :]
    if layout == "halves":
        a, b = pairs[..., :n], pairs[..., n:]
        pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = pairs[..., ::2], pairs[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([pairs.to(x.dtype), rest], -1)
