"""Jobs that did not finish, which every report lists."""

from __future__ import annotations

from collections.abc import Sequence

from million_cli.report.exhibit import Exhibit, Row, grid, origin

COLUMNS = (
    ("verb", "verb", str),
    ("model", "model", str),
    ("quantizer", "quantizer", str),
    ("cache", "cache", str),
    ("status", "status", str),
    ("why", "why", str),
)


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """A table of them, if any."""
    if not rows:
        return []
    return [
        Exhibit(
            section="Jobs that did not finish",
            kind="failures",
            name="failures",
            title=f"{len(rows)} of them",
            words="",
            alt="",
            paint=None,
            size=(0, 0),
            table=grid(rows, COLUMNS),
            data=rows,
            origin=origin(rows),
        )
    ]
