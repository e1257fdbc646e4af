"""The operations of a paged cache by the compiled kernels, codes in fragment order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.ops import compiled
from million_cli.ops.compiled import CodeLayout, DecodePlan
from million_cli.ops.fragment import FragmentLayout
from million_cli.ops.layouts import Layout
from million_cli.ops.pages import LayerPages
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import PQSpec


@dataclass(frozen=True)
class _Tables:
    """A quantizer in the forms that the kernels read.

    centroids: float32 [Hc, M, 256, dsub], to encode; by_code: float16 [Hc, 256, D], to decode;
    rotation: float32 [Hr, D, D] or None.
    """

    centroids: Tensor
    by_code: Tensor
    rotation: Tensor | None

    @classmethod
    def of(cls, pq: LayerPQ) -> _Tables:
        rotation = None if pq.rotation is None else pq.rotation.to(torch.float32).contiguous()
        centroids = pq.centroids.to(torch.float32).contiguous()
        return cls(centroids, compiled.code_major(centroids), rotation)


class CompiledPages:
    """`PageOps` of one cache.

    Tables are made once a quantizer, launch plans with their workspace once a shape and device; a step
    allocates nothing but its output and never waits for the device.
    """

    def __init__(self) -> None:
        self._tables: dict[LayerPQ, _Tables] = {}
        self._plans: dict[tuple[int, int, int, int, torch.device], DecodePlan] = {}

    def layouts(self, spec: PQSpec, page_size: int) -> tuple[Layout, Layout]:
        return (
            FragmentLayout(spec.keys, page_size, "keys"),
            FragmentLayout(spec.values, page_size, "values"),
        )

    def encode(self, layer: LayerPages, keys: Tensor, values: Tensor, start: int) -> None:
        for x, pq, pool, layout in (
            (keys, layer.pq_keys, layer.key_pool, CodeLayout.FRAGMENT_KEYS),
            (values, layer.pq_values, layer.value_pool, CodeLayout.FRAGMENT_VALUES),
        ):
            tables = self._tables_of(pq)
            compiled.pq_encode(
                x,
                tables.centroids,
                tables.rotation,
                pool,
                layer.block_table,
                start=start,
                page_size=layer.page_size,
                layout=layout,
            )

    def append(self, layer: LayerPages, keys: Tensor, values: Tensor) -> None:
        of_keys, of_values = self._tables_of(layer.pq_keys), self._tables_of(layer.pq_values)
        compiled.append(
            keys,
            values,
            layer.lengths,
            layer.key_window,
            layer.value_window,
            layer.key_pool,
            layer.value_pool,
            layer.block_table,
            of_keys.centroids,
            of_values.centroids,
            of_keys.rotation,
            of_values.rotation,
            page_size=layer.page_size,
        )

    def attend(self, query: Tensor, layer: LayerPages, *, scale: float, first_valid: Tensor | None) -> Tensor:
        of_keys, of_values = self._tables_of(layer.pq_keys), self._tables_of(layer.pq_values)
        return compiled.paged_decode(
            query.contiguous(),
            layer.key_pool,
            layer.value_pool,
            layer.block_table,
            layer.lengths,
            first_valid,
            of_keys.by_code,
            of_values.by_code,
            of_keys.rotation,
            of_values.rotation,
            layer.key_window,
            layer.value_window,
            self._plan(query, layer),
            scale=scale,
            page_size=layer.page_size,
        )

    def _tables_of(self, pq: LayerPQ) -> _Tables:
        tables = self._tables.get(pq)
        if tables is None:
            tables = self._tables[pq] = _Tables.of(pq)
        return tables

    def _plan(self, query: Tensor, layer: LayerPages) -> DecodePlan:
        B, Hq, D = query.shape
        key = (B, Hq, layer.key_window.shape[1], D, query.device)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = DecodePlan.make(*key)
        return plan
