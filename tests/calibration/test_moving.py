"""Keys and gradients turned to drawn positions, against turning them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor

from million_cli.calibration.information import FIRST_TOKENS
from million_cli.calibration.moving import MovedKeys, Positions, mean_turned
from million_cli.hf.models import random_model
from million_cli.hf.rotary import Rotary
from million_cli.pq.rebase import LAYOUTS, Layout, turn

D, HKV, CONTEXT = 16, 2, 1024
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0 + i for i in range(8)],
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def rotary(rope: dict[str, Any] = DEFAULT, layouts: Sequence[Any] = ("halves", "still")) -> Rotary:
    return Rotary(random_model(tiny_config("llama", rope_parameters=rope), dtype="float64"), layouts)


def positions(of: Rotary, every: int = 64, seed: int = 0) -> Positions:
    return Positions(of, of.rebases(every) if every else (), CONTEXT if every else 200, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 3, 8])  # pairs; below 8 the rotation is partial
def test_the_mean_is_that_over_the_rotations(layout: Layout, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(HKV, D, D, generator=generator, dtype=torch.float64)
    F = root @ root.mT
    angles = 7 * torch.rand(50, n, generator=generator, dtype=torch.float64)
    each = []
    for angle in angles:
        R = turn(torch.eye(D).double(), angle.cos()[None], angle.sin()[None], layout)  # rows: x R
        each.append(R.mT @ F @ R)
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(mean_turned(F, angles, layout), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_information_is_that_of_turned_gradients(layout: Layout) -> None:
    """F of gradients turned one by one to the drawn positions; layers without positions keep theirs."""
    made = positions(rotary(layouts=(layout, "still")))
    g = torch.randn(2, HKV, 30, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    F = g.mT @ g
    turned = made.information(F)
    assert torch.equal(turned[1], F[1])
    angles = made.draw(0, 4096)
    sums = torch.zeros(HKV, D, D, dtype=torch.float64)
    for angle in angles.split(512):
        moved = turn(g[0][:, :, None].expand(-1, -1, 512, -1), angle.cos(), angle.sin(), layout).flatten(1, 2)
        sums += moved.mT @ moved
    torch.testing.assert_close(turned[0], sums / len(angles), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("every", [0, 64])
def test_draws_are_positions_of_a_block_or_of_the_windows(every: int) -> None:
    made = positions(rotary(), every)
    angles = made.draw(0, 5000)
    frequencies = made.rotary.frequencies(0)
    drawn = angles / frequencies  # every pair tells the position
    at = drawn[:, -1].round()
    torch.testing.assert_close(drawn, at[:, None].expand_as(drawn), rtol=0, atol=1e-2)
    assert (int(at.min()), int(at.max())) == (0, (every or 200) - 1)
    if not every:  # denser towards the start: L u^2
        at = (200 * (at + 0.5)).sqrt().floor()
        assert 0.9 < at.mean() / 100 < 1.1
        return
    counts = at.long().bincount(minlength=every).double()
    assert counts.std() / counts.mean().sqrt() == pytest.approx(1, abs=0.3)  # uniform: a Poisson count each
    assert torch.equal(made.draw(0, 5000), angles)  # of the seed and the layer alone
    assert not torch.equal(positions(rotary(), every, seed=1).draw(0, 5000), angles)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """From each row of a to the nearest of b."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)


def test_draws_cover_each_regime_of_lengths() -> None:
    """Texts up to 256 tokens turn by other frequencies than longer ones: half of the draws each."""
    of = rotary(LONGROPE, ("halves", "halves"))
    assert of.lengths(CONTEXT) == (256, 1024)
    made = positions(of)
    angles = made.draw(0, 4000)
    allowed: dict[int, Tensor] = {}
    rebase = made.rebases[0]
    assert rebase is not None
    for length in of.lengths(CONTEXT):
        at = torch.arange(length)
        origins = (at // 64 * 64).double()
        allowed[length] = of.angles(0, at, length) - origins[:, None] * rebase.frequencies
    share = {length: (distance(angles, each) < 1e-6) for length, each in allowed.items()}
    assert (share[256] | share[1024]).all()
    assert 1900 < int((share[256] & ~share[1024]).sum()) <= 2000
    mixed = share[1024][:200].double().mean()
    assert 0.3 < mixed < 0.7  # in no order


@pytest.mark.parametrize("layouts", [("halves", "still"), ("neighbours", "halves")])
def test_moved_keys_keep_the_first_tokens_in_place(layouts: tuple[Any, Any]) -> None:
    made = positions(rotary(layouts=layouts))
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(2, HKV, 300, D, generator=generator, dtype=torch.float64)
    sources = [torch.randint(0, 100, (300,), generator=generator) for _ in range(2)]
    sources[0][:FIRST_TOKENS] = torch.arange(FIRST_TOKENS)
    moved = MovedKeys(keys, sources, made, torch.device("cpu"))
    assert len(moved) == 2
    for layer, layout in enumerate(layouts):
        found = moved[layer]
        if layout == "still":
            assert torch.equal(found, keys[layer])
            continue
        drawn = made.draw(layer, 300)
        for i, source in enumerate(sources[layer].tolist()):
            angle = drawn[i]
            if source < FIRST_TOKENS:
                angle = source * made.rotary.frequencies(layer)
            expected = turn(keys[layer][:, i : i + 1], angle.cos()[None], angle.sin()[None], layout)
            torch.testing.assert_close(found[:, i : i + 1], expected, rtol=0, atol=1e-12)
