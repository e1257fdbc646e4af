"""The tables that a report reads, and their rows in common terms.

A row's `kind` identifies it, whatever the file's name; other columns are ignored.  A row keeps its origin
(command, commit, device, versions); kernel times may have a record beside them (`suite.json` of the GPU
suite).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from million_cli.errors import UserError
from million_cli.report import jobs
from million_cli.report.exhibit import Row, to_float
from million_cli.report.kinds import checked
from million_cli.report.labels import label
from million_cli.tables import read_table, records

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("million")

SUITE_COMMAND = "scripts/gpu_suite.sh"
TABLES = ("passkey", "positions", "drift", "ruler", "longbench", "lm_eval", "breakdown")
"""Kinds of tables that jobs name (in a column `<kind>_table`) and figures draw."""


@dataclass
class Data:
    """Rows of all files, by what they measure, and the files themselves: (name, kinds, rows)."""

    quality: list[Row] = field(default_factory=list)
    positions: list[Row] = field(default_factory=list)
    recall: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)
    speed: list[Row] = field(default_factory=list)
    largest: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)
    breakdown: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    files: list[tuple[str, str, int]] = field(default_factory=list)
    jobs: dict[Path, pd.DataFrame] = field(default_factory=dict)


def read(paths: Sequence[Path], run: str) -> Data:
    """All rows of CSV files and of folders of them; hidden files are no results.

    Rows that cannot be used, and files in folders that are no tables of ours, are left out with a line.

    Args:
        run: of job results, `latest` keeps the last run of each file, `all` every one.

    Raises:
        UserError: no such file, a file that is no table of ours, or a folder without any.
    """
    data = Data()
    tables = _tables(paths)
    linked = {
        place.resolve() for path, kinds in tables.items() if "job" in kinds for place in _linked(path, kinds)
    }
    for path, kinds in tables.items():
        if path.resolve() in linked and path not in paths:
            continue
        for kind, frame in kinds.items():
            if kind == "job":
                if run == "latest":
                    frame = frame[frame["run"] == frame["run"].iloc[-1]]
                data.jobs[path] = frame
            take(data, path, kind, frame)
        data.files.append((str(path), ", ".join(kinds), sum(map(len, kinds.values()))))
    for rows in (data.quality, data.positions, data.recall, data.scores, data.breakdown):
        label(rows)
    return data


def of_jobs(path: Path, frame: pd.DataFrame) -> Data:
    """The data of the jobs' table at `path`."""
    data = Data()
    for kind, rows in checked(path, frame).items():
        take(data, path, kind, rows)
    label(data.quality)
    return data


def take(data: Data, path: Path, kind: str, frame: pd.DataFrame, source: Path | None = None) -> None:
    """Add rows of one kind to what they measure; `source` is the table that named this one, if any did."""
    rows = records(frame.assign(source=str(source or path)).drop(columns=["kind", "schema"]))
    if kind == "job":
        _take_jobs(data, path, rows)
    elif kind == "kernel":
        beside = _beside(path)
        data.kernels += [_terms(path, {**beside, **row}) for row in rows]
    elif kind in TAKERS:
        TAKERS[kind](data, [_terms(path, row) for row in rows], kind)


def read_kinds(path: Path) -> dict[str, pd.DataFrame]:
    """The usable rows of the table at `path` by their kind.

    Raises:
        UserError: no such file, no table of ours, or no rows.
    """
    frame = read_table(path)
    missing = [column for column in ("kind", "schema") if column not in frame]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; accepted are tables that this version of million wrote"
        )
    if frame.empty:
        raise UserError(f"{path} has no rows")
    return {kind: rows for kind, rows in checked(path, frame).items() if len(rows)}


def _tables(paths: Sequence[Path]) -> dict[Path, dict[str, pd.DataFrame]]:
    """The tables of files and folders by their path."""
    tables: dict[Path, dict[str, pd.DataFrame]] = {}
    for path in paths:
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*.csv")) if not _is_hidden(file, path)]
            if not found:
                raise UserError(f"no results in {path}: the folder holds no CSV")
            for file in found:
                try:
                    tables[file] = read_kinds(file)
                except UserError as error:
                    logger.warning("left out: %s", error)
        elif path.is_file():
            tables[path] = read_kinds(path)
        else:
            raise UserError(
                f"no results at {path}: run `million eval` or `million bench` first, or name a CSV"
            )
    if paths and not tables:
        raise UserError(f"no results in {', '.join(map(str, paths))}: no CSV there is a table of ours")
    return tables


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _linked(path: Path, kinds: dict[str, pd.DataFrame]) -> Iterator[Path]:
    """The tables that the rows of jobs name."""
    for row in records(kinds["job"]):
        for key, cell in row.items():
            if key.endswith("_table") and cell:
                yield _place(path, row, cell)


