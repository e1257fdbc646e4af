"""What an alternative has to tell: what becomes of whole pages, and what it would cost to store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from million_cli.errors import UserError


@dataclass(frozen=True)
class CodecSpec:
    """Settings of the alternatives; each reads what concerns it.

    head_dim: D; page_size: P, tokens quantised together; nbits: of a code; group: elements that share a scale
    and a zero point; seed: of a random rotation, which is applied if `rotated`.
    """

    head_dim: int
    page_size: int
    nbits: int = 4
    group: int = 64
    rotated: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.nbits <= 8:
            raise UserError(f"quantizer.nbits={self.nbits}: accepted are 1 to 8")
        if self.group < 2:
            raise UserError(f"quantizer.group={self.group}: accepted are integers from 2")


class Codec(Protocol):
    """A way to store K and V.

    bits: of a stored element, mean of keys and values, with scales and zero points.
    """

    @property
    def bits(self) -> float: ...

    def keys(self, pages: Tensor) -> Tensor:
        """Keys `[B, Hkv, n, P, D]` (n pages of P tokens) as they come back from storage, same dtype."""
        ...

    def values(self, pages: Tensor) -> Tensor:
        """Values, likewise."""
        ...
