"""Which maps the kernels get: they know one matrix for vectors and one for queries and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from million_cli.ops import compiled
from million_cli.ops.compiled import DecodePlan, LookupPlan
from million_cli.ops.compiled_store import CompiledContiguous, CompiledPaged
from million_cli.ops.store_ops import DeviceLayer
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.transform import Transform
from million_cli.spec import CodeSpec

D, H, P, R = 64, 2, 64, 128
SPEC = CodeSpec(D, 32, 8)


def side(seed: int, mapped: bool) -> LayerPQ:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.eye(D) + 0.1 * torch.randn(H, D, D, generator=generator)
    transform = Transform.invertible(maps) if mapped else None
    return LayerPQ(SPEC, torch.randn(H, 32, 256, 2, generator=generator), transform)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("store", [CompiledPaged, CompiledContiguous])
def test_vectors_and_queries_get_inverse_maps(
    store: Any, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, list[tuple[Any, ...]]] = {}
    for name in ("pq_encode", "append", "paged_decode", "contiguous_decode"):
        monkeypatch.setattr(compiled, name, lambda *a, _n=name, **k: calls.setdefault(_n, []).append(a))
    monkeypatch.setattr(DecodePlan, "make", lambda *shape: None)
    monkeypatch.setattr(LookupPlan, "make", lambda *shape: None)
    keys, values = side(0, mapped), side(1, mapped)
    codes, window = torch.zeros(1, H, 1, 8, dtype=torch.uint8), torch.zeros(1, H, R, D)
    table = torch.zeros(1, 1, dtype=torch.int32)
    layer = DeviceLayer(keys, values, codes, codes, table, window, window, torch.ones(1), P)
    ops = store()
    x = torch.zeros(1, H, P, D)
    ops.encode(layer, x, x, 0)
    ops.append(layer, x[:, :, 0], x[:, :, 0])
    ops.attend(torch.zeros(1, 2 * H, D), layer, scale=1.0, first_valid=None)

    on_vectors = [call[2] for call in calls["pq_encode"]]
    on_append = list(calls["append"][0][10:12])
    (attend,) = calls.get("paged_decode") or calls["contiguous_decode"]
    on_queries = [a for a in attend if isinstance(a, torch.Tensor) and a.shape == (H, D, D)]
    if not mapped:
        assert on_vectors == on_append == [None, None]
        assert on_queries == []
        return
    for sides in (on_vectors, on_append):
        for passed, pq in zip(sides, (keys, values), strict=True):
            assert torch.equal(passed, pq.transform.encode)  # type: ignore[union-attr]
    for vectors, queries in zip(on_vectors, on_queries, strict=True):
        assert queries.is_contiguous()
        q, x = torch.randn(2, H, 5, D)
        torch.testing.assert_close((q @ queries) @ (x @ vectors).mT, q @ x.mT, atol=1e-3, rtol=0)
        torch.testing.assert_close((x @ vectors) @ queries.mT, x, atol=1e-4, rtol=0)
