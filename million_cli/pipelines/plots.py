"""The plots of a report.  matplotlib is an extra: without it there are none, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from million_cli.files import atomic_path

logger = logging.getLogger("million")

MARKERS = {"dense": ("*", "black"), "contiguous": ("o", "tab:blue"), "paged": ("x", "tab:red")}
STAGE_COLOURS = "tab20"


def plot_quality(rows: Sequence[Mapping[str, str]], path: Path) -> Path | None:
    """Quality and memory against bits: one point a row, a dashed line for the dense model.

    Args:
        rows: of a results CSV, with `bits_nominal`.

    Returns:
        `path`, or None without matplotlib or without a row that was evaluated.
    """
    rows = [row for row in rows if row.get("bits_nominal") and (row.get("kl_e3") or row.get("recall"))]
    figure_module = _matplotlib() if rows else None
    if figure_module is None:
        return None
    quantized = [row for row in rows if row["config.cache.kind"] != "dense"]
    panels = [
        ("kl_e3", "KL from the dense model (10⁻³ nats a token)", None),
        ("perplexity", "perplexity", "perplexity_dense"),
        ("recall", "recall (share of questions)", "recall_dense"),
        ("cache_ratio", "KV cache bytes / 16-bit dense bytes", None),
    ]
    panels = [panel for panel in panels if any(row.get(panel[0]) for row in quantized or rows)]
    figure = figure_module.Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    for index, (column, label, dense_column) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _scatter(axes, quantized or rows, column)
        dense = {float(row[dense_column]) for row in rows if dense_column and row.get(dense_column)}
        for value in dense:
            axes.axhline(value, color="black", linestyle="--", linewidth=1, label="dense")
        axes.set_xlabel("bits per stored element")
        axes.set_ylabel(label)
        if column == "recall":
            axes.set_ylim(-0.03, 1.03)
        elif column in ("kl_e3", "cache_ratio"):
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=8)
    models = sorted({row.get("config.model.name", "") for row in rows})
    figure.suptitle(f"{', '.join(models)}: quality and memory of the quantized KV cache")
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
    figure_module = _matplotlib()
    if figure_module is None:
        return None
    from matplotlib import colormaps

    figure = figure_module.Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    bottoms = [0.0, 0.0]
    for index, row in enumerate(rows):
        heights = [float(row["dense_ms"]), float(row["cache_ms"])]
        colour = colormaps[STAGE_COLOURS](index)
        axes.bar(["dense", cache], heights, bottom=bottoms, label=row["stage"], color=colour, width=0.55)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for x, total in enumerate(bottoms):
        axes.text(x, total, f"{total:.2f} ms", ha="center", va="bottom")
    axes.set_ylim(0, 1.1 * max(bottoms))
    axes.set_ylabel("time of a decode step (ms, mean)")
    axes.set_title(f"{model}: a decode step by stage")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _scatter(axes: Any, rows: Sequence[Mapping[str, str]], column: str) -> None:
    labelled: set[tuple[float, float]] = set()
    for row in rows:
        if not row.get(column):
            continue
        kind = row["config.cache.kind"]
        marker, colour = MARKERS.get(kind, ("s", "tab:green"))
        hollow = {"facecolors": "none"} if marker == "o" else {}
        x, y = float(row["bits_nominal"]), float(row[column])
        axes.scatter(
            [x],
            [y],
            marker=marker,
            s=70,
            label=kind,
            **({"edgecolors": colour, **hollow} if hollow else {"color": colour}),
        )
        if (x, round(y, 6)) not in labelled:
            labelled.add((x, round(y, 6)))
            axes.annotate(
                row.get("config.quantizer.name", ""),
                (x, y),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=8,
            )
    axes.margins(x=0.25, y=0.2)


def _matplotlib() -> Any:
    """matplotlib's figure module, which needs no display; None if it is not installed."""
    try:
        from matplotlib import figure
    except ImportError:
        logger.info("no plot: matplotlib is not installed (the extra `plots`)")
        return None
    return figure
