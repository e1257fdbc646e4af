"""LongBench's samples: from the hub's `data.zip`, a local zip, or a folder of `<dataset>.jsonl`."""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from million_cli.errors import UserError
from million_cli.files import read_whole
from million_cli.tasks.longbench import metrics
from million_cli.tasks.longbench.datasets import DATASETS

HUB = ("THUDM/LongBench", "data.zip")
"""The hub's repository and the file in it; its loading script no longer runs."""

_HALVES = re.compile("[\ud800-\udfff]")
MAX_BYTES = 1 << 30
"""A dataset may have this many bytes, unpacked; the largest published one has some 40 MB."""

ACCEPTED = (
    "accepted are a data.zip, a folder of <dataset>.jsonl (or data/<dataset>.jsonl), and null for the hub"
)


@dataclass(frozen=True)
class Sample:
    """One question, fields as published: `input` is what is asked (empty for some), `context` the text."""

    id: str
    input: str
    context: str
    answers: list[str]
    classes: list[str]


@dataclass(frozen=True)
class Samples:
    """Dataset -> its samples, where they came from, and the SHA-256 of their lines."""

    datasets: Mapping[str, list[Sample]]
    source: str
    sha256: str


def read(path: str | None, names: list[str], limit: int | None = None) -> Samples:
    """The first `limit` samples (None: all) of each named dataset.

    Args:
        path: a zip, a folder, or None for the hub's (downloaded once, then from its cache).

    Raises:
        UserError: nothing there, no such dataset in it, a damaged file, or the hub cannot be reached.
    """
    source = Path(path).expanduser() if path else _download()
    files = _folder(source, names) if source.is_dir() else _zip(source, names)
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(
            f"{source} has no {', '.join(missing)}; {ACCEPTED}; task.tasks=[...] selects datasets"
        )
    digest = hashlib.sha256()
    datasets = {}
    for name in names:
        lines = [line for line in files[name].split(b"\n") if line.strip()][:limit]
        if not lines:
            raise UserError(f"{source}: {name}.jsonl is empty")
        digest.update(name.encode() + b"\0" + b"\n".join(lines) + b"\0")
        datasets[name] = [
            _sample(line, name, i, f"{source}: {name}.jsonl") for i, line in enumerate(lines, 1)
        ]
    return Samples(datasets, str(path or "/".join(HUB)), digest.hexdigest())


def _folder(path: Path, names: list[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        for file in (path / f"{name}.jsonl", path / "data" / f"{name}.jsonl"):
            if file.is_file():
                found[name] = _bytes(file)
    return found


def _zip(path: Path, names: list[str]) -> dict[str, bytes]:
    if not path.is_file():
        raise UserError(f"task.path={path}: no such file or folder; {ACCEPTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {PurePosixPath(member).name: member for member in archive.namelist()}
            found = {}
            for name in names:
                if member := members.get(f"{name}.jsonl"):
                    with archive.open(member) as file:
                        found[name] = read_whole(file, f"task.path={path}: {member}", MAX_BYTES)
            return found
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, MemoryError),
        *(RuntimeError, ValueError),  # encrypted or of an unknown compression; a damaged header
    ) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"task.path={path}: not a readable zip ({why}); {ACCEPTED}") from error


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return read_whole(file, str(path), MAX_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _sample(line: bytes, name: str, number: int, file: str) -> Sample:
    where = f"{file}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise UserError(f"{where}: not a line of JSON: {error}") from error
    fields = row if isinstance(row, dict) else {}
    texts = [fields.get(key) for key in ("input", "context")]
    if not all(map(_is_text, texts)) or not _is_texts(fields.get("answers")):
        raise UserError(
            f"{where}: accepted are objects with texts `input` and `context` and a list `answers`"
        )
    classes = fields.get("all_classes")
    if DATASETS[name].metric is metrics.classification and not _is_texts(classes):
        raise UserError(f"{where}: accepted is a list of class names as `all_classes`, not {classes}")
    return Sample(
        id=str(fields.get("_id") or number),
        input=fields["input"],
        context=fields["context"],
        answers=fields["answers"],
        classes=classes or [],
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_text(value: object) -> bool:
    """Whether it is a string of characters; JSON can also hold halves of them (lone surrogates)."""
    return isinstance(value, str) and not _HALVES.search(value)


def _download() -> Path:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line of ours instead of its retries
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(*HUB, repo_type="dataset"))
    except Exception as error:  # the hub client raises a dozen kinds
        cause = " ".join(str(error).split())[:160]
        raise UserError(
            f"cannot load {'/'.join(HUB)} from the hub: {type(error).__name__}: {cause}; "
            "without a network name a local data.zip or folder by task.path="
        ) from error
