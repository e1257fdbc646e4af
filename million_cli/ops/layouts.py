"""Physical layouts of codes: the one place that knows which byte holds which code.

A page is P tokens of one KV head.  Every layout packs its codes `[P, M]` into uint8 of a fixed `page_shape`
and back; leading dimensions (pages, batch, heads) pass through.  Codes of nbits are packed without gaps in
little-endian bit order, so the bytes counted are the bytes held.

Letters: P page size, M subspaces, nbits bits a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from million_cli.pq.packing import pack_bits, unpack_bits
from million_cli.spec import CodeSpec


class Layout(Protocol):
    """The interface of a layout to stores and readers; an instance is fixed to one spec and page size."""

    @property
    def spec(self) -> CodeSpec: ...

    @property
    def page_size(self) -> int: ...

    @property
    def page_shape(self) -> tuple[int, ...]:
        """Shape of the uint8 block that holds one head's page."""
        ...

    @property
    def page_bytes(self) -> int:
        """Bytes of one head's page."""
        ...

    def pack(self, codes: Tensor) -> Tensor:
        """Codes `[..., P, M]` (uint8 or uint16) -> uint8 `[..., *page_shape]`."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`: uint8 `[..., *page_shape]` -> codes `[..., P, M]`."""
        ...


@dataclass(frozen=True)
class RowLayout:
    """Tokens by rows: `[P, row_bytes]`, one token's M codes side by side, rows byte-aligned.

    `pack` and `unpack` take any number of rows: a contiguous run of tokens is this layout without pages.
    """

    spec: CodeSpec
    page_size: int

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.page_size, self.spec.row_bytes)

    @property
    def page_bytes(self) -> int:
        return prod(self.page_shape)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_bits(codes, self.spec.nbits)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_bits(packed, self.spec.M, self.spec.nbits)


@dataclass(frozen=True)
class TransposedLayout:
    """Subspaces by rows: `[M, P * nbits / 8]`, one subspace's codes of all the page's tokens side by side.

    P is a multiple of 16 (see `WindowSpec`), so every row is a whole number of bytes.
    """

    spec: CodeSpec
    page_size: int

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.spec.M, self.page_size * self.spec.nbits // 8)

    @property
    def page_bytes(self) -> int:
        return prod(self.page_shape)

    def pack(self, codes: Tensor) -> Tensor:
        assert codes.shape[-2] == self.page_size
        return pack_bits(codes.transpose(-1, -2).contiguous(), self.spec.nbits)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_bits(packed, self.page_size, self.spec.nbits).transpose(-1, -2)
