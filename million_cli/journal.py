"""Rows that are written as soon as they are made, so that a long job continues where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from million_cli.errors import UserError


class Journal:
    """Values by key, in a file of JSON lines that only grows; without a path, in memory alone.

    Reading skips a line that a crash cut short; its rows are made again.
    Processes may write to one file at a time: each `add` is one appending write.

    Args:
        path: the file; it and its folder need not exist.
        fresh: do not read what is there (a later row of the same key wins all the same).

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None, fresh: bool = False) -> None:
        self.path = path
        self._rows: dict[str, Any] = {}
        if path is not None and path.is_file() and not fresh:
            try:
                lines = path.read_bytes().split(b"\n")
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            for line in lines:
                self._take(line)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Mapping[str, Any]) -> None:
        """Keep `rows` (values are JSON), all in one write that is on the disk when this returns.

        Raises:
            UserError: the file cannot be written.
        """
        if self.path is not None and rows:
            lines = "".join(
                json.dumps({"key": k, "value": v}, ensure_ascii=False) + "\n" for k, v in rows.items()
            )
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab", buffering=0) as file:
                    # The newline in front ends a line that a crash cut short; empty lines mean nothing.
                    file.write(b"\n" + lines.encode("utf-8", "surrogatepass"))
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._rows.update(rows)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            self._rows[row["key"]] = row["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return


@dataclass(frozen=True)
class Journals:
    """The journals of the cache under test and of the dense cache; one journal if they are the same."""

    cache: Journal = field(default_factory=Journal)
    dense: Journal = field(default_factory=Journal)
