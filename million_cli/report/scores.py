"""Scores of task suites: averages beside the dense cache's, and a table by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from million_cli.report.exhibit import Column, Exhibit, Row, by, grid, join, number, origin, slug, to_float
from million_cli.report.style import DENSE, PALETTE

Score = number(".2f")
AVERAGES = (
    ("label", "quantizer", str),
    ("bits", "bits", number(".1f")),
    ("score", "average", Score),
    ("dense", "dense", Score),
)


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each suite and model: a bar for each quantizer, the dense cache's average as a line."""
    found = []
    for (suite, model), members in by(rows, "suite", "model").items():
        tasks = by(members, "task")
        labels = list(dict.fromkeys(row["label"] for row in members))
        latest = {(row["task"], row["label"]): row for row in members}
        averages = [
            mean
            for label in labels
            if (mean := average(label, [row for row in latest.values() if row["label"] == label]))
        ]
        if not averages:
            continue
        said = join([f"{row['label'] or 'the cache'} {float(row['score']):.2f}" for row in averages])
        dense = float(averages[0]["dense"])
        columns: list[Column] = [
            ("task", "task", str),
            ("dense", "dense", Score),
            *((label, label, Score) for label in labels),
        ]
        lines = []
        for (task,), group in tasks.items():
            scores = {
                label: latest[task, label].get("score", "") for label in labels if (task, label) in latest
            }
            lines.append({"task": task, "dense": group[-1].get("dense", ""), **scores})
        found.append(
            Exhibit(
                section="Scores of tasks",
                kind="scores",
                name=slug(suite, model),
                title=f"{suite}, {model}",
                words=f"The mean over tasks, as {suite} defines each score; dashed is the dense cache.",
                alt=f"Bars of the average score of {suite} on {model}: dense {dense:.2f}, {said}.",
                paint=lambda figure, averages=averages: paint(figure, averages),  # type: ignore[misc]
                size=(7.0, 1.4 + 0.34 * len(averages)),
                table=grid(averages, AVERAGES),
                data=members,
                origin=origin(members),
                details=grid(lines, columns) if len(tasks) > 1 else None,
            )
        )
    return found


def average(label: str, rows: Sequence[Row]) -> Row | None:
    """The suite's own average of one quantizer, or the mean over the tasks in its table that have scores."""
    scored = [row for row in rows if None not in (to_float(row.get("score")), to_float(row.get("dense")))]
    own = [row for row in scored if row["task"] == "average"] or scored
    if not own:
        return None
    means = {key: repr(sum(float(row[key]) for row in own) / len(own)) for key in ("score", "dense")}
    return {"label": label, "bits": own[0].get("bits", ""), **means}


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Horizontal bars with their values."""
    axes = figure.add_subplot()
    dense = float(rows[0]["dense"])
    names = ["dense", *(row["label"] or "cache" for row in rows)]
    scores = [dense, *(float(row["score"]) for row in rows)]
    bars = axes.barh(names, scores, color=["#8a9399", *[PALETTE[0]] * len(rows)], height=0.62)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(dense, **DENSE)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(*scores, 1e-9))
    axes.set_xlabel("average score")
    axes.grid(axis="y", visible=False)
