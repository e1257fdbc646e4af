"""The contiguous lookup-table decode against float64, rows and transposed pages."""

import pytest
import torch
from cases import DEVICE, Case, Shape
from torch import Tensor

from million_cli.ops import compiled
from million_cli.ops.compiled import CodeLayout
from million_cli.ops.fragment import DSUBS
from million_cli.ops.layouts import TransposedLayout

# The table's entries are rounded to fp16, which torch's attention does not do to its scores.
ROUNDED = 3


def contiguous_codes(case: Case, layout: CodeLayout) -> tuple[Tensor, Tensor]:
    """The case's pages as contiguous codes of keys (rows) and of values (`layout`)."""
    ids = case.block_table.long()
    keys, values = (
        form.unpack(pool[ids]).transpose(1, 2).flatten(2, 3).contiguous()  # [B, Hkv, capacity, M]
        for form, pool in ((case.key_layout, case.key_pool), (case.value_layout, case.value_pool))
    )
    if layout is CodeLayout.TRANSPOSED:
        page = case.shape.window.page_size
        pages = TransposedLayout(case.value_layout.spec, page).pack(values.unflatten(2, (-1, page)))
        values = pages.contiguous()
    return keys, values


def decode(case: Case, layout: CodeLayout) -> Tensor:
    """The case's attention by the contiguous kernel."""
    keys, values = contiguous_codes(case, layout)
    B, Hq, D = case.q.shape
    return compiled.contiguous_decode(
        case.q, keys, values, case.lengths, case.first_valid,
        compiled.code_major(case.key_centroids), compiled.code_major(case.value_centroids),
        case.key_rotation, case.value_rotation, case.key_window, case.value_window,
        compiled.LookupPlan.make(B, Hq, D, DEVICE), scale=case.scale, page_size=case.shape.window.page_size,
        value_layout=layout,
    )  # fmt: skip


def check(shape: Shape, layout: CodeLayout) -> None:
    case = Case(shape)
    ours, own = case.errors(decode(case, layout))
    assert ours <= ROUNDED * own + 1e-4, f"{ours:.2e} against torch's {own:.2e}: {shape}"


@pytest.mark.parametrize("layout", [CodeLayout.ROW, CodeLayout.TRANSPOSED])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", DSUBS)
@pytest.mark.parametrize("values", DSUBS)
def test_every_instantiation(layout: CodeLayout, head_dim: int, keys: int, values: int) -> None:
    turn = keys.bit_length() + values.bit_length() + int(layout) + head_dim // 64
    dtype = (torch.float16, torch.bfloat16)[turn % 2]
    check(Shape([1000, 129, 3000], 6, 2, head_dim, head_dim // keys, head_dim // values, dtype=dtype), layout)


@pytest.mark.parametrize("layout", [CodeLayout.ROW, CodeLayout.TRANSPOSED])
@pytest.mark.parametrize("length", [1, 127, 128, 192, 4096, 100_000])
def test_lengths(layout: CodeLayout, length: int) -> None:
    check(Shape([length], 4, 4, seed=length), layout)


def test_rotations_and_padding() -> None:
    check(Shape([900, 700], 8, 2, rotations="head", first_valid=[3, 699]), CodeLayout.ROW)
    check(
        Shape([900, 700], 8, 2, rotations="layer", tables="layer", scores="dominant"), CodeLayout.TRANSPOSED
    )
