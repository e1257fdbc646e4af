"""Keys relative to the origin of their block, so that one codebook serves every position.

A rotary embedding turns pairs of a key's dimensions by angles that grow with the position, and a codebook
knows only the angles that it was trained on.  So positions are cut into blocks of `every` tokens, and a key
is coded as if its block began at position 0: turned back by the angle of the block's origin.  Turning a
query back by the same angle leaves the score as it was, (q A) . (k A) = q . k for a rotation A.  The angles
that a codebook meets are those of the positions 0 .. every - 1, however long the text is.

Letters: B batch, H heads, T tokens, D head_dim, n rotated pairs of dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    pairs.
    """

    every: int
    frequencies: Tensor
    layout: Layout

    def relative(self, keys: Tensor, start: int) -> Tensor:
        """Keys [..., T, D] of the tokens start, start + 1, ... as they are coded, in their own dtype."""
        return self._turned(keys, start, -1)

    def absolute(self, keys: Tensor, start: int) -> Tensor:
        """The inverse of `relative`."""
        return self._turned(keys, start, 1)

    def query(self, query: Tensor, block: int) -> Tensor:
        """Queries [..., D] whose products with the coded keys of a block are the scores."""
        if block == 0:
            return query
        angles = self.angles(torch.tensor([block]))
        return turn(query, -angles, self.layout)

    def angles(self, blocks: Tensor) -> Tensor:
        """Of the origins of blocks, whole numbers [...]: float64 [..., n], from 0 to 2 pi."""
        positions = blocks.double().cpu() * self.every
        return torch.remainder(positions[..., None] * self.frequencies, 2 * torch.pi)

    def matrix(self, block: int, head_dim: int) -> Tensor:
        """float32 [D, D], A of `relative`: k A for a key of the block."""
        return self.query(torch.eye(head_dim, dtype=torch.float64), block).float()

    def _turned(self, keys: Tensor, start: int, sign: int) -> Tensor:
        stop = start + keys.shape[-2]
        if stop <= self.every:
            return keys
        first, last = start // self.every, (stop - 1) // self.every
        angles = sign * self.angles(torch.arange(first, last + 1))
        if first == last:
            return turn(keys, angles, self.layout)
        at = torch.arange(start, stop) // self.every - first
        return turn(keys, angles[at], self.layout)


def turn(x: Tensor, angles: Tensor, layout: Layout) -> Tensor:
    """Each pair of x [..., T, D] turned by its angle, [T or 1, n]; the arithmetic is float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(x.device, dtype) for part in (angles.cos(), angles.sin()))
    return turn_by(x, cos, sin, layout)


def turn_by(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """`turn` by cosines and sines [T or 1, n], or of the shape [..., T, n], which may carry a factor."""
    n = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., : 2 * n].to(dtype), x[..., 2 * n :]
    if layout == "halves":
        a, b = turned[..., :n], turned[..., n:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)
