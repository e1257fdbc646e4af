"""Labels of rows in figures: the quantizer, and settings that differ from the usual ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from million_cli.report.exhibit import Row, by


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

    What keys and values have alike is said once.  Without a budget of bits, its settings are not said.
    """
    named = {key.removeprefix("set."): value for key, value in special.items()}
    if named.get("bits") == "":
        named = {key: value for key, value in named.items() if key not in ("widths", "measured")}
    for key, value in named.items():
        side, dot, what = key.partition(".")
        twin = {"keys": "values", "values": "keys"}.get(side) if dot else None
        if twin and named.get(f"{twin}.{what}") == value:
            if side == "values":
                continue
            key = what
        yield value if key in ("cache", "scope") else f"{key}={value or 'none'}"