def _place(results: Path, row: Row, cell: str) -> Path:
    """Where a table that a job named now lies: there, or under the CSV's folder if the results were moved."""
    path, out = Path(cell), Path(row.get("config.out", ""))
    if not path.is_file() and path.is_relative_to(out):
        return results.parent / path.relative_to(out)
    return path


def _beside(path: Path) -> Row:
    """The origin of kernel times, from the record of the GPU suite."""
    record = path.with_name("suite.json")
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    names = {"commit": "commit", "torch": "torch", "gpu": "device"}
    return {
        "command": SUITE_COMMAND,
        **{ours: str(found[key]) for key, ours in names.items() if key in found},
    }


def _take_jobs(data: Data, path: Path, rows: list[Row]) -> None:
    gone = 0
    for row in rows:
        if row["status"] != "ok":
            data.failures.append(jobs.failure(row))
            continue
        if row.get("kl_e3"):
            data.quality.append(jobs.measured(row))
        if row.get("tpot_ms"):
            data.speed += jobs.times(row)
        data.scores += jobs.averages(row)
        described = {**jobs.terms(row), **{name: row.get(name, "") for name in ("context", "batch")}}
        for name in TABLES:
            if not row.get(f"{name}_table"):
                continue
            table = _place(path, row, row[f"{name}_table"])
            if not table.is_file():
                gone += 1
                continue
            try:
                found = read_kinds(table).get(name)
            except UserError as error:
                logger.warning("left out: %s", error)
                continue
            if found is not None:
                own = {key: cell for key, cell in described.items() if key not in found}
                take(data, table, name, found.assign(**own), source=path)
    if gone:
        logger.warning("%s: %d tables that it names are gone; their figures are left out", path, gone)


def _terms(path: Path, row: Row) -> Row:
    """The terms of a row that is not a job's: its own columns, and the file's name where it has no model."""
    return {
        "model": path.stem,
        "quantizer": "",
        "cache": "",
        "text": "",
        **row,
        "device": row.get("device") or row.get("gpu", ""),
        "bits": row.get("bits") or row.get("bits_nominal", ""),
    }


def _into(name: str) -> Callable[[Data, list[Row], str], None]:
    """Takes rows as they are into the list of that name."""

    def add(data: Data, rows: list[Row], kind: str) -> None:
        getattr(data, name).extend(rows)

    return add


def _e2e(data: Data, rows: list[Row], kind: str) -> None:
    """Rows of `million bench e2e`: the largest batches apart; the stages are in files of their own."""
    for row in rows:
        what, status = row.get("what") or "speed", row.get("status") or "ok"
        if what == "breakdown" or status == "skipped":
            continue
        if status != "ok":
            row["error"] = row.get("note") or status
        (data.largest if what == "largest" else data.speed).append(row)


def _suite(data: Data, rows: list[Row], kind: str) -> None:
    """Scores by task of one suite."""
    for row in rows:
        metric = row.get("metric", "") if kind == "lm_eval" else ""
        parts = (row["task"], metric, row.get("filter", ""), row.get("length", ""))
        name = " ".join(part for part in parts if part not in ("", "none"))
        data.scores.append({**row, "suite": jobs.SUITES[kind], "task": name})


def _breakdown(data: Data, rows: list[Row], kind: str) -> None:
    """A row a stage and series: from columns `<series>_ms` or `_us`, or from `ms` and `series`."""
    for row in rows:
        if row.get("ms"):
            data.breakdown.append({**row, "series": row.get("series") or row.get("impl", "")})
            continue
        cache = ", ".join(filter(None, [row["cache"], row["quantizer"]])) or "cache"
        for key, cell in row.items():
            series, _, unit = key.rpartition("_")
            if unit in ("ms", "us") and cell:
                number = to_float(cell)
                if number is None or number < 0:
                    logger.warning("%s: a cell left out: %s is %r", row["source"], key, cell[:40])
                    continue
                ms = cell if unit == "ms" else repr(number / 1e3)
                data.breakdown.append({**row, "series": cache if series == "cache" else series, "ms": ms})


TAKERS: dict[str, Callable[[Data, list[Row], str], None]] = {
    "passkey": _into("recall"),
    "positions": _into("positions"),
    "drift": _into("positions"),
    "ruler": _suite,
    "longbench": _suite,
    "lm_eval": _suite,
    "breakdown": _breakdown,
    "e2e": _e2e,
    "quality": _into("quality"),
    "scores": _into("scores"),
    "speed": _into("speed"),
    "largest": _into("largest"),
}
"""Kind -> the function that takes its rows; rows of other kinds are not drawn."""
