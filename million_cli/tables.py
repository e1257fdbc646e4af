"""Result tables: pandas frames of text, and the CSV files that keep them.

Each row says what it is: `kind` (job, passkey, kernel, ...) and `schema`, the version of that kind's columns.
A cell is text from file to frame, so a float comes back bit for bit (it is written as Python's `repr`) and a
bad cell spoils nothing; whoever needs numbers converts the columns it needs.  An empty cell is no value.

Text that a spreadsheet would run as a formula is written with an apostrophe in front, and read without it.
Line ends within a cell become newlines, and bytes of file names that are no UTF-8 backslash escapes.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from million_cli.errors import UserError
from million_cli.files import write_text

if TYPE_CHECKING:
    import pandas as pd

Scalar = str | int | float | bool | None
SCHEMA = 1
LOCK_TIMEOUT_S = 120.0
_FORMULA = re.compile("'*(?:\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\\t\\r\\n])")
"""Starts of cells that spreadsheets run (OWASP, CSV injection), behind any number of our apostrophes."""


def read_table(path: Path) -> pd.DataFrame:
    """The table at `path`, every cell as text.

    Raises:
        UserError: no such file, not a CSV, or its rows are not equally long.
    """
    import pandas as pd

    if not path.is_file():
        raise UserError(f"no such table: {path}")
    csv.field_size_limit(1 << 26)  # pandas reads with the csv module, the only one to tell a short row
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, dtype=str, na_filter=False, engine="python", encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, csv.Error, pd.errors.ParserWarning) as error:
        raise UserError(f"{path} is not a CSV: {' '.join(str(error).split())}") from error
    if frame.isna().any(axis=None) or not isinstance(frame.index, pd.RangeIndex) or frame.index.start != 0:
        raise UserError(f"{path} is not a CSV: its rows are not equally long")
    return frame.rename(columns=_read).map(_read)


def write_table(path: Path, rows: pd.DataFrame | Iterable[Mapping[str, Any]], kind: str) -> None:
    """Write `rows`, all of one kind, as a CSV: kind, schema, then the columns in order of first appearance.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, _to_csv(frame_of(rows, kind)))


def append_row(path: Path, row: Mapping[str, Scalar], kind: str) -> None:
    """Append `row` to the results CSV at `path`, adding the columns it lacks.

    The file is rewritten beside itself and renamed under a lock, so two processes lose nothing and a crash
    leaves the old file.

    Raises:
        UserError: the folder cannot be written, or the file there is no results CSV.
    """
    import pandas as pd

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
            new = frame_of([row], kind)
            if path.exists():
                old = read_results(path)
                columns = merge_columns([*map(str, old)], [*map(str, new)])
                new = pd.concat([old, new]).reindex(columns=columns).fillna("")
            write_text(path, _to_csv(new))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_results(path: Path) -> pd.DataFrame:
    """The jobs' table at `path`.

    Raises:
        UserError: as `read_table`, or it has no column `run`.
    """
    if not path.is_file():
        raise UserError(
            f"no results at {path}: run `million eval` or `million run` first, or name a results CSV"
        )
    try:
        frame = read_table(path)
    except UserError as error:
        raise UserError(f"{path} is not a results CSV: {str(error).removeprefix(f'{path} ')}") from error
    if "run" not in frame:
        raise UserError(f"{path} is not a results CSV: it has no column `run`")
    return frame


def frame_of(rows: pd.DataFrame | Iterable[Mapping[str, Any]], kind: str) -> pd.DataFrame:
    """Rows as a frame of text with their kind and schema; a row's own kind and schema are replaced."""
    import pandas as pd

    if isinstance(rows, pd.DataFrame):
        rows = records(rows.astype(object).where(rows.notna(), None))
    cells = [
        {"kind": kind, "schema": str(SCHEMA)}
        | {key: _cell(value) for key, value in row.items() if key not in ("kind", "schema")}
        for row in rows
    ]
    columns: list[str] = ["kind", "schema"]
    for row in cells:
        if not row.keys() <= set(columns):
            columns = merge_columns(columns, list(row))
    return pd.DataFrame(cells, columns=columns, dtype=object).fillna("")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dictionaries."""
    return [{str(key): cell for key, cell in row.items()} for row in frame.to_dict("records")]


def merge_columns(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """All of `old` in order; each new name goes right behind its neighbour in `new`.

    So a new metric lands among the metrics and a new setting among the settings.
    """
    merged = list(old)
    known = set(merged)
    place = 0
    for name in new:
        if name in known:
            place = merged.index(name) + 1
        else:
            merged.insert(place, name)
            known.add(name)
            place += 1
    return merged


def _cell(value: Scalar) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return float.__repr__(value)  # numpy's own names its type
    return str(value).encode("utf-8", "backslashreplace").decode()


def _to_csv(frame: pd.DataFrame) -> str:
    text: str = frame.rename(columns=_written).map(_written).to_csv(index=False, lineterminator="\n")
    return text


def _written(cell: str) -> str:
    """A cell as it stands in the file: a formula is preceded by an apostrophe, a number is none."""
    cell = re.sub("\r\n?", "\n", cell)
    return f"'{cell}" if _FORMULA.match(cell) and not _is_number(cell) else cell


def _read(cell: str) -> str:
    """The cell that `_written` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell == cell.strip()
