"""Speed of decoding against context, and the largest batches, for every implementation of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from million_cli.report.exhibit import Exhibit, Row, by, grid, join, number, origin, slug, to_float
from million_cli.report.style import context_axis, look, tokens

COLUMNS = (
    ("name", "implementation", str),
    ("context", "context", lambda cell: tokens(float(cell))),
    ("tpot_ms", "ms a token", number(".2f")),
    ("tpot_p90_ms", "p90", number(".2f")),
    ("ttft_ms", "first token ms", number(".0f")),
    ("tokens_per_s", "tokens/s", number(".0f")),
    ("cache_bytes", "cache GiB", number(".3f", 2**-30)),
    ("peak_bytes", "peak GiB", number(".1f", 2**-30)),
    ("why", "", str),
)


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each model and batch: time a token against context, a line for each implementation."""
    found = []
    for (model, batch), members in by(rows, "model", "batch").items():
        for row in members:
            alike = {other.get("bits", "") for other in members if other["impl"] == row["impl"]}
            row["name"] = row["impl"] + (
                f", {float(row['bits']):g} bits" if len(alike) > 1 and row.get("bits") else ""
            )
            row["why"] = (row.get("error") or "").strip().splitlines()[-1][:60] if row.get("error") else ""
        latest = {(row["name"], row["context"]): row for row in members}
        lines = {name: list(group) for (name,), group in by(list(latest.values()), "name").items()}
        for line in lines.values():
            line.sort(key=lambda row: float(row["context"]))
        timed = [row for row in latest.values() if to_float(row.get("tpot_ms")) is not None]
        if not timed:
            continue
        longest = max(float(row["context"]) for row in timed)
        said = [
            f"{row['name']} {float(row['tpot_ms']):.2f} ms"
            for row in timed
            if float(row["context"]) == longest
        ]
        title = f"{model}, batch {batch}" if batch else model
        several = len({row["context"] for row in timed}) > 1
        found.append(
            Exhibit(
                section="Speed against context",
                kind="speed",
                name=slug("speed", model, batch and f"batch-{batch}"),
                title=title,
                words=(
                    "Time for each output token (median), with the prompt already read. Compare within one "
                    "run only: times depend on the machine."
                ),
                alt=f"Time a token against context, {title}. At {tokens(longest)}: {join(said)}.",
                paint=lambda figure, lines=lines, several=several: (  # type: ignore[misc]
                    paint_lines(figure, lines) if several else paint_bars(figure, lines)
                ),
                size=(7.6, 3.6) if several else (7.0, 1.1 + 0.36 * len(lines)),
                table=grid([row for line in lines.values() for row in line], COLUMNS),
                data=list(latest.values()),
                origin=origin(members),
            )
        )
    return found


LARGEST = (
    ("model", "model", str),
    ("impl", "implementation", str),
    ("context", "context", lambda cell: tokens(float(cell))),
    ("largest_batch", "largest batch", str),
    ("cache_bytes", "cache GiB", number(".1f", 2**-30)),
    ("error", "", str),
)


def largest(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each context: sequences that fit into the GPU's memory, by model and implementation."""
    found = []
    for (context,), members in by(rows, "context").items():
        bars = {
            f"{row['model']}, {row['impl']}": to_float(row.get("largest_batch")) or 0.0 for row in members
        }
        title = f"sequences of {tokens(float(context))} tokens that fit"
        said = join([f"{name} {count:.0f}" for name, count in bars.items()])
        found.append(
            Exhibit(
                section="Largest batch",
                kind="largest",
                name=slug("largest-batch", tokens(float(context))),
                title=title,
                words="Sequences that fit into the GPU's memory beside the model and can take a step.",
                alt=f"Bars of {title}: {said}.",
                paint=lambda figure, bars=bars, title=title: paint_counts(figure, bars, title),  # type: ignore[misc]
                size=(7.0, 1.1 + 0.36 * len(bars)),
                table=grid(members, LARGEST),
                data=members,
                origin=origin(members),
            )
        )
    return found


def paint_counts(figure: Any, bars: dict[str, float], title: str) -> None:
    """A bar a name, its count at its end."""
    axes = figure.add_subplot()
    drawn = axes.barh(list(bars), list(bars.values()), color=look(0)["color"], height=0.62)
    axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(*bars.values(), 1.0))
    axes.set_xlabel(title)
    axes.grid(axis="y", visible=False)


OURS = ("pq", "million", "paged", "contiguous")
"""Parts of our implementations' names."""


def paint_lines(figure: Any, lines: dict[str, list[Row]]) -> None:
    """Milliseconds a token against context, both logarithmic."""
    axes = figure.add_subplot()
    contexts: set[float] = set()
    for index, (name, line) in enumerate(lines.items()):
        points = [(float(r["context"]), ms) for r in line if (ms := to_float(r.get("tpot_ms"))) is not None]
        if not points:
            continue
        contexts |= {context for context, _ in points}
        dashes = {"linestyle": "-" if any(ours in name.lower() for ours in OURS) else "--"}
        axes.plot(
            *zip(*points, strict=True), label=name, linewidth=1.5, markersize=5, **look(index), **dashes
        )
    context_axis(axes, contexts)
    log_times(axes)
    axes.set_title("time for each output token (ms)")
    figure.legend(loc="outside right center")


def paint_bars(figure: Any, lines: dict[str, list[Row]]) -> None:
    """Times at a single context: a bar for each implementation."""
    axes = figure.add_subplot()
    named = [
        (name, ms) for name, line in lines.items() if (ms := to_float(line[-1].get("tpot_ms"))) is not None
    ]
    bars = axes.barh([n for n, _ in named], [ms for _, ms in named], color=look(0)["color"], height=0.62)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(ms for _, ms in named))
    context = next(iter(lines.values()))[-1]["context"]
    axes.set_xlabel(f"time for each output token after {tokens(float(context))} tokens (ms)")
    axes.grid(axis="y", visible=False)


def log_times(axes: Any) -> None:
    """A logarithmic axis of the times that are drawn, with plain numbers at 1, 2 and 5, also at its ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    if 0 < low <= high < math.inf:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        marks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        axes.set_ylim(max(m for m in marks if m < 0.97 * low), min(m for m in marks if m > 1.03 * high))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
