"""`StoreOps` in torch, by the definitions: it reads and writes what a kernel would, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from million_cli.ops.codes import CodeReader, ContiguousCodes, PagedCodes
from million_cli.ops.fragment import FragmentLayout, fragment_reason
from million_cli.ops.layouts import Layout, RowLayout, TransposedLayout
from million_cli.ops.reference import attention
from million_cli.ops.store_ops import DeviceLayer
from million_cli.ops.support import Store
from million_cli.pq.codec import encode
from million_cli.spec import PQSpec, WindowSpec


class TorchOps:
    """Pages in fragment order where codes have one, else in the layout that torch uses for the other side.

    Args:
        store: the kind of store; contiguous codes are rows.
        good: calls, of all operations together, that succeed; the next one raises as a kernel would.
    """

    def __init__(self, store: Store = "paged", good: int | None = None) -> None:
        self.store = store
        self.good, self.calls = good, Counter[str]()
        self.first_valid: list[Tensor | None] = []  # of each `attend`

    def _count(self, name: str) -> None:
        self.calls[name] += 1
        if self.good is not None and self.calls.total() > self.good:
            raise RuntimeError("illegal instruction\nsecond line")

    def layouts(self, spec: PQSpec, page_size: int) -> tuple[Layout, Layout]:
        if self.store == "contiguous":
            return RowLayout(spec.keys, page_size), RowLayout(spec.values, page_size)
        if fragment_reason(spec.keys) is None and fragment_reason(spec.values) is None:
            return (
                FragmentLayout(spec.keys, page_size, "keys"),
                FragmentLayout(spec.values, page_size, "values"),
            )
        return TransposedLayout(spec.keys, page_size), RowLayout(spec.values, page_size)

    def encode(self, layer: DeviceLayer, keys: Tensor, values: Tensor, start: int) -> None:
        self._count("encode")
        self._encode(layer, keys, values, start)

    def append(self, layer: DeviceLayer, keys: Tensor, values: Tensor) -> None:
        self._count("append")
        window, length = self._window(layer)
        slot = (length - 1) % window.residual
        layer.key_window[:, :, slot], layer.value_window[:, :, slot] = keys, values
        stop, P = window.coded_length(length), window.page_size
        if stop > window.coded_length(length - 1):
            self._check_key_map(layer, stop - P)
            slots = torch.arange(stop - P, stop) % window.residual
            self._encode(layer, layer.key_window[:, :, slots], layer.value_window[:, :, slots], stop - P)

    def attend(
        self, query: Tensor, layer: DeviceLayer, *, scale: float, first_valid: Tensor | None
    ) -> Tensor:
        self._count("attend")
        self.first_valid.append(first_valid)
        window, length = self._window(layer)
        coded = window.coded_length(length)
        slots = torch.arange(coded, length) % window.residual
        readers: list[CodeReader] = []
        for codes, layout in zip(self._codes(layer), self._layouts_of(layer), strict=True):
            if layer.block_table is None:
                readers.append(ContiguousCodes(codes, layout, coded))
            else:
                readers.append(PagedCodes(codes, layer.block_table, layout, coded))
        output = attention(
            query[:, :, None],
            *readers,
            layer.pq_keys,
            layer.pq_values,
            layer.key_window[:, :, slots],
            layer.value_window[:, :, slots],
            boundaries=(coded,),
            scale=scale,
            first_valid=first_valid,
        )
        return output[:, :, 0]

    def _check_key_map(self, layer: DeviceLayer, start: int) -> None:
        """A kernel maps the keys of the page at `start` by the one matrix it is given."""
        pq = layer.pq_keys
        if pq.rebase is None:
            return
        assert layer.key_map is not None
        expected = pq.rebase.matrix(start // pq.rebase.every, pq.spec.head_dim)[None]
        if pq.transform is not None:
            expected = expected @ pq.transform.encode
        torch.testing.assert_close(layer.key_map, expected)

    def _window(self, layer: DeviceLayer) -> tuple[WindowSpec, int]:
        (length,) = set(layer.lengths.tolist())
        return WindowSpec(layer.page_size, layer.key_window.shape[2]), length

    def _codes(self, layer: DeviceLayer) -> tuple[Tensor, Tensor]:
        return layer.key_codes, layer.value_codes

    def _layouts_of(self, layer: DeviceLayer) -> tuple[Layout, Layout]:
        return self.layouts(PQSpec(layer.pq_keys.spec, layer.pq_values.spec), layer.page_size)

    def _encode(self, layer: DeviceLayer, keys: Tensor, values: Tensor, start: int) -> None:
        P = layer.page_size
        if layer.pq_keys.rebase is not None:
            keys = layer.pq_keys.rebase.relative(keys, start)
        for x, pq, stored, layout in zip(
            (keys, values),
            (layer.pq_keys, layer.pq_values),
            self._codes(layer),
            self._layouts_of(layer),
            strict=True,
        ):
            codes = encode(x, replace(pq, rebase=None))
            if layer.block_table is None:
                stored[:, :, start : start + x.shape[2]] = layout.pack(codes)
                continue
            pages = layout.pack(codes.unflatten(2, (-1, P)))  # [B, Hkv, n, *page_shape]
            for i in range(pages.shape[2]):
                stored[layer.block_table[:, start // P + i].long()] = pages[:, :, i]
