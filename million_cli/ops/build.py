"""Compiling the CUDA sources with nvcc, into a cache, at first use or ahead of time.

A library is keyed by all it is made of: sources, flags, compiler, torch and architectures.  A change of any
of them is a new entry and nothing is ever overwritten.  Two processes that want the same library wait for
one another on a lock; an entry that is incomplete or altered is built again.

`python -m million_cli.ops.build --check` compiles everything for one architecture without keeping it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from million_cli.errors import UserError
from million_cli.progress import progress

# Shared memory that one block can have, KiB, by compute capability (CUDA C++ programming guide, table of
# technical specifications per compute capability).
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
ARCHITECTURES = tuple(SHARED_KIB)

_FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",  # the stable ABI of torch 2.11
)
_LIBRARY = "libmillion_kernels.so"


class KernelsUnavailable(RuntimeError):  # noqa: N818
    """Why this process cannot have the compiled kernels, in one line."""


def source_folder() -> Path:
    """The CUDA sources: of the checkout if there is one, else those installed with the package.

    An editable install can leave a stale copy in site-packages, so the checkout comes first.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "kernels", package / "kernels"):
        if (folder / "binding.cu").is_file():
            return folder
    raise KernelsUnavailable(f"no CUDA sources beside {package}")


def source_files() -> list[Path]:
    """Every file of the CUDA sources, in a fixed order."""
    return sorted(p for p in source_folder().rglob("*") if p.suffix in {".cu", ".cuh", ".h"})


def sources_digest(files: Iterable[Path] | None = None, root: Path | None = None) -> str:
    """sha256 over names and contents of `files` (default: the CUDA sources)."""
    root = root or source_folder()
    digest = hashlib.sha256()
    for path in source_files() if files is None else sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def suite_digest() -> str:
    """sha256 of what a record of the GPU suite is about: the CUDA sources and the Python that calls them."""
    here = Path(__file__).parent
    names = ("build", "compiled", "dispatch", "fragment", "heuristics")
    python = sources_digest([here / f"{name}.py" for name in names], here)
    return hashlib.sha256((sources_digest() + python).encode()).hexdigest()


