"""The stages of a decode step."""

from __future__ import annotations

from typing import NamedTuple

STAGES = (
    "embedding",
    "projections",
    "rope",
    "rotation",
    "append",
    "flush/encode",
    "attention",
    "merge",
    "output projection",
    "MLP",
    "norms",
    "head",
    "sampling",
    "host gap",
)
"""In the order of a step.  `norms` has residual sums and masks in it; in `host gap` nothing runs."""


class Span(NamedTuple):
    """A part of a step that belongs to one stage, in microseconds."""

    stage: str
    name: str
    start_us: float
    duration_us: float
