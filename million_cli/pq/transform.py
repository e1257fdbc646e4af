"""Linear maps of a head's vectors, applied before the split into subspaces.

A cache stores the codes of z = x E; a decoded vector is z D, D the inverse of E.  Keys need not be mapped
back:  the scores are q . (z D) = (q D^T) . z, so the query is multiplied by the transpose of D.  Values are
mapped back once, on the attention output, o = o_coded D.  For a rotation R, E = R and D = R^T: queries and
keys have the same map.  RoPE comes before the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transform:
    """A map and its inverse.

    encode, decode: [..., H, D, D], the same shape, H 1 or the number of KV heads; encode @ decode = 1 up to
    rounding.  Both are at least float32: rounded to 16 bits they would not be inverse to each other.
    """

    encode: Tensor
    decode: Tensor

    def __post_init__(self) -> None:
        assert self.encode.shape == self.decode.shape, (self.encode.shape, self.decode.shape)
        assert self.encode.shape[-1] == self.encode.shape[-2], self.encode.shape

    @classmethod
    def rotation(cls, R: Tensor) -> Transform:
        """Of orthogonal matrices [..., H, D, D]: x @ R, undone by the transpose."""
        return cls(R, R.mT)

    @classmethod
    def invertible(cls, encode: Tensor) -> Transform:
        """Of invertible matrices [..., H, D, D]; the inverse is found in float64."""
        return cls(encode, torch.linalg.inv(encode.double()).to(encode.dtype))

    @classmethod
    def stack(cls, layers: Sequence[Transform]) -> Transform:
        """Maps [L, H, D, D] of layers with [H, D, D] each."""
        return cls(torch.stack([one.encode for one in layers]), torch.stack([one.decode for one in layers]))

    @property
    def num_elements(self) -> int:
        """Numbers in both maps."""
        return self.encode.numel() + self.decode.numel()

    def apply(self, x: Tensor) -> Tensor:
        """Map x [..., H or 1, T, D] before coding: x @ encode, in the dtype of x."""
        return x @ self.encode.to(x.dtype)

    def undo(self, z: Tensor) -> Tensor:
        """The inverse of `apply`: z @ decode."""
        return z @ self.decode.to(z.dtype)

    def query(self, q: Tensor) -> Tensor:
        """Queries [..., H, T, D] whose products with coded keys are the scores: q @ decode^T."""
        return q @ self.decode.to(q.dtype).mT

    def layer(self, i: int) -> Transform:
        """The maps [H, D, D] of the i-th layer of [L, H, D, D], or of the only one if all layers share it."""
        i = i if len(self.encode) > 1 else 0
        return Transform(self.encode[i], self.decode[i])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Transform:
        """Moved to `device`, in `dtype` or float32, whichever is wider."""
        dtype = transform_dtype(dtype or self.encode.dtype)
        return Transform(self.encode.to(device, dtype), self.decode.to(device, dtype))


def transform_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a transform beside centroids in `dtype`."""
    return torch.promote_types(dtype, torch.float32)
