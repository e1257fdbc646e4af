"""The wheel is whole: built, installed elsewhere, it finds its own configs, kernels and reference model."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from million_cli import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **env: str) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    (path,) = folder.glob("million-*.whl")
    return path


def test_wheel_holds_configs_kernels_and_the_reference_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "kernels"):
        tracked = run("git", "ls-files", folder, cwd=ROOT).split() if (ROOT / ".git").exists() else []
        assert {f"million_cli/{path}" for path in tracked} <= names
    assert "million_cli/conf/config.yaml" in names
    assert "million_cli/assets/reference-model/model.safetensors" in names
    assert "million_cli/report/page.html" in names
    assert "million_cli/py.typed" in names
    assert wheel.name.startswith(f"million-{__version__}-")
    assert not any(name.startswith(("tests/", "scripts/", "results/")) for name in names)
    assert "million_cli/kernels/__init__.py" not in names  # transformers probes for a package of that name


def test_doctor_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
        cwd=tmp_path,
    )
    out = run(
        sys.executable, "-m", "million_cli", "doctor", cwd=tmp_path, PYTHONPATH=str(site), COLUMNS="400"
    )
    assert str(site / "million_cli" / "conf") in out
    assert str(ROOT / "conf") not in out
