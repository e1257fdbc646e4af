"""The pictures that jobs write beside their tables.  Without the extra matplotlib there are none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from million_cli.report import breakdown, positions, quality, recall, sources, style

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("million")

PICTURES = {"passkey": recall.picture, "positions": positions.picture, "drift": positions.picture}
"""Name of a task's table -> from its rows and the quantizer's name to a figure."""


def plot_table(name: str, rows: Sequence[Mapping[str, Any]], path: Path, quantizer: str) -> Path | None:
    """The picture of a task's table.

    Returns:
        `path`, or None without matplotlib or where a table of that name has no picture.
    """
    if name not in PICTURES or not _available():
        return None
    cells = [{key: str(value) for key, value in row.items()} for row in rows]
    style.save_png(PICTURES[name](cells, quantizer), path)
    return path


def plot_quality(rows: pd.DataFrame, path: Path) -> Path | None:
    """Quality and memory against bits, of the model and text of most jobs.

    Args:
        rows: jobs, of a results CSV.

    Returns:
        `path`, or None without matplotlib or without a row that was evaluated.
    """
    found = quality.exhibits(sources.of_jobs(path.with_suffix(".csv"), rows).quality)
    if not found or not _available():
        return None
    exhibit = max(found, key=lambda exhibit: len(exhibit.data))
    assert exhibit.paint is not None
    style.save_png(style.draw(exhibit.paint, *exhibit.size), path)
    return path


def plot_stages(bars: Mapping[str, Mapping[str, float]], path: Path, title: str) -> Path | None:
    """A stacked bar a cache: milliseconds of a decode step by stage, the first stage below.

    Returns:
        `path`, or None without matplotlib.
    """
    if not _available():
        return None
    stages = {name: dict(times) for name, times in bars.items()}
    figure = style.draw(lambda figure: breakdown.paint(figure, stages), 3.4 + 1.5 * len(stages), 4.4)
    figure.suptitle(title)
    style.save_png(figure, path)
    return path


def _available() -> bool:
    if not style.available():
        logger.info("no plot: matplotlib is not installed (the extra `plots`)")
    return style.available()
