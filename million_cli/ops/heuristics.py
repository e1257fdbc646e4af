"""Launch choices as pure functions, so that a test can say what is launched for a shape."""

from __future__ import annotations

GRID_BYTES = 16 + 32 * 32 * 8
"""Of the grid that a subspace of two dims is searched through; agrees with kernels/encode_grid_shape.h."""

MIN_GRID_POINTS = 2048
"""Points a subspace from which building its grid takes less time than it saves."""

SORTED_BYTES = 256 * 5
"""Of the sorted centroids of a subspace of one dim; agrees with kernels/encode_params.h."""

MIN_SORTED_POINTS = 512
"""Points a subspace from which sorting its centroids takes less time than it saves."""

MIN_FILL = 0.9
"""Share of the multiprocessors that must stay busy for spans to be aligned with heads."""


def heads_per_block(group: int) -> int:
    """Query heads that share a block's lookups: 1 without GQA, 4, or 8 from groups of 5 on.

    Larger groups take several blocks.  Example: G=8 -> 8; G=3 -> 4.
    """
    assert group >= 1
    if group == 1:
        return 1
    return 8 if group > 4 else 4


def head_sets(group: int, heads: int) -> int:
    """Blocks' worth of query heads of one KV head.

    Example: G=8, 4 heads a block -> 2; G=6 -> 2; G=1 -> 1.
    """
    return -(-group // heads)


def decode_blocks(sets: int, multiprocessors: int) -> int:
    """Blocks of a decode launch, one a multiprocessor at most, for `sets` = B * Hkv * head_sets.

    A block loads one head's tables; where its span crosses into another head it loads again.  So blocks are a
    multiple or a divisor of the sets if that leaves at most a tenth of the multiprocessors idle.

    Example, 132 multiprocessors: 32 sets -> 128 (four blocks a set); 3 -> 132; 256 -> 128 (two sets each).
    """
    assert sets >= 1
    assert multiprocessors >= 1
    aligned = [n for n in range(multiprocessors, 0, -1) if n % sets == 0 or sets % n == 0]
    best = aligned[0] if aligned else 0
    return best if best >= MIN_FILL * multiprocessors else multiprocessors


def workspace_bytes(sets: int, heads: int, head_dim: int, blocks: int) -> int:
    """Bytes that a decode launch needs: the spans of the sets and partial results.

    Must agree with the check in kernels/binding.cu.
    """
    spans = -(-sets * 8 // 256) * 256
    return spans + (blocks + sets) * heads * (2 * head_dim + 2) * 4


def lookup_splits(rows: int, multiprocessors: int) -> int:
    """Spans of tokens a query head for `rows` = B * Hq: two blocks of the lookup kernel a multiprocessor.

    Example: 32 heads on 132 multiprocessors -> 8 (256 blocks); 1024 rows -> 1.
    """
    assert rows >= 1
    return max(1, 2 * multiprocessors // rows)


def lookup_workspace_bytes(rows: int, head_dim: int, splits: int) -> int:
    """Bytes that a launch of the lookup-table kernel needs; must agree with kernels/binding.cu."""
    return -(-rows * 4 // 256) * 256 + rows * splits * (2 * head_dim + 4) * 4


def encode_workspace_bytes(points: int, subspaces: int, dsub: int) -> int:
    """Bytes that an encoding of `points` points in each of `subspaces` = Hc * M needs.

    They hold sorted centroids (one dim a subspace) or grids (two dims).  0 is the kernel without a workspace,
    for few points and for other subspaces.

    Example: 32 heads of 64 subspaces, 32K tokens -> 16.8 MB; a page of 64 tokens -> 0.
    """
    if dsub == 1 and points >= MIN_SORTED_POINTS:
        return subspaces * SORTED_BYTES
    return subspaces * GRID_BYTES if dsub == 2 and points >= MIN_GRID_POINTS else 0
