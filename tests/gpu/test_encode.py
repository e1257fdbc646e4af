"""Encoding on the GPU against the torch codec: the same codes, except where two centroids tie in float32."""

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from million_cli.ops import compiled
from million_cli.ops.compiled import CodeLayout
from million_cli.ops.fragment import FragmentLayout
from million_cli.ops.layouts import Layout, RowLayout, TransposedLayout
from million_cli.spec import CodeSpec, WindowSpec

SHAPES = [(128, 64), (128, 32), (64, 32), (64, 16)]


def layout_of(kind: CodeLayout, spec: CodeSpec, page: int) -> Layout:
    if kind is CodeLayout.ROW:
        return RowLayout(spec, page)
    if kind is CodeLayout.TRANSPOSED:
        return TransposedLayout(spec, page)
    return FragmentLayout(spec, page, "keys" if kind is CodeLayout.FRAGMENT_KEYS else "values")


def quantizer(D: int, M: int, heads: int, rotated: bool) -> tuple[Tensor, Tensor | None]:
    centroids = torch.randn(heads, M, 256, D // M, device=DEVICE)
    rotation = torch.linalg.qr(torch.randn(heads, D, D, device=DEVICE))[0].contiguous() if rotated else None
    return centroids, rotation


def check_codes(codes: Tensor, x: Tensor, centroids: Tensor, rotation: Tensor | None) -> None:
    """codes [B, H, T, M] are nearest centroids; the distance may exceed the least by float32 rounding."""
    B, H, T, M = codes.shape
    x = x.double()
    if rotation is not None:
        x = x @ rotation.double()
    table = centroids.double().expand(H, -1, -1, -1)
    points = x.reshape(B, H, T, M, -1)
    mismatched = 0
    for h in range(H):
        distance = (points[:, h, :, :, None] - table[h]).square().sum(-1)  # [B, T, M, 256]
        least, best = distance.min(-1)
        chosen = distance.gather(-1, codes[:, h, :, :, None].long())[..., 0]
        magnitude = points[:, h].square().sum(-1) + 1
        assert ((chosen - least) <= 2e-6 * magnitude).all()
        mismatched += int((best != codes[:, h]).sum())
    assert mismatched <= 1e-4 * codes.numel() + 2


@pytest.mark.parametrize("kind", list(CodeLayout))
@pytest.mark.parametrize(("D", "M"), SHAPES)
@pytest.mark.parametrize("rotated", [False, True])
def test_pages(kind: CodeLayout, D: int, M: int, rotated: bool) -> None:
    B, H, P, T, start = 2, 3, 48, 480, 96
    dtype = torch.float16 if rotated else torch.bfloat16
    centroids, rotation = quantizer(D, M, H, rotated)
    layout = layout_of(kind, CodeSpec(D, M, 8), P)
    x = torch.randn(B, T, H, D, device=DEVICE).to(dtype).transpose(1, 2)  # strided, as models give it
    width = (start + T) // P
    table = torch.randperm(B * width + 1, device=DEVICE)[: B * width].int().view(B, width)
    pool = torch.full((B * width + 1, H, *layout.page_shape), 255, dtype=torch.uint8, device=DEVICE)
    compiled.pq_encode(x, centroids, rotation, pool, table, start=start, page_size=P, layout=kind)
    codes = layout.unpack(pool[table.long()].transpose(1, 2)).flatten(2, 3)  # [B, H, width * P, M]
    assert (codes[:, :, :start] == 255).all()
    check_codes(codes[:, :, start:], x, centroids, rotation)


@pytest.mark.parametrize(("D", "M"), SHAPES)
def test_contiguous(D: int, M: int) -> None:
    B, H, T = 1, 2, 1008
    centroids, _ = quantizer(D, M, 1, False)
    x = torch.randn(B, H, T, D, device=DEVICE).half()
    codes = torch.zeros(B, H, 1024, M, dtype=torch.uint8, device=DEVICE)
    compiled.pq_encode(x, centroids, None, codes, None, start=0, page_size=16, layout=CodeLayout.ROW)
    check_codes(codes[:, :, :T], x, centroids, None)
    assert not codes[:, :, T:].any()


def test_lowest_index_wins_a_tie() -> None:
    centroids = torch.zeros(1, 64, 256, 2, device=DEVICE)
    x = torch.randn(1, 1, 16, 128, device=DEVICE).half()
    codes = torch.full((1, 1, 16, 64), 7, dtype=torch.uint8, device=DEVICE)
    compiled.pq_encode(x, centroids, None, codes, None, start=0, page_size=16, layout=CodeLayout.ROW)
    assert not codes.any()


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
