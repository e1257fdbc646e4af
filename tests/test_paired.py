"""Bootstrap intervals of paired differences."""

from __future__ import annotations

import math
import random

import pytest

from million_cli.paired import bootstrap


def test_it_agrees_with_the_normal_interval_of_many_differences():
    rng = random.Random(0)
    values = [rng.gauss(3.0, 2.0) for _ in range(2000)]
    low, high = bootstrap([values], seed=0)
    mean = sum(values) / len(values)
    half = 1.959964 * 2.0 / math.sqrt(len(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_groups_keep_their_weight():
    """A hundred zeros and two ones: the mean over the groups is one half, whatever is drawn."""
    assert bootstrap([[0.0] * 100, [1.0, 1.0]], seed=1) == (0.5, 0.5)


def test_the_seed_decides():
    values = [[0.0, 1.0, 0.0, -1.0, 5.0]]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3, draws=100) != bootstrap(values, seed=4, draws=100)
