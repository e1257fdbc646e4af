"""The build cache, with a stand-in for nvcc that writes what it is asked for and logs every call."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from million_cli.errors import UserError
from million_cli.ops import build as building
from million_cli.ops.build import KernelsUnavailable, Target, build, compiler, parse_architectures, status

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.0"; exit 0; fi
echo "$@" >> "$NVCC_LOG"
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo object > "$2"; fi; shift; done
exit ${NVCC_EXIT:-0}
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with the stand-in compiler and an empty cache; the file holds one line a call."""
    (tmp_path / "cuda/bin").mkdir(parents=True)
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("MILLION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NVCC_LOG", str(tmp_path / "log"))
    compiler.cache_clear()
    yield tmp_path / "log"
    compiler.cache_clear()


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_a_library_is_built_once(log: Path) -> None:
    (library,) = build([90], show_progress=False)
    units = sum(path.suffix == ".cu" for path in building.source_files())
    assert calls(log) == units + 1  # and one link
    assert library.is_file()
    assert build([90], show_progress=False) == [library]
    assert calls(log) == units + 1
    assert json.loads((library.parent / "build.json").read_text())["architectures"] == [90]


@pytest.mark.parametrize("damage", ["library", "record", "truncated record"])
def test_a_broken_entry_is_built_again(log: Path, damage: str) -> None:
    (library,) = build([90], show_progress=False)
    before = calls(log)
    if damage == "library":
        library.write_text("something else")
    elif damage == "record":
        (library.parent / "build.json").unlink()
    else:
        (library.parent / "build.json").write_text('{"sha256": ')
    assert not Target((90,)).intact
    assert build([90], show_progress=False) == [library]
    assert calls(log) == 2 * before
    assert Target((90,)).intact


def test_two_processes_build_once(log: Path) -> None:
    code = "from million_cli.ops.build import build; build([90], show_progress=False)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    units = sum(path.suffix == ".cu" for path in building.source_files())
    assert calls(log) == units + 1
    assert Target((90,)).intact


def test_each_architecture_has_its_library_and_shared_memory(log: Path) -> None:
    libraries = build([80, 120], show_progress=False)
    assert len(set(libraries)) == 2
    text = log.read_text()
    assert "-DMILLION_SHARED_KIB=163 -gencode=arch=compute_80,code=sm_80" in text
    assert "-DMILLION_SHARED_KIB=99 -gencode=arch=compute_120,code=sm_120" in text
    assert Target((80, 90)).flags[-3] == "-DMILLION_SHARED_KIB=163"


def test_the_key_follows_the_sources(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    for name in ("binding.cu", "a.cuh"):
        (sources / name).write_text(name)
    monkeypatch.setattr(building, "source_folder", lambda: sources)
    first = Target((90,)).key
    assert Target((90,)).key == first
    (sources / "a.cuh").write_text("changed")
    assert Target((90,)).key != first


def test_a_failed_compile_shows_the_output_and_leaves_no_entry(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC_EXIT", "2")
    with pytest.raises(KernelsUnavailable, match="nvcc failed with 2"):
        build([90], show_progress=False)
    assert not Target((90,)).intact


def test_without_nvcc_the_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(building.shutil, "which", lambda *_, **__: None)
    compiler.cache_clear()
    with pytest.raises(
        KernelsUnavailable, match=r"^no nvcc in \$CUDA_HOME, on the PATH or in /usr/local/cuda$"
    ):
        compiler()


def test_status_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = status()
    assert not found.ready
    assert found.library == "none: kernels need a GPU"
    assert found.devices in ("torch sees no CUDA device", "this torch is built without CUDA")


def test_architectures() -> None:
    assert parse_architectures("80, 90,80") == (80, 90)
    with pytest.raises(UserError, match=r"arch=70: accepted are 80, 86"):
        parse_architectures("90,70")
