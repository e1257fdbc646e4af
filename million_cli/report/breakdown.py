"""Time of a decode step by stage: a stacked bar for each cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from million_cli.report.exhibit import Column, Exhibit, Row, by, grid, join, number, origin, slug
from million_cli.report.style import PALETTE, tokens

Stages = dict[str, dict[str, float]]
"""Series -> stage -> milliseconds."""


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each model, context and batch: a bar for each series, dense beside the others."""
    found = []
    for (model, context, batch), members in by(rows, "model", "context", "batch").items():
        stages: Stages = {}
        for row in members:
            stages.setdefault(row["series"] or "cache", {})[row["stage"]] = float(row["ms"])
        totals = {series: sum(times.values()) for series, times in stages.items()}
        details = [f"context {tokens(float(context))}" if context else "", f"batch {batch}" if batch else ""]
        title = ", ".join(filter(None, [model, *details]))
        names = list(dict.fromkeys(row["stage"] for row in members))
        lines = [
            {"stage": stage, **{series: repr(times.get(stage, 0.0)) for series, times in stages.items()}}
            for stage in names
        ]
        lines.append({"stage": "sum", **{series: repr(total) for series, total in totals.items()}})
        columns: list[Column] = [
            ("stage", "stage", str),
            *((series, series, number(".3f")) for series in stages),
        ]
        said = join([f"{series} {total:.2f} ms" for series, total in totals.items()])
        found.append(
            Exhibit(
                section="Time of a decode step by stage",
                kind="breakdown",
                name=slug("breakdown", model, context, batch and f"batch-{batch}"),
                title=title,
                words="Mean milliseconds of each stage of a decode step; the stages of a bar add up to it.",
                alt=f"Stacked bars of a decode step by stage, {title}: {said}.",
                paint=lambda figure, stages=stages: paint(figure, stages),  # type: ignore[misc]
                size=(min(9.0, 4.0 + 1.1 * len(stages)), 4.0),
                table=grid(lines, columns),
                data=members,
                origin=origin(members),
            )
        )
    return found


def paint(figure: Any, stages: Stages) -> None:
    """A stacked bar a series, the sum above it, stages in the order of a step from below."""
    axes = figure.add_subplot()
    names = list(dict.fromkeys(stage for times in stages.values() for stage in times))
    totals = [0.0] * len(stages)
    labels = [series.replace(", ", "\n") for series in stages]
    for index, stage in enumerate(names):
        heights = [times.get(stage, 0.0) for times in stages.values()]
        hatch = "" if index < len(PALETTE) else "//"
        colour = PALETTE[index % len(PALETTE)]
        axes.bar(
            labels,
            heights,
            0.55,
            totals,
            label=stage,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
        )
        totals = [total + height for total, height in zip(totals, heights, strict=True)]
    for x, total in enumerate(totals):
        axes.text(x, total, f"{total:.2f} ms", ha="center", va="bottom")
    axes.set_ylim(0, 1.1 * max(*totals, 1e-9))
    axes.set_title("time of a decode step (ms, mean)")
    axes.grid(axis="x", visible=False)
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], texts[::-1], loc="outside right center")
