"""The operations of stores by the compiled kernels: pages in fragment order, contiguous codes in rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.ops import compiled
from million_cli.ops.compiled import CodeLayout, DecodePlan, LookupPlan
from million_cli.ops.fragment import FragmentLayout
from million_cli.ops.layouts import Layout, RowLayout
from million_cli.ops.store_ops import DeviceLayer
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import PQSpec


@dataclass(frozen=True)
class _Tables:
    """A quantizer in the forms that the kernels read.

    centroids: float32 [Hc, M, 256, dsub], to encode; by_code: float16 [Hc, 256, D], to decode;
    on_vectors, on_queries: float32 [Ht, D, D] or None, which the kernels call a rotation: R of x R when they
    encode, and R of q R and o R^T when they attend, the inverse transpose of the former (see `pq.transform`).
    """

    centroids: Tensor
    by_code: Tensor
    on_vectors: Tensor | None
    on_queries: Tensor | None

    @classmethod
    def of(cls, pq: LayerPQ) -> _Tables:
        centroids = pq.centroids.to(torch.float32).contiguous()
        tables = centroids, compiled.code_major(centroids)
        if pq.transform is None:
            return cls(*tables, None, None)
        maps = pq.transform.encode, pq.transform.decode.mT
        return cls(*tables, *(one.to(torch.float32).contiguous() for one in maps))


class _Compiled(ABC):
    """What both stores share.  An instance belongs to one cache.

    Tables are made once a quantizer, launch plans with their workspace once a shape and device; a step
    allocates nothing but its output and never waits for the device.
    """

    code_layouts: tuple[CodeLayout, CodeLayout]

    def __init__(self) -> None:
        self._tables: dict[LayerPQ, _Tables] = {}

    @abstractmethod
    def layouts(self, spec: PQSpec, page_size: int) -> tuple[Layout, Layout]: ...

    @abstractmethod
    def attend(
        self, query: Tensor, layer: DeviceLayer, *, scale: float, first_valid: Tensor | None
    ) -> Tensor: ...

    def encode(self, layer: DeviceLayer, keys: Tensor, values: Tensor, start: int) -> None:
        for x, pq, codes, layout in zip(
            (keys, values),
            (layer.pq_keys, layer.pq_values),
            (layer.key_codes, layer.value_codes),
            self.code_layouts,
            strict=True,
        ):
            tables = self._tables_of(pq)
            compiled.pq_encode(
                x,
                tables.centroids,
                tables.on_vectors,
                codes,
                layer.block_table,
                start=start,
                page_size=layer.page_size,
                layout=layout,
            )

    def append(self, layer: DeviceLayer, keys: Tensor, values: Tensor) -> None:
        of_keys, of_values = self._tables_of(layer.pq_keys), self._tables_of(layer.pq_values)
        compiled.append(
            keys,
            values,
            layer.lengths,
            layer.key_window,
            layer.value_window,
            layer.key_codes,
            layer.value_codes,
            layer.block_table,
            of_keys.centroids,
            of_values.centroids,
            of_keys.on_vectors,
            of_values.on_vectors,
            page_size=layer.page_size,
            key_layout=self.code_layouts[0],
            value_layout=self.code_layouts[1],
        )

    def _tables_of(self, pq: LayerPQ) -> _Tables:
        tables = self._tables.get(pq)
        if tables is None:
            tables = self._tables[pq] = _Tables.of(pq)
        return tables


class CompiledPaged(_Compiled):
    """`StoreOps` of a paged store: codes in the order in which the decode kernel's lanes read them."""

    code_layouts = (CodeLayout.FRAGMENT_KEYS, CodeLayout.FRAGMENT_VALUES)

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[tuple[int, int, int, int, torch.device], DecodePlan] = {}

    def layouts(self, spec: PQSpec, page_size: int) -> tuple[Layout, Layout]:
        return (
            FragmentLayout(spec.keys, page_size, "keys"),
            FragmentLayout(spec.values, page_size, "values"),
        )

    def attend(
        self, query: Tensor, layer: DeviceLayer, *, scale: float, first_valid: Tensor | None
    ) -> Tensor:
        assert layer.block_table is not None
        of_keys, of_values = self._tables_of(layer.pq_keys), self._tables_of(layer.pq_values)
        B, Hq, D = query.shape
        shape = (B, Hq, layer.key_window.shape[1], D, query.device)
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = DecodePlan.make(*shape)
        return compiled.paged_decode(
            query.contiguous(),
            layer.key_codes,
            layer.value_codes,
            layer.block_table,
            layer.lengths,
            first_valid,
            of_keys.by_code,
            of_values.by_code,
            of_keys.on_queries,
            of_values.on_queries,
            layer.key_window,
            layer.value_window,
            plan,
            scale=scale,
            page_size=layer.page_size,
        )


class CompiledContiguous(_Compiled):
    """`StoreOps` of a contiguous store: codes in rows, scores by a lookup table."""

    code_layouts = (CodeLayout.ROW, CodeLayout.ROW)

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[tuple[int, int, int, torch.device], LookupPlan] = {}

    def layouts(self, spec: PQSpec, page_size: int) -> tuple[Layout, Layout]:
        return RowLayout(spec.keys, page_size), RowLayout(spec.values, page_size)

    def attend(
        self, query: Tensor, layer: DeviceLayer, *, scale: float, first_valid: Tensor | None
    ) -> Tensor:
        of_keys, of_values = self._tables_of(layer.pq_keys), self._tables_of(layer.pq_values)
        shape = (*query.shape, query.device)
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = LookupPlan.make(*shape)
        return compiled.contiguous_decode(
            query.contiguous(),
            layer.key_codes,
            layer.value_codes,
            layer.lengths,
            first_valid,
            of_keys.by_code,
            of_values.by_code,
            of_keys.on_queries,
            of_values.on_queries,
            layer.key_window,
            layer.value_window,
            plan,
            scale=scale,
            page_size=layer.page_size,
        )
