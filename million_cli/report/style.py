"""How figures look: one style, drawn without a display, as PNG files and as SVG for the page.

matplotlib is the extra `plots`: without it there are tables and no figures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from million_cli.files import atomic_path

PALETTE = (
    "#0b6e99",
    "#d1495b",
    "#3c8d53",
    "#b36a00",
    "#6d4c9f",
    "#7a5c45",
    "#c2568f",
    "#5f6b73",
    "#1a9e96",
    "#8a8d00",
)
"""Ten colours that stay apart in print and for colour-blind readers, when markers differ too."""
MARKERS = "osD^vPX*<>"
DENSE = {"color": "#222222", "linestyle": "--", "linewidth": 1.2}
INK = "#222222"

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "svg.hashsalt": "million",  # the same figure is the same file
}


def available() -> bool:
    """Whether figures can be drawn here."""
    return find_spec("matplotlib") is not None


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th series, distinct up to a hundred, and seen through one another."""
    colour = PALETTE[index % 10]
    marker = MARKERS[(index + index // 10) % 10]
    return {"color": colour, "marker": marker, "markerfacecolor": f"{colour}99", "markeredgecolor": colour}


def draw(painter: Callable[[Any], None], width: float, height: float) -> Any:
    """A figure of `width` x `height` inches that `painter` has filled."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        painter(figure)
        figure.canvas.draw()  # the layout is settled under the style, not at the first save
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Write a figure to `path`, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib import rc_context

    with rc_context(STYLE), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})


def svg_uri(figure: Any) -> str:
    """A figure as a `data:` address: an image of its own, so that names in several cannot clash."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def context_axis(axes: Any, contexts: set[float]) -> None:
    """A logarithmic axis of context lengths, marked 1K, 32K, 1M at those measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(contexts), [tokens(context) for context in sorted(contexts)])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("context (tokens)")


def tokens(count: float) -> str:
    """1024 -> 1K, 1500 -> 1500, 1048576 -> 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size and count % size == 0:
            return f"{int(count) // size}{unit}"
    return f"{count:g}"
