"""Finished work is found again by what went into it: configuration, model, text, code and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from million_cli.errors import UserError
from million_cli.results import version

PACKAGE = Path(__file__).resolve().parent.parent


def stage_key(inputs: Mapping[str, Any]) -> str:
    """16 hex digits that change whenever anything in `inputs` (JSON values) does."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


@cache
def code_digest(*parts: str) -> dict[str, str]:
    """Digest of the sources of `parts`, subpackages ("" is all) or files, and of the versions they run on."""
    digest = hashlib.sha256()
    for part in parts:
        root = PACKAGE / part
        assert root.exists(), part
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "code": digest.hexdigest(),
        **{package: version(package) for package in ("torch", "transformers")},
    }


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the stage whose product is `path`, so that jobs in parallel do not make it twice.

    Raises:
        UserError: the folder cannot be written.
    """
    lock = path.parent / f".{path.name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        guard = FileLock(lock)
        guard.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        guard.release()
