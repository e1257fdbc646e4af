"""Paged decode against float64 attention over the decoded vectors."""

import random

import pytest
import torch
from cases import Case, Shape

from million_cli.ops import compiled
from million_cli.ops.fragment import DSUBS
from million_cli.spec import WindowSpec

# Floor of the bound: where torch's own error is near zero (e.g. one token), ours is a rounding of the output.
FLOOR = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


def check(shape: Shape) -> None:
    case = Case(shape)
    ours, own = case.errors(case.decode())
    assert ours <= max(2 * own, FLOOR[shape.dtype]), f"{ours:.2e} against torch's {own:.2e}: {shape}"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", DSUBS)
@pytest.mark.parametrize("values", DSUBS)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_every_instantiation(head_dim: int, keys: int, values: int, group: int) -> None:
    """The dtype, which the kernel reads at run time, alternates; so do rotations."""
    turn = keys.bit_length() + values.bit_length() + group // 4 + head_dim // 64
    dtype, rotations = (torch.float16, torch.bfloat16)[turn % 2], (None, "head")[turn // 2 % 2]
    M = head_dim // keys, head_dim // values
    check(Shape([1000, 129, 3000], 2 * group, 2, head_dim, *M, dtype=dtype, rotations=rotations, seed=turn))


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dims", [1, 8])
def test_score_ranges_of_other_widths(dims: int, group: int) -> None:
    for scores in ("equal", "dominant", "wide"):
        check(Shape([5000, 300], 2 * group, 2, m_keys=128 // dims, m_values=128 // dims, scores=scores))


@pytest.mark.parametrize("group", [2, 3, 5, 6, 7, 8, 12, 16])
def test_groups(group: int) -> None:
    check(Shape([900, 2000], 2 * group, 2))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 127, 128, 129, 191, 192, 193, 255, 256, 4096])
def test_lengths_around_pages(length: int) -> None:
    check(Shape([length], 8, 8, seed=length))
    check(Shape([length], 8, 2, seed=length))


@pytest.mark.parametrize("page", [16, 48, 64, 80, 240, 256])
def test_page_sizes(page: int) -> None:
    check(Shape([17, 1000, 2049], 8, 2, window=WindowSpec(page, 2 * page), seed=page))


@pytest.mark.parametrize("scores", ["equal", "dominant", "wide"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_score_ranges(scores: str, group: int) -> None:
    check(Shape([5000, 300], 2 * group, 2, scores=scores))


@pytest.mark.parametrize("rotations", ["head", "layer"])
@pytest.mark.parametrize("tables", ["head", "layer"])
def test_scopes(rotations: str, tables: str) -> None:
    check(Shape([3000, 200], 8, 2, rotations=rotations, tables=tables))
    check(Shape([3000, 200], 4, 4, rotations=rotations, tables=tables))


@pytest.mark.parametrize("group", [1, 4])
def test_left_padding(group: int) -> None:
    check(Shape([1000, 1000, 1000, 1000], 2 * group, 2, first_valid=[0, 5, 500, 990]))
    check(Shape([130, 130, 130], 2 * group, 2, first_valid=[63, 64, 129]))


def test_no_valid_token_gives_zeros() -> None:
    case = Case(Shape([0, 100], 8, 2))
    assert torch.equal(case.decode()[0], torch.zeros_like(case.q[0]))


@pytest.mark.parametrize("length", [100_000, 300_000])
@pytest.mark.parametrize("group", [1, 4])
def test_long(length: int, group: int) -> None:
    check(Shape([length], 2 * group, 2))


@pytest.mark.parametrize("seed", range(40))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    page = draw.choice([16, 32, 64, 96, 128, 256])
    head_dim = draw.choice([64, 128])
    kv_heads = draw.choice([1, 2, 3, 8])
    B = draw.choice([1, 2, 5])
    lengths = [draw.choice([draw.randint(1, 600), draw.randint(600, 20000)]) for _ in range(B)]
    check(
        Shape(
            lengths,
            kv_heads * draw.choice([1, 2, 4, 7, 8]),
            kv_heads,
            head_dim,
            head_dim // draw.choice(DSUBS),
            head_dim // draw.choice(DSUBS),
            WindowSpec(page, page * draw.choice([2, 3])),
            draw.choice([torch.float16, torch.bfloat16]),
            draw.choice(["head", "layer"]),
            draw.choice([None, "head", "layer"]),
            [draw.randint(0, n - 1) for n in lengths] if draw.random() < 0.3 else None,
            draw.choice(["normal", "normal", "equal", "dominant", "wide"]),
            seed,
        )
    )


def test_repeats_are_equal() -> None:
    case = Case(Shape([9000, 40, 700], 8, 2))
    plan = compiled.DecodePlan.make(3, 8, 2, 128, case.q.device)
    first = case.decode(plan)
    for _ in range(20):
        assert torch.equal(case.decode(plan, out=torch.full_like(first, torch.nan)), first)


def test_errors_name_the_shape() -> None:
    case = Case(Shape([500], 8, 2))
    case.q = case.q[:, :7].contiguous()
    with pytest.raises(RuntimeError, match=r"q \[1, 7, 128\] has no whole number of heads"):
        compiled.paged_decode(
            case.q, case.key_pool, case.value_pool, case.block_table, case.lengths, None,
            compiled.code_major(case.key_centroids), compiled.code_major(case.value_centroids), None, None,
            case.key_window, case.value_window, compiled.DecodePlan.make(1, 8, 2, 128, case.q.device),
            scale=1.0, page_size=64,
        )  # fmt: skip
