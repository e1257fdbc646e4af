"""When compiled operations serve a cache: each reason why not; the library comes in only where they do."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from million_cli.ops import compiled, support
from million_cli.ops.build import KernelsUnavailable
from million_cli.ops.fragment import DSUBS
from million_cli.ops.support import KernelQuery
from million_cli.spec import CodeSpec, PQSpec, WindowSpec

GPU = torch.device("cuda", 0)


def spec(D: int, MK: int, MV: int, nbits: int = 8) -> PQSpec:
    return PQSpec(CodeSpec(D, MK, nbits), CodeSpec(D, MV, nbits))


QUERY = KernelQuery("paged", GPU, torch.float16, (spec(128, 64, 64),), WindowSpec(), 8, 4)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A machine with one H100, whose library loads; the loads."""
    calls: list[None] = []
    monkeypatch.setattr(support, "device_architectures", lambda: (90,))
    monkeypatch.setattr(compiled, "load", lambda: calls.append(None))
    return calls


def test_every_supported_case(loads: list[None]) -> None:
    cases = product((64, 128), DSUBS, DSUBS, (torch.float16, torch.bfloat16), (1, 8, 16), (16, 256))
    for D, key_dims, value_dims, dtype, group, P in cases:
        codes = spec(D, D // key_dims, D // value_dims)
        query = replace(QUERY, specs=(codes, codes), dtype=dtype, group=group, window=WindowSpec(P, 2 * P))
        assert support.support(query) is None
        assert support.support(replace(query, store="contiguous")) is None
    assert len(loads) == 2 * (2 * 4 * 4 * 2 * 3 * 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "no compiled kernels for device cpu"),
        ({"device": torch.device("mps")}, "no compiled kernels for device mps"),
        ({"softcap": True}, "softcapped"),
        ({"sinks": True}, "attention sinks"),
        ({"dtype": torch.float32}, "dtype=float32"),
        ({"specs": (spec(96, 48, 48),)}, "head_dim=96"),
        ({"specs": (spec(128, 64, 64), spec(128, 64, 8))}, "M=8"),
        ({"specs": (spec(128, 64, 64, 6),)}, "nbits=6"),
        ({"group": 17}, "17 query heads"),
    ],
)
def test_reasons(change: dict[str, Any], reason: str, loads: list[None]) -> None:
    answer = support.support(replace(QUERY, **change))
    assert answer is not None
    assert reason in answer
    assert not loads


def test_the_weakest_gpu_decides(loads: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "device_architectures", lambda: (89, 90))
    assert "compute capability 89" in str(support.support(QUERY))
    assert support.support(replace(QUERY, specs=(spec(64, 32, 32),))) is None
    assert support.support(replace(QUERY, store="contiguous")) is None, "it needs less shared memory"
    fine = replace(QUERY, store="contiguous", specs=(spec(128, 64, 64), spec(128, 128, 64)))
    assert "M=128 of keys need 131" in str(support.support(fine))


def test_kernels_that_are_not_to_be_had(loads: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise KernelsUnavailable("nvcc failed with 1:\nmany\nlines")

    monkeypatch.setattr(compiled, "load", fail)
    assert support.support(QUERY) == "nvcc failed with 1"
    monkeypatch.setattr(support, "device_architectures", fail)
    assert support.support(QUERY) == "nvcc failed with 1"
