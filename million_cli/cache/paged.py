"""The paged store: codes in pages of a pool shared by the sequences, found through one block table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.modes import plain_no_grad
from million_cli.cache.page_manager import PageManager, PageStats
from million_cli.cache.store import CodeStore, LayerState, Prefill
from million_cli.errors import UserError
from million_cli.ops.codes import CodeReader, PagedCodes
from million_cli.ops.layouts import Layout, RowLayout, TransposedLayout
from million_cli.ops.store_ops import StoreOps
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import WindowSpec


def empty_pages(like: Tensor, pages: int, *page_shape: int) -> Tensor:
    """Memory of a pool, uint8 `[pages, *page_shape]`, on the device of `like`.

    Raises:
        torch.OutOfMemoryError: the device has none left.
    """
    return like.new_empty(pages, *page_shape, dtype=torch.uint8)


class PagedStore(CodeStore):
    """Pages of P tokens.  A page id stands for the same tokens in every layer and holds all KV heads there.

    Each layer has a pool `[num_pages, Hkv, *page_shape]` for keys and one for values, in the layouts of `ops`
    or, for torch, rows and transposed; one block table `[B, width]` int32 serves all layers.  Only whole
    pages are written, each once.  Sequences share, by reference count, the pages that every layer has
    written, so reordering beams copies no codes.  A page that some layer has still to write belongs to one
    sequence: pages reserved ahead are given back when the batch is reindexed, and pages written in some
    layers only (amid a forward pass) are copied.

    Args:
        max_pages: size of the pool, fixed; an append that needs more raises `PagePoolExhausted` and changes
            nothing, so the run can continue from `to_contiguous()`.  Pools, block table and its device copies
            then keep their addresses until `reset()`.  None: the pool has room for the expected tokens, and
            grows by a thirty-second when it is full.
        others: as for `CodeStore`.

    Raises:
        UserError: max_pages is below 1.
    """

    name = "paged"

    def __init__(
        self,
        layers: Sequence[tuple[LayerPQ, LayerPQ]],
        window: WindowSpec | None = None,
        *,
        prefill: Prefill = "exact",
        encoder: str = "torch",
        max_pages: int | None = None,
        ops: StoreOps | None = None,
    ) -> None:
        if max_pages is not None and max_pages < 1:
            raise UserError(f"max_pages={max_pages}: accepted are positive integers")
        super().__init__(layers, window, prefill=prefill, encoder=encoder, ops=ops)
        self.max_pages = max_pages
        P = self.window.page_size
        self._layouts: list[tuple[Layout, Layout]] = [
            (RowLayout(spec.keys, P), TransposedLayout(spec.values, P))
            if ops is None
            else ops.layouts(spec, P)
            for spec in self.specs
        ]
        self._manager = PageManager(max_pages or 0)
        self._pools: list[tuple[Tensor, Tensor] | None] = [None] * self.num_layers
        self._pages = 0  # columns of the block table in use: pages a sequence, of the longest layer
        self._table = torch.zeros(0, 0, dtype=torch.int32)  # on the host: the truth
        self._mirrors: dict[torch.device, Tensor] = {}
        self._stale: set[torch.device] = set()

    @staticmethod
    def compiled_ops() -> StoreOps:
        from million_cli.ops.compiled_store import CompiledPaged

        return CompiledPaged()

    @property
    def page_stats(self) -> PageStats:
        return self._manager.stats

    @plain_no_grad
    def block_table(self, device: torch.device | str = "cpu") -> Tensor:
        """`[B, width]` int32 on a device; entries past a sequence's pages are 0.

        One copy a device, refreshed in place when pages were added or moved since it was last asked for.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self._table
        mirror = self._mirrors.get(device)
        if mirror is None or mirror.shape != self._table.shape:
            self._mirrors[device] = mirror = self._table.to(device)
        elif device in self._stale:
            # The copy does not wait; torch's pool of pinned memory keeps the buffer until it has run.
            mirror.copy_(
                self._table.pin_memory() if device.type == "cuda" else self._table, non_blocking=True
            )
        self._stale.discard(device)
        return mirror

    @plain_no_grad
    def to_contiguous(self, ops: StoreOps | None = None) -> ContiguousStore:
        """The same tokens in a contiguous store: same codes and windows, so the same attention.

        The layers may be at different lengths (amid a forward pass).  Afterwards this store is empty.
        """
        target = ContiguousStore(
            [(state.keys, state.values) for state in self._layers],
            self.window,
            prefill=self.prefill,
            encoder=self.encoder,
            ops=ops,
        )
        for layer, state in enumerate(self._layers):
            if state.window is None:
                continue
            coded = self.coded(layer)
            self._side_stream.wait(layer)
            target._reserve(layer, coded, state.window.keys)
            keys, values = self._readers(layer, coded)
            target._write(layer, 0, keys.read(0, coded), values.read(0, coded))
            self._pools[layer] = None  # one layer at a time is held twice
        target.batch, target._layers = self.batch, self._layers
        self._layers = [LayerState(state.keys, state.values) for state in target._layers]
        self.reset()
        return target

    def _code_tensors(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        pools = self._pools[layer]
        assert pools is not None
        return (*pools, self.block_table(pools[0].device))

    def _reserve(self, layer: int, coded: int, like: Tensor) -> None:
        B, Hkv = like.shape[:2]
        pages = coded // self.window.page_size
        missing = max(0, pages - self._pages) * B
        ids = self._allocate(missing, expected=B * self._expected // self.window.page_size)
        try:
            self._grow_pool(layer, Hkv, like)
        except RuntimeError:  # out of device memory
            self._manager.free(ids)
            raise
        if self.batch is None:
            width = self.max_pages or max(16, self._expected // self.window.page_size)
            self._table = torch.zeros(B, width, dtype=torch.int32)
        if missing:
            self._extend_table(torch.tensor(ids, dtype=torch.int32).view(B, -1))

    def _is_reserved(self, layer: int, coded: int) -> bool:
        return coded <= self._pages * self.window.page_size and not self._stale

    def _allocate(self, n: int, expected: int = 0) -> list[int]:
        """n page ids; where the pool may grow, it does, to `expected` pages at least."""
        if self.max_pages is None and n > self._manager.free_pages:
            total = len(self._manager)
            least = total + n - self._manager.free_pages
            self._manager.grow(max(least, total + max(8, total // 32), expected))
        return self._manager.allocate(n)

    def _grow_pool(self, layer: int, Hkv: int, like: Tensor) -> None:
        """Give a layer a pool with a place for every page id."""
        old, total = self._pools[layer], len(self._manager)
        if old is not None and old[0].shape[0] == total:
            return
        keys, values = (empty_pages(like, total, Hkv, *layout.page_shape) for layout in self._layouts[layer])
        if old is not None:
            n = old[0].shape[0]
            keys[:n], values[:n] = old
        self._pools[layer] = (keys, values)

    def _extend_table(self, ids: Tensor) -> None:
        """Add columns of page ids `[B, n]` to the block table."""
        B, n = ids.shape
        width = self._table.shape[1]
        if self._pages + n > width:  # doubling keeps the addresses of the device copies for long
            table = torch.zeros(B, max(2 * width, self._pages + n), dtype=torch.int32)
            table[:, : self._pages] = self._table[:, : self._pages]
            self._table = table
        self._table[:, self._pages : self._pages + n] = ids
        self._pages += n
        self._stale.update(self._mirrors)

    def _write(self, layer: int, start: int, key_codes: Tensor, value_codes: Tensor) -> None:
        pools = self._pools[layer]
        assert pools is not None
        P = self.window.page_size
        first, n = start // P, key_codes.shape[2] // P
        ids = self.block_table(key_codes.device)[:, first : first + n].flatten().long()
        for pool, layout, codes in zip(pools, self._layouts[layer], (key_codes, value_codes), strict=True):
            by_page = codes.unflatten(2, (n, P)).transpose(1, 2)  # [B, n, Hkv, P, M]
            pool.index_copy_(0, ids, layout.pack(by_page).flatten(0, 1))

    def _readers(self, layer: int, coded: int) -> tuple[CodeReader, CodeReader]:
        pools = self._pools[layer]
        assert pools is not None
        table = self.block_table(pools[0].device)
        return (
            PagedCodes(pools[0], table, self._layouts[layer][0], coded),
            PagedCodes(pools[1], table, self._layouts[layer][1], coded),
        )

    def _truncate(self) -> None:
        keep = max(self.coded(layer) for layer in range(self.num_layers)) // self.window.page_size
        if keep < self._pages:
            self._manager.free(self._table[:, keep : self._pages].flatten().tolist())
            self._table[:, keep : self._pages] = 0
            self._pages = keep
            self._stale.update(self._mirrors)

    def _take_codes(self, indices: Tensor) -> None:
        self._truncate()  # reserved ahead: to be written by one sequence each, so not to be shared
        old, new = self._table, self._table.index_select(0, indices.cpu())
        if new.shape == old.shape and torch.equal(new, old):  # beams mostly keep their order
            return
        held = new[:, : self._pages]
        common = min(self.coded(layer) for layer in range(self.num_layers)) // self.window.page_size
        again = _repeated(indices.tolist())
        copied = held[again, common:].flatten()  # written in some layers only, and claimed more than once
        ids = torch.tensor(self._copy_pages(copied), dtype=torch.int32)
        held[again, common:] = ids.view(len(again), self._pages - common)
        fresh = torch.zeros_like(held, dtype=torch.bool)
        fresh[again, common:] = True
        self._manager.share(held[~fresh].tolist())
        self._manager.free(old[:, : self._pages].flatten().tolist())
        if new.shape == old.shape:
            old.copy_(new)
        else:
            self._table = new
        self._stale.update(self._mirrors)

    def _copy_pages(self, pages: Tensor) -> list[int]:
        """New pages with the codes of `pages` in every layer.

        Raises:
            PagePoolExhausted: nothing has changed.
        """
        ids = self._allocate(len(pages))
        if not ids:
            return ids
        try:
            for layer, pools in enumerate(self._pools):
                if pools is not None:
                    self._grow_pool(layer, pools[0].shape[1], pools[0])
        except RuntimeError:  # out of device memory
            self._manager.free(ids)
            raise
        for pools in self._pools:
            for pool in pools or ():
                target, source = (torch.tensor(x, device=pool.device) for x in (ids, pages.tolist()))
                pool.index_copy_(0, target, pool.index_select(0, source))
        return ids

    def _release(self) -> None:
        self._table = torch.zeros(0, 0, dtype=torch.int32)
        self._mirrors, self._stale = {}, set()
        self._pools = [None] * self.num_layers

    def _code_bytes(self) -> dict[str, int]:
        in_use = self._manager.stats.in_use
        used, reserved = [0, 0], 0
        for pools in self._pools:
            for side, pool in enumerate(pools or ()):
                filled = in_use * pool[:1].nbytes
                used[side] += filled
                reserved += pool.nbytes - filled
        tables = [self._table, *self._mirrors.values()]
        return {
            "key_codes": used[0],
            "value_codes": used[1],
            "block_table": sum(table.nbytes for table in tables),
            "pool_reserved": reserved,
        }


def _repeated(indices: list[int]) -> list[int]:
    """Places of the values that occurred before: [1, 0, 1, 1] -> [2, 3]."""
    return [place for place, value in enumerate(indices) if value in indices[:place]]
