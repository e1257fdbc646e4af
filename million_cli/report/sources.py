"""Which CSVs a report understands, and what their rows say in common terms.

A CSV is known by its columns, whatever its name; columns that are not asked for do no harm.  Whatever a row
says of its origin (command, commit, device, versions) goes with it; a file without such columns may have a
record beside it (`suite.json`, as the GPU suite writes it).
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from million_cli.errors import UserError
from million_cli.report.exhibit import Row, by

logger = logging.getLogger("million")

SUITE_COMMAND = "scripts/gpu_suite.sh"
ORIGIN = ("command", "commit", "device", "torch", "transformers")
MEASURED = (
    *("kl_e3", "kl_se_e3", "perplexity", "perplexity_dense", "perplexity_change_percent", "nll", "nll_dense"),
    *(
        "top1_agreement",
        "recall",
        "recall_dense",
        "recall_low",
        "recall_high",
        "recall_n",
        "tokens",
        "context",
    ),
    *("cache_bytes", "dense_bytes", "cache_ratio", "key_error", "value_error"),
)


@dataclass
class Data:
    """Rows of all files, by what they measure, and the files themselves: (name, kind, rows)."""

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


@dataclass(frozen=True)
class Kind:
    """A CSV with these columns, and what takes its rows apart."""

    name: str
    columns: frozenset[str]
    take: Callable[[Data, Path, list[Row]], None]


def read(paths: Sequence[Path], run: str) -> Data:
    """All rows of CSV files and of folders of them.

    Args:
        run: of job results, `latest` keeps the last run of each file, `all` every one.

    Raises:
        UserError: no such file, a folder without CSVs, an unreadable or empty file, or unknown columns.
    """
    data = Data()
    for path in _files(paths):
        columns, rows = read_csv(path)
        kind = recognise(path, columns)
        if kind.name == "jobs" and run == "latest":
            rows = [row for row in rows if row["run"] == rows[-1]["run"]]
        kind.take(data, path, [{**_beside(path), **row, "source": str(path)} for row in rows])
        data.files.append((str(path), kind.name, len(rows)))
    for rows in (data.quality, data.positions, data.recall, data.scores, data.breakdown):
        label(rows)
    return data


def of_jobs(path: Path, rows: Sequence[Mapping[str, str]]) -> Data:
    """What rows of the jobs' CSV at `path` say."""
    data = Data()
    _jobs(data, path, [{**row, "source": str(path)} for row in rows])
    label(data.quality)
    return data


