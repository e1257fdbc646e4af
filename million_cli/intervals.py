"""Confidence intervals."""

from __future__ import annotations

import math


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    Unlike the normal interval it does not shrink to nothing where all or none succeed.
    """
    assert 0 <= successes <= trials > 0, (successes, trials)
    share, z2 = successes / trials, z * z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At the ends the bound is 0 or 1 exactly; rounding would miss it.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half)
