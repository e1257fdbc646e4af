"""The time of decode steps by stage.

The spans of a step depend on the device.  On a GPU a span is a kernel of a replayed step (`kernel_stages`),
on a CPU the time between two calls of modules or of the cache (`host_stages`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from million_cli.bench.host_stages import host_spans
from million_cli.bench.kernel_stages import kernel_spans
from million_cli.bench.spans import STAGES, Span
from million_cli.report.pictures import plot_stages
from million_cli.tables import Scalar, write_table


class Share(NamedTuple):
    """The mean time of a span over steps; `kernel` is its name."""

    stage: str
    kernel: str
    launches: float
    us: float


def measure_stages(step: Callable[[], object], steps: int, model: PreTrainedModel) -> list[Share]:
    """Run `steps` >= 2 steps of a model and divide their time; the last one only ends the one before."""
    if model.device.type == "cuda":
        return shares(kernel_spans(step, steps, model.device))
    return shares(host_spans(step, steps, model))


def shares(steps: Sequence[Sequence[Span]]) -> list[Share]:
    """How the time of a step is divided, by stage and span, in the order of `STAGES`, longest first.

    Args:
        steps: the spans of successive steps, in order of start, plus one more step (or just its first span)
            that ends the last.

    Returns:
        Rows whose sum is the mean time from one step's first span to the next's, exactly: where spans
        overlap, the later one counts from the end of the earlier.  The row of `host gap`, when nothing runs,
        has no name.
    """
    assert len(steps) >= 2
    totals: dict[tuple[str, str], float] = {("host gap", ""): 0.0}
    launches: Counter[tuple[str, str]] = Counter()
    for step, following in pairwise(steps):
        end = following[0].start_us
        clock = step[0].start_us
        for span in step:
            totals["host gap", ""] += max(0.0, span.start_us - clock)
            begin = max(clock, span.start_us)
            clock = max(clock, min(span.start_us + span.duration_us, end))
            key = span.stage, span.name
            launches[key] += 1
            totals[key] = totals.get(key, 0.0) + max(0.0, clock - begin)
        totals["host gap", ""] += max(0.0, end - clock)
    count = len(steps) - 1
    rows = [Share(*key, launches[key] / count, total / count) for key, total in totals.items()]
    return sorted(rows, key=lambda row: (STAGES.index(row.stage), -row.us))


def breakdown(rows: Sequence[Share]) -> dict[str, float]:
    """Microseconds of each stage of a step, every name in `STAGES`."""
    return {stage: sum(row.us for row in rows if row.stage == stage) for stage in STAGES}


def write_stages(
    path: Path, found: Mapping[str, Sequence[Share]], title: str, origin: Mapping[str, Scalar]
) -> list[Path]:
    """Write the stages of several implementations: a table, its plot, and the table of all spans.

    Args:
        path: of the table: a row a stage, a column `<implementation>_us` for each.
        found: by implementation.
        origin: columns that every row of the table gets too.

    Returns:
        The files, `path` first; without matplotlib there is no plot.
    """
    stages = {name: breakdown(rows) for name, rows in found.items()}
    table: list[dict[str, Scalar]] = [
        {"stage": stage, **{f"{name}_us": round(us[stage], 2) for name, us in stages.items()}, **origin}
        for stage in STAGES
    ]
    write_table(path, table, "breakdown")
    spans = path.with_name(f"{path.stem}-kernels.csv")
    launched = [
        {"impl": name, **row._asdict(), "us": round(row.us, 2)}
        for name, rows in found.items()
        for row in rows
    ]
    write_table(spans, launched, "breakdown_kernels")
    used = [stage for stage in STAGES if any(us[stage] for us in stages.values())]
    bars = {name: {stage: us[stage] / 1e3 for stage in used} for name, us in stages.items()}
    plot = plot_stages(bars, path.with_suffix(".png"), title)
    return [path, spans, *([plot] if plot else [])]
