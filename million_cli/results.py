"""The record of one job and the CSV it is kept in.  Knows nothing of the rest of the package.

A record is one row.  Columns, in this order:

    kind, schema                                `job` and its columns' version (see `tables`)
    run, verb, status, started, duration_s      which job; status is ok, refused (the user's mistake), failed
                                                (ours) or interrupted (by a signal or a closed pipe)
    command, commit, host, device, dtype, ...   where it came from (`Provenance`)
    <metric>                                    what was measured, units in the name
    fallbacks, error                            `; `-separated reasons; error text (with traceback if failed)
    config.<path>                               the whole configuration, flattened

A file grows new columns when a record has them; earlier rows then hold empty cells.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from million_cli._version import __version__
from million_cli.errors import UserError
from million_cli.files import write_text
from million_cli.tables import Scalar, append_row, read_results

Status = Literal["ok", "refused", "failed", "interrupted"]

CHECKOUT = Path(__file__).resolve().parent.parent
"""Root of the checkout this package runs from; site-packages if it is installed."""


running: ContextVar[str] = ContextVar("running", default="")
"""The command that runs, for files beside its record."""


@dataclass(frozen=True)
class Provenance:
    """Where a record came from."""

    command: str
    commit: str
    host: str
    python: str
    million: str
    torch: str
    transformers: str
    device: str = ""
    dtype: str = ""

    @classmethod
    def here(cls, command: str, device: str = "", dtype: str = "") -> Provenance:
        """This process: its versions and, in a checkout, the git commit (`+dirty` if changed)."""
        return cls(
            command=command,
            commit=git_commit(),
            host=platform.node(),
            python=platform.python_version(),
            million=version("million"),
            torch=version("torch"),
            transformers=version("transformers"),
            device=device,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Record:
    """One job: its command, machine and results."""

    run: str
    verb: str
    status: Status
    started: str
    duration_s: float
    provenance: Provenance
    config: Mapping[str, Any]
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    fallbacks: Sequence[str] = ()
    error: str = ""

    def row(self) -> dict[str, Scalar]:
        """The record as one flat row; see the module's head for the columns."""
        head: dict[str, Scalar] = {
            "run": self.run,
            "verb": self.verb,
            "status": self.status,
            "started": self.started,
            "duration_s": round(self.duration_s, 3),
            **asdict(self.provenance),
        }
        tail: dict[str, Scalar] = {"fallbacks": "; ".join(self.fallbacks), "error": self.error}
        clash = (head.keys() | tail.keys()) & self.metrics.keys()
        assert not clash, f"metrics named like fixed columns: {clash}"
        return {**head, **self.metrics, **tail, **flatten(self.config, "config")}

    def save(self, folder: Path) -> Path:
        """Append the row to `folder/results.csv` and write it whole to `folder/records/`.

        A result that does not fit there is written beside it, or into the system's temporary folder, or
        printed; standard error says where.

        Returns:
            The path of the CSV that has the row.

        Raises:
            UserError: the row cannot be kept and is no result (a job that failed), or no place takes it;
                nothing recorded earlier is lost.
        """
        table = folder / "results.csv"
        stamp = self.started.replace(":", "").replace("+0000", "Z")
        name = f"{stamp}-{self.verb}-{os.getpid()}-{datetime.now(UTC):%f}.json"
        content = {**asdict(self), "fallbacks": list(self.fallbacks)}
        whole = json.dumps(content, indent=1, default=str) + "\n"
        try:
            write_text(folder / "records" / name, whole)
            append_row(table, self.row(), "job")
        except UserError as error:
            if self.status != "ok":
                raise
            beside = f"results-{name.removesuffix('.json')}.csv"
            for place in (folder / beside, Path(tempfile.gettempdir()) / f"million-{beside}"):
                with suppress(UserError):
                    append_row(place, self.row(), "job")
                    print(f"million: {error}; the result is in {place}", file=sys.stderr)
                    return place
            print(f"million: {error}; the result follows\n{whole}", file=sys.stderr)
            raise
        return table


def check_destination(folder: Path) -> None:
    """Raise before any work unless `folder` takes results.

    Raises:
        UserError: the folder cannot be written, or `results.csv` there is none of ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    if os.path.lexists(folder / "results.csv"):
        read_results(folder / "results.csv")


def now() -> str:
    """The present as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested mappings as `a.b.c` keys; sequences become JSON text.

    Example: {"a": {"b": 1}, "c": [1, 2]} -> {"a.b": 1, "c": "[1, 2]"}.
    """
    flat: dict[str, Scalar] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, name))
        elif isinstance(value, (list, tuple)):
            flat[name] = json.dumps(list(value), default=str)
        else:
            flat[name] = value
    return flat


def version(package: str) -> str:
    """The installed version of this package or a distribution, found without importing it."""
    if package == "million":
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def git_commit() -> str:
    """The commit of the checkout this package runs from, `+dirty` if tracked files differ, "" outside one.

    $MILLION_COMMIT says it for a copy of a checkout that has no history.
    """
    if said := os.environ.get("MILLION_COMMIT"):
        return said
    if not (CHECKOUT / "pyproject.toml").is_file():
        return ""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return ""
