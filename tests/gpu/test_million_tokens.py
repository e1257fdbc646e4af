"""Contexts beyond a million tokens, in pools beyond 2 GiB, against a reference that goes chunk by chunk."""

from collections.abc import Iterator

import pytest
import torch
from cases import DEVICE, Case, Shape, attention
from test_decode import FLOOR
from test_lookup import ROUNDED, decode
from torch import Tensor

from million_cli.ops.compiled import CodeLayout

LENGTH, CHUNK = 1_200_003, 1 << 16


def parts(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [Hkv, n, D] of the only sequence in float64, a chunk at a time."""
    coded = case.coded[0]
    for first in range(0, coded, CHUNK):
        yield case.decoded(0, first, min(first + CHUNK, coded))
    yield case.newest(0)


def errors(case: Case, got: Tensor) -> tuple[float, float]:
    """Relative errors of `got` [1, Hq, D] and of torch's own attention, to a running softmax in float64."""
    shape = case.shape
    q = case.q[0].double().view(shape.kv_heads, -1, shape.head_dim)  # [Hkv, G, D]
    least = torch.finfo(torch.float64).min
    peak = torch.full((*q.shape[:2], 1), least, dtype=torch.float64, device=DEVICE)
    total, weighted, rounded = torch.zeros_like(peak), torch.zeros_like(q), []
    for k, v in parts(case):
        scores = q @ k.transpose(1, 2) * case.scale
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        shrink, weights = (peak - new_peak).exp(), (scores - new_peak).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        weighted = weighted * shrink + weights @ v
        peak = new_peak
        rounded.append((k.to(case.q.dtype), v.to(case.q.dtype)))
    exact = (weighted / total).flatten(0, 1)
    k, v = (torch.cat(tensors, 1) for tensors in zip(*rounded, strict=True))
    own = attention(case.q[0], k, v, case.scale)
    size = exact.norm()
    return float((got[0].double() - exact).norm() / size), float((own.double() - exact).norm() / size)


@pytest.mark.parametrize("group", [1, 4])
def test_pages(group: int) -> None:
    # 280 000 pages of 8 KiB: those that are used lie anywhere in 2.3 GB.
    case = Case(Shape([LENGTH], 2 * group, 2, spare_pages=280_000))
    assert case.key_pool.numel() > 1 << 31
    assert int(case.block_table.max()) * case.key_pool[0].numel() > 1 << 31
    ours, own = errors(case, case.decode())
    assert ours <= max(2 * own, FLOOR[torch.float16]), f"{ours:.2e} against torch's {own:.2e}"


def test_a_dominant_key_is_found_in_a_million() -> None:
    """One key in the middle carries nearly all the weight: a wrong offset cannot hide in an average."""
    case = Case(Shape([LENGTH], 2, 2))
    k, _ = case.decoded(0, 700_032, 700_096)
    case.q[0] = (2.5 * k[:, 5]).to(case.q.dtype)
    ours, own = errors(case, case.decode())
    assert ours <= max(2 * own, FLOOR[torch.float16]), f"{ours:.2e} against torch's {own:.2e}"


@pytest.mark.parametrize("layout", [CodeLayout.ROW, CodeLayout.TRANSPOSED])
def test_contiguous(layout: CodeLayout) -> None:
    case = Case(Shape([LENGTH], 2, 2))
    ours, own = errors(case, decode(case, layout))
    assert ours <= ROUNDED * own + 1e-4, f"{ours:.2e} against torch's {own:.2e}"
