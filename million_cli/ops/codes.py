"""Readers: stored codes as plain tensors plus the layout that explains them.

A reader is what attention receives in place of a dense K or V.  The torch reference asks it for spans of
codes; a compiled op takes its raw tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from million_cli.ops.layouts import Layout


class CodeReader(Protocol):
    """Codes of the tokens 0 .. length - 1 of every sequence and KV head of one layer, one side."""

    @property
    def length(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Codes `[B, Hkv, stop - start, M]` of the tokens start .. stop - 1, uint8 or uint16."""
        ...


@dataclass(frozen=True)
class ContiguousCodes:
    """Codes in rows of one buffer `packed [B, Hkv, capacity, row_bytes]` uint8, the first `length` filled."""

    packed: Tensor
    layout: Layout
    length: int

    def read(self, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= self.length
        return self.layout.unpack(self.packed[:, :, start:stop])


@dataclass(frozen=True)
class PagedCodes:
    """Codes in pages of a pool.

    Attributes:
        pool: `[num_pages, Hkv, *layout.page_shape]` uint8.
        block_table: `[B, max_pages]` int32 on the pool's device; entry [b, i] is the id of the page that
            holds the tokens i * P .. (i + 1) * P - 1 of sequence b.  Entries past `length` are not read.
        length: tokens readable in each sequence.
    """

    pool: Tensor
    block_table: Tensor
    layout: Layout
    length: int

    def read(self, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= self.length
        P = self.layout.page_size
        first, last = start // P, -(-stop // P)
        ids = self.block_table[:, first:last]
        pages = self.pool.index_select(0, ids.reshape(-1)).unflatten(0, ids.shape)  # [B, n, Hkv, *page_shape]
        codes = self.layout.unpack(pages).transpose(1, 2).flatten(2, 3)  # [B, Hkv, n * P, M]
        return codes[:, :, start - first * P : stop - first * P]
