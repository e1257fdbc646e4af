"""The reservoir keeps a uniform sample, whatever the chunks and interruptions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from million_cli.calibration.reservoir import Reservoir
from million_cli.errors import UserError


def numbered(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[B, 2, T, 4]` that tell their token's number in reading order, head and side."""
    number = (torch.arange(T)[None] * B + torch.arange(B)[:, None]).float()
    keys = number[:, None, :, None].expand(B, 2, T, 4) + torch.tensor([0.0, 0.25])[:, None, None]
    return keys, keys + 0.5


def fill(
    reservoir: Reservoir, B: int, T: int, cuts: list[int], mask: torch.Tensor | None = None
) -> Reservoir:
    keys, values = numbered(B, T)
    edges = [0, *sorted(cuts), T]
    for start, stop in pairwise(edges):
        part = None if mask is None else mask[:, start:stop]
        reservoir.add(keys[:, :, start:stop], values[:, :, start:stop], part)
    return reservoir


@given(
    data=st.data(),
    B=st.integers(1, 3),
    T=st.integers(1, 60),
    capacity=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_sample_is_true_and_independent_of_chunks(
    data: st.DataObject, B: int, T: int, capacity: int, seed: int
) -> None:
    cuts = data.draw(st.lists(st.integers(0, T), max_size=6))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    mask[0, 0] = True
    whole = fill(Reservoir(capacity, seed, 0), B, T, [], mask)
    parts = fill(Reservoir(capacity, seed, 0), B, T, cuts, mask)
    keys, values = whole.contents()
    assert all(torch.equal(a, b) for a, b in zip((keys, values), parts.contents(), strict=True))
    assert whole.seen == int(mask.sum())
    assert len(whole) == min(capacity, whole.seen) == keys.shape[1]
    chosen = keys[0, :, 0]
    assert (chosen.diff() > 0).all(), "in reading order, no token twice"
    assert set(chosen.int().tolist()) <= set(mask.T.reshape(-1).nonzero()[:, 0].tolist())
    assert torch.equal(keys[1], keys[0] + 0.25), "all heads keep the same tokens"
    assert torch.equal(values, keys + 0.5), "keys and values belong together"


@given(first=st.integers(1, 50), second=st.integers(1, 50), capacity=st.integers(1, 30))
def test_resumed_reservoir_goes_on_exactly(first: int, second: int, capacity: int) -> None:
    keys, values = numbered(1, first + second)
    straight, before, after = (Reservoir(capacity, 3, 1) for _ in range(3))
    for reservoir in (straight, before):
        reservoir.add(keys[:, :, :first], values[:, :, :first])
    after.restore(before.state())
    for reservoir in (straight, after):
        reservoir.add(keys[:, :, first:], values[:, :, first:])
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, after.state()[name]), name


def test_every_token_is_as_likely() -> None:
    """10 of 50 tokens, over 1500 seeds: each token's count is binomial(1500, 0.2), sigma 15.5."""
    counts = torch.zeros(50)
    pairs = torch.zeros(50, 50)
    for seed in range(1500):
        chosen = fill(Reservoir(10, seed, 0), 1, 50, [7, 20, 21]).contents()[0][0, :, 0].long()
        counts[chosen] += 1
        pairs[chosen[:, None], chosen] += 1
    assert (counts - 300).abs().max() < 4.5 * 15.5
    together = pairs[~torch.eye(50, dtype=torch.bool)]  # a pair: 10 * 9 / (50 * 49) = 0.0367, sigma 7.3
    assert (together - 55.1).abs().max() < 5.5 * 7.3


def test_layers_and_seeds_differ() -> None:
    samples = [
        fill(Reservoir(10, seed, layer), 1, 500, []).contents()[0] for seed, layer in ((0, 0), (0, 1), (1, 0))
    ]
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_memory_is_bounded_and_dtype_kept() -> None:
    reservoir = Reservoir(16, 0, 0)
    for _ in range(50):
        reservoir.add(
            torch.randn(2, 3, 64, 8, dtype=torch.bfloat16), torch.randn(2, 3, 64, 8, dtype=torch.bfloat16)
        )
    keys, _ = reservoir.contents()
    assert (keys.shape, keys.dtype) == ((3, 16, 8), torch.bfloat16)
    assert sum(tensor.nbytes for tensor in reservoir.state().values()) < 16 * (2 * 3 * (8 * 2 + 4) + 24) + 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_refused(bad: float) -> None:
    keys, values = numbered(1, 5)
    values = values.clone()
    values[0, 1, 3, 2] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        Reservoir(10, 0, 0).add(keys, values)


def test_empty() -> None:
    reservoir = Reservoir(4, 0, 0)
    keys, values = numbered(1, 3)
    reservoir.add(keys, values, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="no token was read"):
        reservoir.contents()


def test_squares_stay_with_their_tokens() -> None:
    """Noted by position, kept by sample, lost when a token leaves, the same after an interruption."""
    reservoir = Reservoir(12, 1, 0)
    keys, values = numbered(1, 40)
    for start in (0, 20):
        squares = torch.full((2, 1, 2, 20), -1.0)
        known = torch.arange(start, start + 15).float()  # the last five of a text are not coded
        squares[0, :, :, :15], squares[1, :, :, :15] = known, 100 + known
        chunk = slice(start, start + 20)
        reservoir.add(keys[:, :, chunk], values[:, :, chunk], squares=squares)
        resumed = Reservoir(12, 1, 0)
        resumed.restore(reservoir.state())
        reservoir = resumed
    tokens = reservoir.contents()[0][0, :, 0]
    expected = torch.where(tokens % 20 < 15, tokens, -1.0)
    key_squares, value_squares = reservoir.squares()
    assert torch.equal(key_squares, expected.expand(2, -1))
    assert torch.equal(value_squares, torch.where(expected < 0, -1.0, expected + 100).expand(2, -1))


def test_positions_stay_with_their_tokens() -> None:
    """Two texts in chunks, the second left-padded: each token keeps its own position, also over a restart."""
    reservoir = Reservoir(25, 2, 0)
    keys, values = numbered(1, 30)
    for start in (0, 11):
        stop = start + 11 if start == 0 else 30
        places = torch.arange(start, stop)[None]
        reservoir.add(keys[:, :, start:stop], values[:, :, start:stop], None, places)
    mask = (torch.arange(20) >= 4)[None]
    shifted = (torch.arange(20) - 4).clamp(min=0)[None]
    more_keys, more_values = numbered(1, 20)
    reservoir.add(more_keys + 100, more_values + 100, mask, shifted)
    resumed = Reservoir(25, 2, 0)
    resumed.restore(reservoir.state())
    for one in (reservoir, resumed):
        tokens = one.contents()[0][0, :, 0].long()
        assert len(tokens) == 25
        assert torch.equal(one.positions(), torch.where(tokens < 100, tokens, tokens - 104))
