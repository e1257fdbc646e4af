"""The plots of a report.  matplotlib is an extra: without it there are none, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from million_cli.files import atomic_path

logger = logging.getLogger("million")

MARKERS = {"dense": "*", "contiguous": "o", "paged": "x"}
COLOURS = "tab10"
STAGE_COLOURS = "tab20"

PANELS = (
    ("kl_e3", "KL from dense (10⁻³ nats a token)", None),
    ("perplexity", "perplexity", "perplexity_dense"),
    ("recall", "recall (share of questions)", "recall_dense"),
    ("cache_ratio", "KV cache bytes / 16-bit dense bytes", None),
)
"""Column, axis label, and the column of the dense model's value, drawn as a dashed line."""


def plot_quality(rows: Sequence[Mapping[str, str]], path: Path) -> Path | None:
    """Quality and memory against bits: a colour a quantizer, a marker a cache, a dashed line for dense.

    Args:
        rows: of a results CSV, with `bits_nominal`.

    Returns:
        `path`, or None without matplotlib or without a row that was evaluated.
    """
    rows = [row for row in rows if row.get("bits_nominal") and (row.get("kl_e3") or row.get("recall"))]
    figure_module = _matplotlib() if rows else None
    if figure_module is None:
        return None
    shown = [row for row in rows if row["config.cache.kind"] != "dense"] or rows
    panels = [panel for panel in PANELS if any(row.get(panel[0]) for row in shown)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = figure_module.Figure(figsize=(4.6 * columns, 3.5 * lines + 0.8), layout="constrained")
    handles: dict[str, Any] = {}
    for index, (column, label, dense_column) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        for value in {float(row[dense_column]) for row in rows if dense_column and row.get(dense_column)}:
            handles["dense"] = axes.axhline(value, color="black", linestyle="--", linewidth=1)
        _scatter(axes, shown, column, handles)
        axes.set_xlabel("bits per stored element")
        axes.set_ylabel(label)
        axes.set_xticks(sorted({float(row["bits_nominal"]) for row in shown}))
        axes.grid(alpha=0.3)
    models = sorted({row.get("config.model.name", "") for row in rows})
    figure.suptitle(f"{', '.join(models)}: quality and memory of the quantized KV cache")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def plot_breakdown(rows: Sequence[Mapping[str, Any]], path: Path, model: str, cache: str) -> Path | None:
    """Two stacked bars, dense and the cache under test: milliseconds of a decode step by stage.

    Args:
        rows: `stage`, `dense_ms`, `cache_ms`.

    Returns:
        `path`, or None without matplotlib.
    """
    bars = {
        name: {str(row["stage"]): float(row[column]) for row in rows}
        for name, column in (("dense", "dense_ms"), (cache, "cache_ms"))
    }
    return plot_stages(bars, path, f"{model}: a decode step by stage")


def plot_stages(bars: Mapping[str, Mapping[str, float]], path: Path, title: str) -> Path | None:
    """One stacked bar a cache: milliseconds of a decode step by stage, the same stages in all, bottom first.

    Returns:
        `path`, or None without matplotlib.
    """
    figure_module = _matplotlib()
    if figure_module is None:
        return None
    from matplotlib import colormaps

    figure = figure_module.Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    names = list(bars)
    bottoms = [0.0] * len(names)
    for index, stage in enumerate(next(iter(bars.values()))):
        heights = [bars[name][stage] for name in names]
        colour = colormaps[STAGE_COLOURS](index)
        axes.bar(names, heights, bottom=bottoms, label=stage, color=colour, width=0.55)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for x, total in enumerate(bottoms):
        axes.text(x, total, f"{total:.2f} ms", ha="center", va="bottom")
    axes.set_ylim(0, 1.1 * max(bottoms))
    axes.set_ylabel("time of a decode step (ms, mean)")
    axes.set_title(title)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _scatter(axes: Any, rows: Sequence[Mapping[str, str]], column: str, handles: dict[str, Any]) -> None:
    """Draw one panel's points, and enter each new kind of point into `handles`."""
    from matplotlib import colormaps

    quantizers = list(dict.fromkeys(row.get("config.quantizer.name", "") for row in rows))
    for row in rows:
        if not row.get(column):
            continue
        kind, quantizer = row["config.cache.kind"], row.get("config.quantizer.name", "")
        colour = colormaps[COLOURS](quantizers.index(quantizer) % 10)
        marker = MARKERS.get(kind, "s")
        # Contiguous and paged coincide when all is well: a ring shows the cross inside it.
        style = {"facecolors": "none", "edgecolors": colour} if marker == "o" else {"color": colour}
        point = axes.scatter(float(row["bits_nominal"]), float(row[column]), marker=marker, s=80, **style)
        handles.setdefault(f"{quantizer}, {kind}" if kind != "dense" else "dense", point)
    axes.margins(x=0.3, y=0.25)
    if column in ("kl_e3", "cache_ratio"):
        axes.set_ylim(0, 1.25 * max(float(row[column]) for row in rows if row.get(column)) or 1)
    elif column == "recall":
        axes.set_ylim(-0.03, 1.06)


def _matplotlib() -> Any:
    """matplotlib's figure module, which needs no display; None if it is not installed."""
    try:
        from matplotlib import figure
    except ImportError:
        logger.info("no plot: matplotlib is not installed (the extra `plots`)")
        return None
    return figure
