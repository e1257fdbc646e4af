"""A figure with its title, words, table, data and origin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, str]


@dataclass(frozen=True)
class Grid:
    """A table: headings, rows of text, and which columns hold numbers (aligned right)."""

    headings: list[str]
    rows: list[list[str]]
    numeric: list[bool]


@dataclass(frozen=True)
class Origin:
    """The origin of rows, as far as their file says."""

    files: list[str]
    commands: list[str]
    commits: list[str]
    devices: list[str]
    versions: list[str]


@dataclass
class Exhibit:
    """One figure.

    Attributes:
        section: heading that it stands under.
        kind: of its rows in the CSV beside the picture (see `kinds`).
        name: of its files, without suffix.
        words: a sentence or two on what it shows and how to read it.
        alt: a description of the picture for readers who cannot see it.
        paint: fills a matplotlib figure of `size` inches; None where a table says it all.
        data: rows for the CSV beside the picture.
        details: a longer table, after the others.
    """

    section: str
    kind: str
    name: str
    title: str
    words: str
    alt: str
    paint: Callable[[Any], None] | None
    size: tuple[float, float]
    table: Grid | None
    data: Sequence[Mapping[str, str]]
    origin: Origin
    details: Grid | None = None
    image: str = field(default="", init=False)
    """The picture as a `data:` address, once drawn."""


Column = tuple[str, str, Callable[[str], str]]
"""Key of the row, heading, format."""


def number(form: str, factor: float = 1.0, unit: str = "") -> Callable[[str], str]:
    """Formats a cell's number, scaled by `factor`; a cell that is no number stays as it is."""

    def show(cell: str) -> str:
        value = to_float(cell)
        if value is None:
            return cell
        text = format(value * factor, form)
        return (text.lstrip("-") if float(text) == 0 else text) + unit  # rounding leaves no -0.00

    return show


def grid(rows: Iterable[Mapping[str, str]], columns: Sequence[Column]) -> Grid:
    """Rows as a table, with those of `columns` that any row has."""
    rows = list(rows)
    shown = [column for column in columns if any(row.get(column[0]) for row in rows)]
    return Grid(
        [heading for _, heading, _ in shown],
        [[form(row[key]) if row.get(key) else "–" for key, _, form in shown] for row in rows],
        [form is not str for _, _, form in shown],
    )


def to_float(cell: str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def origin(rows: Iterable[Mapping[str, str]]) -> Origin:
    """The origin in the rows' own columns, each value once."""
    rows = list(rows)

    def each(*keys: str) -> list[str]:
        return list(dict.fromkeys(row[key] for row in rows for key in keys if row.get(key)))

    versions = [f"{package} {value}" for package in ("torch", "transformers") for value in each(package)]
    return Origin(each("source"), each("command"), each("commit"), each("device"), versions)


def by(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows in groups of equal cells, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in keys), []).append(row)
    return groups


def slug(*parts: str) -> str:
    """A file name's stem from words, of at most 100 characters."""
    text = "-".join(part for part in parts if part)[:100]
    return "-".join(
        filter(None, "".join(c if c.isalnum() or c in "._" else "-" for c in text.lower()).split("-"))
    )


def join(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
