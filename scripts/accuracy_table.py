"""The columns of a results CSV that tell quality against bits, one row a measurement, least KL first.

    python scripts/accuracy_table.py outputs/results.csv [more.csv ...] accuracy.csv
    python scripts/accuracy_table.py --recall outputs/results.csv [more.csv ...] recall.csv
    python scripts/accuracy_table.py --cells outputs/results.csv [more.csv ...] cells.csv

The second is recall in all, the third by length and depth, from the tables that the results name.  A text is
that of the file or data set which the measurement read; files in commands are named without their folders.
Earlier tables may be among the sources: of measurements of the same thing the latest is kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from million_cli.errors import UserError
from million_cli.report.sources import read_csv
from million_cli.results import write_rows

COLUMNS = (
    "bits_nominal",
    "kl_e3",
    "kl_se_e3",
    "perplexity",
    "perplexity_dense",
    "perplexity_change_percent",
    "top1_agreement",
    "recall",
    "recall_dense",
    "tokens",
    "key_error",
    "value_error",
    "samples",
    "commit",
    "started",
    "duration_s",
    "torch",
    "device",
    "command",
)
RECALL = (
    "bits_nominal",
    "recall",
    "recall_low",
    "recall_high",
    "recall_dense",
    "recall_lost",
    "recall_gained",
    "recall_n",
    "commit",
    "started",
    "duration_s",
    "torch",
    "device",
    "command",
)
ORIGIN = ("commit", "started", "torch", "device", "command")
SETTINGS = {
    "scope": "config.quantizer.scope",
    "key_rotation": "config.quantizer.keys.rotation",
    "value_rotation": "config.quantizer.values.rotation",
    "key_metric": "config.quantizer.keys.metric",
    "value_metric": "config.quantizer.values.metric",
    "weighting": "config.quantizer.weighting",
    "budget_bits": "config.quantizer.bits",
    "widths": "config.quantizer.widths",
    "sampled_tokens": "config.sample.tokens",
    "reservoir": "config.sample.reservoir",
    "information_tokens": "config.sample.information",
    "code_share": "config.sample.code",
    "repeats_share": "config.sample.repeats",
    "alternations": "config.train.alternations",
    "measured_tokens": "config.train.measured",
}


def table(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One line a finished measurement of quality."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: row["started"]):
        if "text" in row:  # of an earlier table
            lines[_what(row)] = {**row, "command": without_folders(row["command"])}
        elif row.get("status") == "ok" and row.get("kl_e3"):
            is_pq = row["config.quantizer.kind"] == "pq"
            settings = {name: row.get(key, "") if is_pq else "" for name, key in SETTINGS.items()}
            if not settings["budget_bits"]:
                settings["widths"] = settings["measured_tokens"] = ""  # nothing to choose
            text = Path(row.get("config.task.path") or row["config.task.dataset"]).name
            measured = {column: row.get(column, "") for column in COLUMNS}
            measured["command"] = without_folders(measured["command"])
            line = {"quantizer": row["config.quantizer.name"], "text": text, **settings, **measured}
            lines[_what(line)] = line
    return sorted(lines.values(), key=lambda line: (line["text"], float(line["kl_e3"])))


def recall(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One line a finished measurement of recall, most bits first."""
    lines = []
    for row in rows:
        if row.get("status") == "ok" and row.get("recall"):
            task = {name: row.get(f"config.task.{name}", "") for name in ("facts", "lengths", "samples")}
            measured = {column: row.get(column, "") for column in RECALL}
            measured["command"] = without_folders(measured["command"])
            lines.append({"quantizer": row["config.quantizer.name"], **task, **measured})
    return sorted(lines, key=lambda line: -float(line["bits_nominal"]))


def cells(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One line a length, depth and finished measurement of recall, most bits first."""
    lines = []
    for row in sorted(rows, key=lambda row: -float(row.get("bits_nominal") or 0)):
        if row.get("status") == "ok" and row.get("passkey_table"):
            origin = {name: row.get(name, "") for name in ("bits_nominal", *ORIGIN)}
            origin["command"] = without_folders(origin["command"])
            named = Path(row["passkey_table"])
            beside = Path(row["source"]).parent / "evaluations" / named.name
            table = beside if beside.is_file() else named
            lines += [
                {"quantizer": row["config.quantizer.name"], **cell, **origin} for cell in read_csv(table)[1]
            ]
    return lines


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results CSV, with its path as `source`, or of an earlier table.

    Raises:
        UserError: it cannot be read, or is neither.
    """
    columns, rows = read_csv(path)
    if {"quantizer", "text"} <= set(columns):
        return rows
    if "config.quantizer.name" not in columns:
        raise UserError(f"{path}: accepted are results CSVs and tables with columns quantizer and text")
    return [{**row, "source": str(path)} for row in rows]


def without_folders(command: str) -> str:
    """The command with the last part alone of every absolute path."""
    return re.sub(r"(?<![\w.])/(?:[^\s,/'\"]+/)+", "", command)


def _what(line: dict[str, str]) -> tuple[str, ...]:
    """What a line measures; a uniform quantizer and one with a budget are two things of one name."""
    return tuple(line.get(name) or "" for name in ("quantizer", "text", *SETTINGS))


def main(
    files: Annotated[
        list[Path], typer.Argument(help="results CSVs or earlier tables, and last the one to write")
    ],
    in_all: Annotated[bool, typer.Option("--recall", help="recall in all")] = False,
    by_cell: Annotated[bool, typer.Option("--cells", help="recall by length and depth")] = False,
) -> None:
    """Write the table of the measurements in FILES to the last of them."""
    *sources, target = files
    if not sources:
        raise typer.BadParameter(
            f"{target}: accepted are one or more CSVs to read, and last the one to write"
        )
    if in_all and by_cell:
        raise typer.BadParameter("--recall --cells: accepted is one of them")
    try:
        rows = [row for source in sources for row in read(source)]
        write_rows(target, (recall if in_all else cells if by_cell else table)(rows))
    except UserError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