@cache
def compiler() -> tuple[str, str]:
    """Path and version line of nvcc: $CUDA_HOME, the PATH, /usr/local/cuda.

    Raises:
        KernelsUnavailable: there is none, or it does not run.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += [
        found for found in (shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")) if found
    ]
    for path in candidates:
        if not os.access(path, os.X_OK):
            continue
        run = subprocess.run([path, "--version"], capture_output=True, text=True)
        if run.returncode == 0:
            return path, next(line for line in run.stdout.splitlines() if "release" in line).strip()
    raise KernelsUnavailable("no nvcc in $CUDA_HOME, on the PATH or in /usr/local/cuda")


def device_architectures() -> tuple[int, ...]:
    """Compute capabilities of the visible GPUs, e.g. (90,).

    Raises:
        KernelsUnavailable: there is no GPU that torch can use, or one that the sources are not for.
    """
    if not torch.cuda.is_available():
        raise KernelsUnavailable(
            "torch sees no CUDA device"
            if torch.backends.cuda.is_built()
            else "this torch is built without CUDA"
        )
    pairs = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    found = tuple(sorted(10 * major + minor for major, minor in pairs))
    for arch in found:
        if arch not in SHARED_KIB:
            raise KernelsUnavailable(
                f"no kernels for compute capability {arch}; there are for {list(ARCHITECTURES)}"
            )
    return found


def parse_architectures(text: str) -> tuple[int, ...]:
    """ "80,90" -> (80, 90).

    Raises:
        UserError: one that the sources are not for.
    """
    accepted = {str(arch): arch for arch in ARCHITECTURES}
    for part in text.split(","):
        if part.strip() not in accepted:
            raise UserError(f"arch={part.strip()}: accepted are {', '.join(accepted)}")
    return tuple(dict.fromkeys(accepted[part.strip()] for part in text.split(",")))


@dataclass(frozen=True)
class Target:
    """A library: which architectures it is for.  More than one only if a machine mixes them."""

    architectures: tuple[int, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        generate = tuple(f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures)
        return (*_FLAGS, f"-DMILLION_SHARED_KIB={min(SHARED_KIB[a] for a in self.architectures)}", *generate)

    @property
    def key(self) -> str:
        parts = [sources_digest(), *self.flags, compiler()[1], torch.__version__]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]

    @property
    def folder(self) -> Path:
        return cache_folder() / self.key

    @property
    def library(self) -> Path:
        return self.folder / _LIBRARY

    @property
    def intact(self) -> bool:
        """Whether the cached library is complete and as it was built."""
        try:
            recorded = json.loads((self.folder / "build.json").read_text())["sha256"]
            return bool(recorded == hashlib.sha256(self.library.read_bytes()).hexdigest())
        except (OSError, ValueError, KeyError):
            return False


def cache_folder() -> Path:
    """Where libraries are kept: $MILLION_CACHE/kernels, or ~/.cache/million/kernels."""
    root = (
        os.environ.get("MILLION_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "million"
    )
    return Path(root) / "kernels"


def build(
    architectures: Iterable[int] | None = None, show_progress: bool = True, force: bool = False
) -> list[Path]:
    """Compile one library for each architecture (default: one library for the GPUs of this machine).

    Libraries already in the cache are left as they are unless `force`.

    Raises:
        KernelsUnavailable: no nvcc, no GPU where none was named, or a failed compile (with its output).
    """
    targets = (
        [Target(device_architectures())] if architectures is None else [Target((a,)) for a in architectures]
    )
    return [_build(target, show_progress, force) for target in targets]


def _build(target: Target, show_progress: bool, force: bool) -> Path:
    target.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(target.folder / "lock"):
        if not force and target.intact:
            return target.library
        with tempfile.TemporaryDirectory(dir=target.folder) as scratch:
            objects = _compile(target, Path(scratch), show_progress)
            library = Path(scratch) / _LIBRARY
            libraries = Path(torch.__file__).parent / "lib"
            needed = [
                f"-l{name}" for name in ("torch", "torch_cpu", "torch_cuda", "c10") if _has(libraries, name)
            ]
            # The dependency on libtorch is recorded, so that the library loads in any order.
            link = [compiler()[0], "-shared", "-o", str(library), *map(str, objects)]
            _run([*link, f"-L{libraries}", "-Xlinker=--no-as-needed", *needed])
            record = {
                "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
                "architectures": target.architectures,
                "torch": torch.__version__,
                "compiler": compiler()[1],
            }
            (Path(scratch) / "build.json").write_text(json.dumps(record))
            (target.folder / "build.json").unlink(missing_ok=True)
            os.replace(library, target.library)
            os.replace(Path(scratch) / "build.json", target.folder / "build.json")
    return target.library


def _has(folder: Path, name: str) -> bool:
    return (folder / f"lib{name}.so").is_file()


def _compile(target: Target, scratch: Path, show_progress: bool) -> list[Path]:
    nvcc, _ = compiler()
    folder = source_folder()
    include = Path(torch.__file__).parent / "include"
    # The decode instances take longest, so they start first.
    sources = sorted(
        (p for p in source_files() if p.suffix == ".cu"), key=lambda p: (p.parent == folder, p.name)
    )
    objects = [scratch / f"{p.stem}.o" for p in sources]
    name = ",".join(f"sm_{a}" for a in target.architectures)

    def one(job: tuple[Path, Path]) -> None:
        source, output = job
        _run([nvcc, *target.flags, f"-I{folder}", f"-I{include}", "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(_jobs()) as pool:
        done = pool.map(one, zip(sources, objects, strict=True))
        if not show_progress:
            list(done)
            return objects
        with progress(len(sources), f"compiling kernels for {name}", "file") as bar:
            for _ in done:
                bar.update(1)
    return objects


def _jobs() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        output = (run.stdout + run.stderr).strip()
        raise KernelsUnavailable(f"{Path(command[0]).name} failed with {run.returncode}:\n{output[-4000:]}")


def check(arch: int = 90) -> None:
    """Compile all sources for one architecture and throw the result away.

    Raises:
        KernelsUnavailable: no nvcc, or the sources do not compile.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _compile(Target((arch,)), Path(scratch), show_progress=True)


@dataclass(frozen=True)
class Status:
    """What `million doctor` says of the kernels: each field is text to show."""

    compiler: str
    devices: str
    library: str
    ready: bool


def status() -> Status:
    """What is built for this machine, or why nothing is.  Builds nothing."""
    try:
        nvcc = " ".join(compiler())
    except KernelsUnavailable as error:
        nvcc = str(error)
    try:
        target = Target(device_architectures())
    except KernelsUnavailable as error:
        return Status(nvcc, str(error), "none: kernels need a GPU", False)
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    try:
        if target.intact:
            return Status(nvcc, devices, str(target.library), True)
        return Status(
            nvcc, devices, "not built yet: compiled at first use, or by `million kernels build`", False
        )
    except KernelsUnavailable as error:
        return Status(nvcc, devices, f"none: {error}", False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m million_cli.ops.build", description="Compile the CUDA kernels."
    )
    parser.add_argument(
        "--arch", default="90", help=f"comma-separated, of {', '.join(map(str, ARCHITECTURES))}"
    )
    parser.add_argument("--check", action="store_true", help="compile only, keep nothing")
    options = parser.parse_args(arguments)
    try:
        for arch in parse_architectures(options.arch):
            if options.check:
                check(arch)
            else:
                print(*build([arch]))
    except (UserError, KernelsUnavailable) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
