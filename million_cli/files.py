"""Files that are either whole or absent: written beside their target, then renamed onto it.

Every writer here raises a `UserError` when the file cannot be written (no such folder, no permission, disk
full) and leaves neither a partial file nor a temporary one; a file that was there before stays as it was.
Only a kill leaves a temporary file, which the next process that writes into the folder removes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from million_cli.errors import UserError

try:
    import fcntl
except ImportError:  # not POSIX: leftovers stay, since nothing tells them from files being written
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPIPE)
"""Errors of the destination (full, read-only, closed), wherever in the program they are raised."""


def reason(error: OSError) -> str:
    """One line for an error while writing: which file, if the system names it, and why."""
    why = error.strerror or str(error) or type(error).__name__
    if isinstance(error, BrokenPipeError):
        return "standard output was closed before everything was printed"
    return f"cannot write {error.filename}: {why}" if error.filename else f"cannot write: {why}"


_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.")
_CLEANED: set[tuple[int, Path]] = set()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`; if the body succeeds, the file there becomes `path`.

    Missing parent folders are made.  The data is synced before the rename, so a crash leaves the old file.

    Raises:
        UserError: an `OSError` inside the body or at the rename, with the path and the system's reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")  # the suffix stays: writers look at it
    held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        held = _hold(temporary)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # renamed already, or the folder does not exist
            temporary.unlink()
        if held is not None:
            os.close(held)


def _hold(temporary: Path) -> int:
    """Make the temporary file, locked until the descriptor is closed or this process ends."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:  # taken for a leftover before it was locked
            pass
        except OSError:  # a file system without locks
            return descriptor
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that were killed, once a process and folder."""
    if fcntl is None or (os.getpid(), folder) in _CLEANED:
        return
    _CLEANED.add((os.getpid(), folder))
    for file in folder.iterdir():
        if not _TEMPORARY.match(file.name) or not file.is_file():
            continue
        with suppress(OSError), file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            file.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path`; if the body succeeds, it becomes `path` with all that was written into it.

    `path` must not exist, and its writers exclude one another by a lock: leftover folders of killed writers
    are removed first.  Files get the permissions of any new file, whoever wrote them.

    Raises:
        UserError: an `OSError` inside the body or at the rename, with the path and the system's reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        for stale in path.parent.glob(f".????????.{path.name}"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.iterdir():
            file.chmod(mode)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already, if all went well


def user_cache() -> Path:
    """The user's cache: $MILLION_CACHE, or `million` in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MILLION_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "million"


def read_whole(file: IO[bytes], what: str, limit: int) -> bytes:
    """The content of an open file, or of a packed file whose stated size may be wrong.

    Raises:
        UserError: it holds more than `limit` bytes.
    """
    parts, size = [], 0
    while part := file.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise UserError(f"{what} holds more than {limit >> 20} MiB, which is the limit")
    return b"".join(parts)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 without newline translation, atomically.

    Bytes of file names that are no UTF-8 (surrogates in Python) become backslash escapes.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors (any device; made contiguous) and string metadata as one safetensors file, atomically.

    Equal contents give equal bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(
                {k: t.detach().contiguous() for k, t in tensors.items()}, temporary, dict(metadata or {})
            )
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        _sort_header(temporary)
        # safetensors makes its files for the owner alone; a codebook is shared like any other result.
        mode = temporary.with_name(f"{temporary.name}.mode")
        mode.touch()
        temporary.chmod(mode.stat().st_mode)
        mode.unlink()


def _sort_header(path: Path) -> None:
    """Order the metadata of a safetensors file, which come in any order: 8 bytes of length, then JSON."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        assert len(text) <= size, (len(text), size)
        file.seek(8)
        file.write(text.ljust(size))


def read_safetensors(
    path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (on the CPU; all, or those of `names`) and metadata of a safetensors file.

    Raises:
        UserError: the file is missing, unreadable or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            wanted = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
