"""Reports: rows of results as a table on the terminal, and a page of all that they show."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from million_cli.errors import UserError, check
from million_cli.pipelines.config import JobConfig
from million_cli.report import (
    breakdown,
    codebook,
    failures,
    kernels,
    positions,
    quality,
    recall,
    scores,
    sources,
    speed,
    style,
)
from million_cli.report.exhibit import Column, Exhibit, number
from million_cli.report.page import write
from million_cli.report.pictures import plot_quality
from million_cli.tables import records

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("million")

Row = Mapping[str, str]


WHAT: tuple[Column, ...] = (
    ("verb", "verb", str),
    ("config.model.name", "model", str),
    ("config.quantizer.name", "quantizer", str),
    ("config.cache.kind", "cache", str),
    ("bits_nominal", "bits", number(".1f")),
)
MEMORY: tuple[Column, ...] = (
    ("cache_bytes", "cache MiB", number(".2f", 2**-20)),
    ("cache_ratio", "of 16-bit", number(".2f")),
)
QUALITY: tuple[Column, ...] = (
    *WHAT,
    ("perplexity", "perplexity", number(".3f")),
    ("perplexity_change_percent", "change %", number("+.2f")),
    ("kl_e3", "KL e-3", number(".2f")),
    ("kl_se_e3", "+-", number(".2f")),
    ("top1_agreement", "top-1 %", number(".1f", 100)),
    ("drift_kl_e3", "drift KL e-3", number(".2f")),
    ("drift_top1_agreement", "top-1 %", number(".1f", 100)),
    ("drift_first_difference", "differs at", number(".0f")),
    ("recall", "recall %", number(".1f", 100)),
    ("recall_dense", "dense %", number(".1f", 100)),
    ("ruler_average", "RULER", number(".2f")),
    ("ruler_average_dense", "dense", number(".2f")),
    ("ruler_n", "questions", str),
    ("longbench_average", "LongBench", number(".2f")),
    ("longbench_average_dense", "dense", number(".2f")),
    ("longbench_n", "samples", str),
    ("lm_eval_average", "lm-eval", number(".3f")),
    ("lm_eval_average_dense", "dense", number(".3f")),
    *MEMORY,
    ("duration_s", "s", number(".1f")),
)
SPEED: tuple[Column, ...] = (
    *WHAT,
    ("config.bench.context", "context", str),
    ("config.bench.batch", "batch", str),
    ("ttft_ms", "TTFT ms", number(".1f")),
    ("ttft_dense_ms", "dense ms", number(".1f")),
    ("tpot_ms", "TPOT ms", number(".2f")),
    ("tpot_p90_ms", "p90 ms", number(".2f")),
    ("tpot_dense_ms", "dense ms", number(".2f")),
    ("tpot_ratio", "dense/this", number(".2f")),
    *MEMORY,
)
TRAINING: tuple[Column, ...] = (
    *WHAT,
    ("calibration_text", "text", str),
    ("sample_tokens", "tokens", str),
    ("samples", "samples", str),
    ("key_error", "key error", number(".4f")),
    ("value_error", "value error", number(".4f")),
    ("duration_s", "s", number(".1f")),
)
FAILED: tuple[Column, ...] = (
    *WHAT,
    ("status", "status", str),
    ("error", "why", lambda cell: (cell.strip().splitlines() or [""])[-1]),
)


FILES = (
    "breakdown_table",
    "breakdown_plot",
    "positions_table",
    "positions_plot",
    "drift_table",
    "drift_plot",
    "drift_answers_table",
    "passkey_table",
    "passkey_plot",
    "ruler_table",
    "ruler_samples_table",
    "longbench_table",
    "longbench_samples_table",
    "lm_eval_table",
    "lm_eval_samples_table",
    "codebook_file",
    "samples_folder",
)
"""Columns that hold paths worth telling."""


def report(config: JobConfig) -> None:
    """`million report`: the table on the terminal, then the page with its pictures under `out/report`.

    Raises:
        UserError: no results there, a CSV of no known kind, or nothing to show.
    """
    settings = config.report
    own = Path(config.out) / "results.csv"
    if settings.run is not None:
        check("report.run", settings.run, ("latest", "all"))
    named = bool(settings.files or settings.codebooks)
    run = settings.run or ("all" if named else "latest")
    data = sources.read([Path(file) for file in settings.files] if named else [own], run)
    for path, jobs in data.jobs.items():
        show(jobs, path)
    if not settings.page:
        return
    found = exhibits(data, [Path(file) for file in settings.codebooks])
    files = [*data.files, *((file, "a codebook", 0) for file in settings.codebooks)]
    if not found:
        raise UserError(f"{', '.join(name for name, *_ in files)}: nothing that makes a figure")
    if not style.available():
        logger.info("no figures, tables only: matplotlib is not installed (the extra `plots`)")
    command = shlex.join(["million", *sys.argv[1:]])
    page = write(Path(config.out) / "report", found, files, command)
    for exhibit in found:
        print(f"{exhibit.section}: {page.parent / exhibit.name}.{'png' if exhibit.image else 'csv'}")
    print(f"page: {page}")


def exhibits(data: sources.Data, codebooks: Sequence[Path]) -> list[Exhibit]:
    """Everything that there is to show, in the order of the page."""
    return [
        *quality.exhibits(data.quality),
        *positions.exhibits(data.positions),
        *recall.exhibits(data.recall),
        *scores.exhibits(data.scores),
        *speed.exhibits(data.speed),
        *speed.largest(data.largest),
        *kernels.exhibits(data.kernels),
        *breakdown.exhibits(data.breakdown),
        *(codebook.exhibit(path) for path in codebooks),
        *failures.exhibits(data.failures),
    ]


def show(jobs: pd.DataFrame, path: Path, plot: bool = False) -> None:
    """Print jobs of the CSV at `path`, its place, and with `plot` where the plot went."""
    rows = records(jobs)
    groups: dict[tuple[Column, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(columns_for(row), []).append(row)
    for columns, members in groups.items():
        print(table(members, columns), end="\n\n")
    for row in rows:
        if row.get("fallbacks"):
            print(f"fallbacks ({row.get('config.cache.kind', '')}): {row['fallbacks']}")
    for column in FILES:
        files = dict.fromkeys(Path(row[column]) for row in rows if row.get(column))
        places = files if len(files) == 1 else dict.fromkeys(file.parent for file in files)
        for place in places:
            print(f"{column.replace('_', ' ')}: {place}")
    print(f"results: {path}")
    drawn = plot_quality(jobs, path.with_suffix(".png")) if plot else None
    if drawn:
        print(f"plot: {drawn}")


def columns_for(row: Row) -> tuple[Column, ...]:
    """The columns to show of a row, by its measurements."""
    if row["status"] != "ok":
        return FAILED
    if row.get("tpot_ms"):
        return SPEED
    averages = (f"{suite}_average" for suite in ("ruler", "longbench", "lm_eval"))
    judged = any(row.get(column) for column in ("perplexity", "drift_kl_e3", "recall", *averages))
    return QUALITY if judged else TRAINING


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Rows as aligned text, with those of `columns` that any row has."""
    shown = [column for column in columns if any(row.get(column[0]) for row in rows)]
    cells = [[heading for _, heading, _ in shown]]
    cells += [[form(row[name]) if row.get(name) else "-" for name, _, form in shown] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    left = [form is str for _, _, form in shown]
    lines = [
        "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
