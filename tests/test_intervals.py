"""Wilson's interval against its defining equation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.intervals import wilson


@given(trials=st.integers(1, 5000), data=st.data())
def test_wilsons_interval_solves_its_equation(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    share = successes / trials
    assert 0 <= low <= share <= high <= 1
    assert low < high
    for bound in (low, high):  # |share - p| = z sqrt(p (1 - p) / n)
        assert (share - bound) ** 2 == pytest.approx(
            1.959964**2 * bound * (1 - bound) / trials, rel=1e-6, abs=1e-12
        )
