"""Launch choices: worked examples, and properties over all shapes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.ops.build import source_folder
from million_cli.ops.heuristics import (
    GRID_BYTES,
    MIN_FILL,
    SORTED_BYTES,
    decode_blocks,
    encode_workspace_bytes,
    head_sets,
    heads_per_block,
    lookup_splits,
    lookup_workspace_bytes,
    workspace_bytes,
)


@pytest.mark.parametrize(
    ("group", "heads", "sets"),
    [(1, 1, 1), (2, 4, 1), (4, 4, 1), (5, 8, 1), (8, 8, 1), (9, 8, 2), (16, 8, 2)],
)
def test_heads(group: int, heads: int, sets: int) -> None:
    assert heads_per_block(group) == heads
    assert head_sets(group, heads) == sets


@pytest.mark.parametrize(
    ("sets", "blocks"),
    [(1, 132), (3, 132), (8, 128), (32, 128), (64, 128), (128, 128), (256, 128), (131, 131)],
)
def test_blocks_of_an_h200(sets: int, blocks: int) -> None:
    assert decode_blocks(sets, 132) == blocks


@given(st.integers(1, 5000), st.integers(1, 300))
def test_blocks_fill_the_device(sets: int, multiprocessors: int) -> None:
    blocks = decode_blocks(sets, multiprocessors)
    assert MIN_FILL * multiprocessors <= blocks <= multiprocessors
    if blocks < multiprocessors:
        assert blocks % sets == 0 or sets % blocks == 0


def test_workspace() -> None:
    # 32 spans in 256 bytes, 160 partial results of one head: 128 + 128 sums, a maximum and a denominator.
    assert workspace_bytes(sets=32, heads=1, head_dim=128, blocks=128) == 256 + 160 * 258 * 4


def test_lookup_table_kernel() -> None:
    assert [lookup_splits(rows, 132) for rows in (1, 32, 264, 1024)] == [264, 8, 1, 1]
    assert lookup_workspace_bytes(32, 128, 8) == 256 + 32 * 8 * 260 * 4


@pytest.mark.parametrize(
    ("points", "subspaces", "dsub", "expected"),
    [
        (32768, 32 * 64, 2, 32 * 64 * (8192 + 16)),
        (2048, 64, 2, 64 * (8192 + 16)),
        (2047, 64, 2, 0),
        (64, 2048, 2, 0),
        (32768, 32 * 128, 1, 32 * 128 * 1280),
        (512, 128, 1, 128 * 1280),
        (511, 128, 1, 0),
        (1 << 20, 2048, 4, 0),
        (1 << 20, 2048, 8, 0),
    ],
)
def test_tables_are_made_where_they_pay(points: int, subspaces: int, dsub: int, expected: int) -> None:
    assert encode_workspace_bytes(points, subspaces, dsub) == expected


def test_the_grid_is_as_large_as_the_kernels_say() -> None:
    text = (source_folder() / "encode_grid_shape.h").read_text()
    side = int(re.search(r"kSide = (\d+)", text)[1])
    listed = int(re.search(r"kListed = (\d+)", text)[1])
    assert 16 + side * side * listed == GRID_BYTES


def test_sorted_centroids_are_as_large_as_the_kernels_say() -> None:
    text = (source_folder() / "encode_params.h").read_text()
    assert 256 * int(re.search(r"kSortedBytes = kCentroids \* (\d+);", text)[1]) == SORTED_BYTES
