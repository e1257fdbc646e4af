"""Intervals of paired differences: two caches, the same questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap(
    groups: Sequence[Sequence[float]], seed: int, draws: int = 10_000, share: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over groups of their mean difference (Efron 1979).

    Questions are drawn anew within each group, so the groups keep their weight.  Where all differences are
    alike the interval has no width, however few they are.

    Args:
        groups: differences of each question, by task and length for instance; none empty.
        seed: of the draws.
    """
    assert groups
    assert all(groups)
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        means += values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means / len(groups), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
