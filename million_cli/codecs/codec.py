"""The interface of a codec: whole pages as they come back from storage, and their bits.

A codec is a class with a dataclass `Config`, its settings (`quantizer.codec` of a configuration; unknown keys
and wrong types are refused), made by `Codec(config, shape, seed)`.

Letters: B batch, Hkv KV heads, n pages, P page size, D head_dim, L layers with full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.samples import LayerSamples


@dataclass(frozen=True)
class Shape:
    """The shape of the vectors that a codec gets.

    Attributes:
        head_dim: D; page_size: P, tokens that are quantised together.
        num_kv_heads: Hkv; num_layers: L.
    """

    head_dim: int
    page_size: int
    num_kv_heads: int = 1
    num_layers: int = 1


@dataclass
class NoSettings:
    """`Config` of a codec without settings."""


@dataclass
class Groups:
    """Settings of codecs with groups.

    Attributes:
        nbits: of a code, 1 to 8.
        group: elements that share a scale and a zero point.

    Raises:
        UserError: out of range.
    """

    nbits: int = 4
    group: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.nbits <= 8:
            raise UserError(f"quantizer.codec.nbits={self.nbits}: accepted are 1 to 8")
        if self.group < 2:
            raise UserError(f"quantizer.codec.group={self.group}: accepted are integers from 2")


class Codec(Protocol):
    """A way to store K and V.

    bits: bits of a stored element, mean of keys and values; scales and the like included.

    A codec with an attribute `rebase` (a `pq.rebase.Rebase`) gets keys relative to the origin of their block,
    and its result is brought back.  With blocks of one token these are keys before RoPE.
    """

    @property
    def bits(self) -> float: ...

    def keys(self, pages: Tensor) -> Tensor:
        """Keys `[B, Hkv, n, P, D]`, after RoPE, as they come back from storage, in the same dtype."""
        ...

    def values(self, pages: Tensor) -> Tensor:
        """Values, likewise."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A codec that learns from samples before it is used."""

    def calibrate(self, keys: LayerSamples, values: LayerSamples) -> Sequence[Codec]:
        """The codec of each of the L layers, from the vectors `[Hkv, N, D]` that codebooks are trained on."""
        ...