def read_csv(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows, every cell as text.

    Raises:
        UserError: no such file, not a CSV, or no rows.
    """
    csv.field_size_limit(1 << 26)
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            rows = list(reader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV: {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} is not a CSV: its rows are not equally long")
    if not rows:
        raise UserError(f"{path} has no rows")
    return list(reader.fieldnames or []), rows


def recognise(path: Path, columns: Sequence[str]) -> Kind:
    """The kind of a CSV by its columns.

    Raises:
        UserError: unknown columns; the message lists those that are known.
    """
    for kind in KINDS:
        if kind.columns <= set(columns):
            return kind
    known = "; ".join(f"{kind.name} ({', '.join(sorted(kind.columns))})" for kind in KINDS)
    found = ", ".join(columns[:6]) + (", ..." if len(columns) > 6 else "")
    raise UserError(f"{path}: columns {found} are of no known kind; accepted are CSVs of {known}")


def label(rows: list[Row]) -> None:
    """Give each row a `label`: its quantizer, and how it differs from that one's first row in its file.

    The first is the earliest where rows say when they were measured.  Where files name the same thing alike,
    the file's name is added.
    """
    for members in by(rows, "source", "quantizer").values():
        settings = dict.fromkeys(key for row in members for key in row if key.startswith("set."))
        first = min(members, key=lambda row: row.get("started", ""))
        usual = {key: first.get(key, "") for key in ("cache", *settings)}
        for row in members:
            special = {key: row.get(key, "") for key in usual if row.get(key, "") != usual[key]}
            row["label"] = ", ".join(filter(None, [row.get("quantizer", ""), *_said(special)])) or row.get(
                "cache", ""
            )
    for members in by(rows, "model", "text", "suite", "facts", "label").values():
        files = {row["source"] for row in members}
        for row in members if len(files) > 1 else []:
            row["label"] += f" ({Path(row['source']).parent.name}/{Path(row['source']).name})"


def _said(special: dict[str, str]) -> Iterator[str]:
    """Settings as `name=value`; `scope` and `cache` explain themselves by their values.

    What keys and values have alike is said once, and without a budget not what belongs to one.
    """
    named = {key.removeprefix("set."): value for key, value in special.items()}
    if named.get("budget_bits") == "":
        named = {key: value for key, value in named.items() if key not in ("widths", "measured_tokens")}
    for key, value in named.items():
        side, mark, what = next((key.partition(mark) for mark in "._" if mark in key), (key, "", ""))
        twin = {"key": "value", "keys": "values", "value": "key", "values": "keys"}.get(side)
        if twin and named.get(twin + mark + what) == value:
            if side.startswith("value"):
                continue
            key = what
        yield value if key in ("cache", "scope") else f"{key}={value or 'none'}"


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.csv"))
            if not found:
                raise UserError(f"no results in {path}: the folder holds no CSV")
            linked = {
                table.resolve() for file in found if file.name == "results.csv" for table in _linked(file)
            }
            files += [file for file in found if file.resolve() not in linked]
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(
                f"no results at {path}: run `million eval` or `million bench` first, or name a CSV"
            )
    return list(dict.fromkeys(files))


def _linked(results: Path) -> Iterable[Path]:
    """The tables that the rows of a job's CSV name, which come with it."""
    for row in read_csv(results)[1]:
        for key, cell in row.items():
            if key.endswith("_table") and cell:
                yield _place(results, row, cell)


def _place(results: Path, row: Mapping[str, str], cell: str) -> Path:
    """Where a table that a job named now lies: there, or under the CSV's folder if the results were moved."""
    path, out = Path(cell), Path(row.get("config.out", ""))
    if not path.is_file() and path.is_relative_to(out):
        return results.parent / path.relative_to(out)
    return path


def _beside(path: Path) -> Row:
    """The origin of a CSV that the GPU suite wrote."""
    record = path.with_name("suite.json")
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {"commit": "commit", "torch": "torch", "gpu": "device"}
    return {
        "command": SUITE_COMMAND,
        **{ours: str(found[key]) for key, ours in names.items() if key in found},
    }


def _jobs(data: Data, path: Path, rows: list[Row]) -> None:
    gone = 0
    for row in rows:
        terms = _job_terms(row)
        if row["status"] != "ok":
            why = (row.get("error") or "").strip().splitlines()
            data.failures.append(
                {**terms, "verb": row["verb"], "status": row["status"], "why": (why or [""])[-1]}
            )
            continue
        if row.get("kl_e3"):
            data.quality.append({**terms, **_measured(row)})
        if row.get("tpot_ms"):
            data.speed += _job_times(row, terms)
        for suite, name in SUITES.items():
            if row.get(f"{suite}_average"):
                total = {"score": row[f"{suite}_average"], "dense": row[f"{suite}_average_dense"]}
                data.scores.append({**terms, "suite": name, "task": "average", **total})
        for key, take in LINKED.items():
            if not row.get(key):
                continue
            table = _place(path, row, row[key])
            if table.is_file():
                shape = {name: row.get(name, "") for name in ("context", "batch")}
                take(data, table, [{**terms, **shape, **cells} for cells in read_csv(table)[1]])
            else:
                gone += 1
    if gone:
        logger.info("%s: %d tables that it names are gone; their figures are left out", path, gone)


def _job_terms(row: Row) -> Row:
    """What a job's row says of itself, in the terms of all exhibits."""
    name = row.get("config.model.name", "")
    if name == "folder":
        name = Path(row.get("config.model.path", "")).name
    text = row.get("config.task.path") or row.get("config.task.dataset", "")
    settings = {
        "set." + key.split(".", 2)[2]: cell
        for key, cell in row.items()
        if key.split(".")[:2] in (["config", "quantizer"], ["config", "train"], ["config", "sample"])
        or key in ("config.cache.page_size", "config.cache.extended_residual")
    }
    settings.pop("set.name", None)
    return {
        "model": name,
        "quantizer": row.get("config.quantizer.name", ""),
        "cache": row.get("config.cache.kind", ""),
        "bits": row.get("bits_nominal", ""),
        "text": Path(text).name,
        **settings,
        **{key: row.get(key, "") for key in (*ORIGIN, "source")},
    }


def _job_times(row: Row, terms: Row) -> list[Row]:
    """The two caches that `million bench` times, as two rows."""
    shared = {**terms, "context": row["context"], "batch": row["batch"]}
    times = ("ttft", "tpot", "tpot_p90")
    cache = ", ".join(filter(None, [terms["cache"], terms["quantizer"]]))
    ours = {f"{name}_ms": row.get(f"{name}_ms", "") for name in times}
    dense = {f"{name}_ms": row.get(f"{name}_dense_ms", "") for name in times}
    bytes_ = {"tokens_per_s": row.get("tokens_per_s", ""), "cache_bytes": row.get("cache_bytes", "")}
    rows = [{**shared, "impl": "dense", "bits": "", **dense, "cache_bytes": row.get("dense_bytes", "")}]
    return rows if terms["cache"] == "dense" else [*rows, {**shared, "impl": cache, **ours, **bytes_}]


def _measured(row: Row) -> Row:
    return {key: row[key] for key in MEASURED if row.get(key)}


def _terms(path: Path, row: Row) -> Row:
    """The terms of a row that is not a job's: its own columns, and the file's name where it has none."""
    device = row.get("device") or row.get("gpu", "")
    bits = row.get("bits") or row.get("bits_nominal", "")
    return {
        "model": path.stem,
        "quantizer": "",
        "cache": "",
        "text": "",
        **row,
        "device": device,
        "bits": bits,
    }


def _accuracy(data: Data, path: Path, rows: list[Row]) -> None:
    known = {
        *MEASURED,
        *ORIGIN,
        "source",
        "quantizer",
        "text",
        "model",
        "cache",
        "bits",
        "bits_nominal",
        "label",
    }
    known |= {"started", "duration_s", "samples", "gpu"}
    for row in rows:
        settings = {
            f"set.{key}": cell for key, cell in row.items() if key not in known and not key.startswith("set.")
        }
        data.quality.append({**_terms(path, row), **settings})


def _into(name: str) -> Callable[[Data, Path, list[Row]], None]:
    """Takes rows as they are into the list of that name."""

    def take(data: Data, path: Path, rows: list[Row]) -> None:
        getattr(data, name).extend(_terms(path, row) for row in rows)

    return take


def _decode_times(data: Data, path: Path, rows: list[Row]) -> None:
    """Rows of `million bench e2e` too: the largest batches apart; the stages are in files of their own."""
    for row in rows:
        what, status = row.get("what") or "speed", row.get("status") or "ok"
        if what == "breakdown" or status == "skipped":
            continue
        terms = _terms(path, row)
        if status != "ok":
            terms["error"] = row.get("note") or status
        (data.largest if what == "largest" else data.speed).append(terms)


def _scores(suite: str) -> Callable[[Data, Path, list[Row]], None]:
    def take(data: Data, path: Path, rows: list[Row]) -> None:
        for row in rows:
            parts = (row["task"], row.get("metric", "") if suite == "lm_eval" else "", row.get("filter", ""))
            own = row["task"] if row.get("suite") else None  # a report's own CSV
            name = own or " ".join(part for part in parts if part not in ("", "none"))
            data.scores.append(
                {**_terms(path, row), "suite": row.get("suite") or SUITES[suite], "task": name}
            )

    return take


def _breakdown(data: Data, path: Path, rows: list[Row]) -> None:
    """A row a stage and series: columns `<series>_ms` or `_us`, or `ms` and a column naming the series."""
    for row in rows:
        terms = _terms(path, row)
        if row.get("ms"):
            data.breakdown.append({**terms, "series": row.get("series") or row.get("impl", "")})
            continue
        for key, cell in row.items():
            if key.endswith("_ms") and cell:
                cache = ", ".join(filter(None, [terms["cache"], terms["quantizer"]])) or "cache"
                series = key.removesuffix("_ms")
                series = cache if series == "cache" else series
                data.breakdown.append({**terms, "series": series, "ms": cell})
            elif key.endswith("_us") and cell:
                ms = repr(float(cell) / 1e3)
                data.breakdown.append({**terms, "series": key.removesuffix("_us"), "ms": ms})


def _nothing(data: Data, path: Path, rows: list[Row]) -> None:
    """Answers or kernels one by one, or sums of what is drawn: to be read, not drawn."""


SUITES = {"longbench": "LongBench", "lm_eval": "lm-evaluation-harness"}
KINDS = (
    Kind("jobs", frozenset({"run", "verb", "status"}), _jobs),
    Kind("recall by cell", frozenset({"length", "depth", "recall"}), _into("recall")),
    Kind("recall in all", frozenset({"quantizer", "recall_lost", "recall_n"}), _nothing),
    Kind("quality by position", frozenset({"first", "last", "kl_e3"}), _into("positions")),
    Kind("accuracy", frozenset({"quantizer", "kl_e3"}), _accuracy),
    Kind("kernel times", frozenset({"impl", "context", "median_us"}), _into("kernels")),
    Kind("decode times", frozenset({"impl", "context", "tpot_ms"}), _decode_times),
    Kind("kernels of stages", frozenset({"impl", "stage", "kernel", "launches"}), _nothing),
    Kind("stage times", frozenset({"stage"}), _breakdown),
    Kind("answers", frozenset({"task", "id", "prediction"}), _nothing),
    Kind("lm-eval scores", frozenset({"task", "metric", "filter", "score", "dense"}), _scores("lm_eval")),
    Kind("scores", frozenset({"task", "score", "dense"}), _scores("longbench")),
)
LINKED: dict[str, Callable[[Data, Path, list[Row]], None]] = {
    "passkey_table": _into("recall"),
    "positions_table": _into("positions"),
    "longbench_table": _scores("longbench"),
    "lm_eval_table": _scores("lm_eval"),
    "breakdown_table": _breakdown,
}
"""Columns of a job that name its tables, and what takes them."""
