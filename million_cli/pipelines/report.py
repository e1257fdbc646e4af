"""Reports: rows of results as a table on the terminal, and plots of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from million_cli.errors import UserError
from million_cli.pipelines.config import JobConfig, check
from million_cli.pipelines.plots import plot_quality
from million_cli.results import read_rows

Row = Mapping[str, str]


def number(form: str, factor: float = 1.0) -> Callable[[str], str]:
    """Formats a cell's number, scaled by `factor`."""
    return lambda cell: format(float(cell) * factor, form)


Column = tuple[str, str, Callable[[str], str]]
"""Column of the CSV, heading, format."""

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
    ("recall", "recall %", number(".1f", 100)),
    ("recall_dense", "dense %", number(".1f", 100)),
    ("longbench_average", "LongBench", number(".2f")),
    ("longbench_average_dense", "dense", number(".2f")),
    ("longbench_n", "samples", str),
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
    ("error", "why", lambda cell: cell.splitlines()[-1]),
)


FILES = (
    "breakdown_table",
    "breakdown_plot",
    "passkey_table",
    "longbench_table",
    "longbench_samples_table",
    "codebook_file",
    "samples_folder",
)
"""Columns that hold paths worth telling."""


def report(config: JobConfig) -> None:
    """`million report`: print the table, say where the CSV is, draw the plot beside it.

    Raises:
        UserError: no results there, or nothing to plot where.
    """
    check("report.run", config.report.run, ("latest", "all"))
    path = Path(config.report.csv) if config.report.csv else Path(config.out) / "results.csv"
    _, rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows")
    if config.report.run == "latest":
        rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    show(rows, path, plot=config.report.plot)


def show(rows: Sequence[Row], path: Path, plot: bool = False) -> None:
    """Print rows of the CSV at `path`, its place, and with `plot` where the plot went."""
    groups: dict[tuple[Column, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(columns_for(row), []).append(row)
    for columns, members in groups.items():
        print(table(members, columns), end="\n\n")
    for row in rows:
        if row.get("fallbacks"):
            print(f"fallbacks ({row['config.cache.kind']}): {row['fallbacks']}")
    for column in FILES:
        files = dict.fromkeys(Path(row[column]) for row in rows if row.get(column))
        places = files if len(files) == 1 else dict.fromkeys(file.parent for file in files)
        for place in places:
            print(f"{column.replace('_', ' ')}: {place}")
    print(f"results: {path}")
    drawn = plot_quality(rows, path.with_suffix(".png")) if plot else None
    if drawn:
        print(f"plot: {drawn}")


def columns_for(row: Row) -> tuple[Column, ...]:
    """What of a row is worth showing, by what it measured."""
    if row["status"] != "ok":
        return FAILED
    if row.get("tpot_ms"):
        return SPEED
    judged = any(row.get(column) for column in ("perplexity", "recall", "longbench_average"))
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
