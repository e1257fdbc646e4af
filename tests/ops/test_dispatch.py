"""The table of supported shapes: its answers, and that it is what the CUDA sources instantiate."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from million_cli.errors import UserError
from million_cli.ops import dispatch
from million_cli.ops.build import source_folder
from million_cli.ops.dispatch import DecodeQuery, decode_reason
from million_cli.ops.fragment import DSUBS
from million_cli.ops.heuristics import heads_per_block
from million_cli.spec import CodeSpec, PQSpec, WindowSpec


def spec(D: int, MK: int, MV: int, nbits: int = 8) -> PQSpec:
    return PQSpec(CodeSpec(D, MK, nbits), CodeSpec(D, MV, nbits))


QUERY = DecodeQuery(90, torch.float16, spec(128, 64, 64), WindowSpec(), 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "spec": spec(64, 32, 16), "group": 16}, None),
        ({"dtype": torch.float32}, "dtype=float32, supported are float16, bfloat16"),
        ({"spec": spec(96, 48, 48)}, "head_dim=96, supported are 64, 128"),
        ({"spec": spec(128, 128, 16)}, None),
        ({"spec": spec(64, 8, 64), "store": "contiguous"}, None),
        ({"spec": spec(128, 64, 8)}, "M=8, supported for head_dim=128 are 128, 64, 32, 16"),
        ({"spec": spec(128, 64, 64, 6)}, "nbits=6, supported is 8"),
        ({"group": 17}, "17 query heads for each key/value head, supported are 1 to 16"),
        ({"arch": 75}, "compute capability 75, supported are 80, 86, 87, 89, 90, 100, 103, 120, 121"),
        (
            {"arch": 89},
            "compute capability 89 gives a block 99 KiB of shared memory, "
            "the tables of head_dim=128 need 163",
        ),
        ({"arch": 89, "spec": spec(64, 64, 8)}, None),
        ({"arch": 89, "spec": spec(128, 64, 128), "store": "contiguous"}, None),
        (
            {"arch": 89, "spec": spec(128, 128, 64), "store": "contiguous"},
            "compute capability 89 gives a block 99 KiB of shared memory, "
            "the tables of head_dim=128 with M=128 of keys need 131",
        ),
    ],
)
def test_reasons(change: dict[str, object], reason: str | None) -> None:
    assert decode_reason(replace(QUERY, **change)) == reason  # type: ignore[arg-type]


def test_require_raises_with_the_reason() -> None:
    dispatch.require(QUERY)
    with pytest.raises(UserError, match="no compiled decode: head_dim=32, supported are 64, 128"):
        dispatch.require(replace(QUERY, spec=spec(32, 16, 16)))


def test_the_table_is_what_is_instantiated() -> None:
    found = set()
    for path in (source_folder() / "instances").glob("*.cu"):
        for shape in re.findall(
            r"MILLION_INSTANTIATE_DECODE\((\d+), (\d+), (\d+), (\d+)\)", path.read_text()
        ):
            assert shape not in found
            found.add(shape)
    groups = range(1, dispatch.MAX_GROUP + 1)
    expected = {
        tuple(map(str, (D, D // k, D // v, heads_per_block(group))))
        for D, k, v, group in product(dispatch.HEAD_DIMS, DSUBS, DSUBS, groups)
    }
    assert found == expected
