"""Append on the GPU: the new token in the window, and a page of codes where one is due."""

import pytest
import torch
from cases import DEVICE, Case, Shape
from test_encode import quantizer

from million_cli.ops import compiled
from million_cli.ops.compiled import CodeLayout
from million_cli.ops.fragment import DSUBS, FragmentLayout
from million_cli.spec import CodeSpec, WindowSpec


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("keys", DSUBS)
@pytest.mark.parametrize("values", DSUBS)
def test_every_instantiation(D: int, keys: int, values: int) -> None:
    """The page that leaves the window has the codes that encoding it gives; the others stay."""
    P, R = 64, 128
    turn = keys.bit_length() + values.bit_length() + D // 64
    dtype = (torch.float16, torch.bfloat16)[turn % 2]
    case = Case(Shape([200, 300], 4, 2, D, D // keys, D // values, WindowSpec(P, R), dtype))
    case.lengths.copy_(torch.tensor([R, R + 64], dtype=torch.int32))  # pages 0 and 1 are due
    pools = case.key_pool, case.value_pool
    expected = [pool.clone() for pool in pools]
    k, v = (torch.randn(2, 2, D, device=DEVICE).to(dtype) for _ in range(2))
    compiled.append(
        k, v, case.lengths, case.key_window, case.value_window, *pools, case.block_table,
        case.key_centroids, case.value_centroids, None, None, page_size=P,
    )  # fmt: skip
    for side, (centroids, window) in enumerate(
        ((case.key_centroids, case.key_window), (case.value_centroids, case.value_window))
    ):
        kind = (CodeLayout.FRAGMENT_KEYS, CodeLayout.FRAGMENT_VALUES)[side]
        for b, page in enumerate((0, 1)):
            slots = torch.arange(page * P, (page + 1) * P, device=DEVICE) % R
            compiled.pq_encode(
                window[b : b + 1, :, slots].contiguous(), centroids, None, expected[side],
                case.block_table[b : b + 1], start=page * P, page_size=P, layout=kind,
            )  # fmt: skip
        assert torch.equal(pools[side], expected[side])


@pytest.mark.parametrize(("page", "residual"), [(64, 128), (16, 48), (256, 512)])
@pytest.mark.parametrize("rotated", [False, True])
def test_append_equals_encode(page: int, residual: int, rotated: bool) -> None:
    """Tokens appended one by one: window and pages are what encoding all of them at once gives."""
    B, H, D, MK, MV = 2, 2, 128, 64, 32
    steps, window = residual + 2 * page + 5, WindowSpec(page, residual)
    (ck, rk), (cv, rv) = quantizer(D, MK, H, rotated), quantizer(D, MV, H, rotated)
    x = torch.randn(2, B, H, steps, D, device=DEVICE).half()
    layouts = [FragmentLayout(CodeSpec(D, M, 8), page, s) for M, s in ((MK, "keys"), (MV, "values"))]
    width = steps // page + 1
    table = torch.randperm(B * width, device=DEVICE).int().view(B, width)
    pools = [
        torch.zeros(B * width, H, *layout.page_shape, dtype=torch.uint8, device=DEVICE) for layout in layouts
    ]
    expected = [torch.zeros_like(pool) for pool in pools]
    windows = [torch.zeros(B, H, residual, D, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    lag = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)  # the second sequence is three tokens behind
    for step in range(steps):
        lengths = (step + 1 - lag).clamp(min=0)
        k, v = (
            torch.stack([x[side, b, :, max(int(lengths[b]) - 1, 0)] for b in range(B)]) for side in range(2)
        )
        compiled.append(k, v, lengths, *windows, *pools, table, ck, cv, rk, rv, page_size=page)
    for b in range(B):
        length = steps - int(lag[b])
        coded = window.coded_length(length)
        positions = torch.arange(coded, length, device=DEVICE)
        for side in range(2):
            assert torch.equal(windows[side][b][:, positions % residual], x[side, b][:, positions])
            kind = (CodeLayout.FRAGMENT_KEYS, CodeLayout.FRAGMENT_VALUES)[side]
            compiled.pq_encode(
                x[side, b : b + 1, :, :coded], (ck, cv)[side], (rk, rv)[side], expected[side],
                table[b : b + 1],
                start=0, page_size=page, layout=kind,
            )  # fmt: skip
    for side in range(2):
        different = (pools[side] != expected[side]).sum()
        assert int(different) <= (1e-4 * pools[side].numel() if rotated else 0)
