"""Small jobs on a random model and synthetic text; one folder of stages for all tests that only read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_job import SMALL_JOB

from million_cli.hydra_app import compose
from million_cli.pipelines.config import JobConfig

SMALL = [
    *SMALL_JOB,
    "cache.page_size=16",
    "cache.extended_residual=32",
    "task.dataset=synthetic",
    "task.seed=2",
    "task.context=128",
    "task.max_tokens=512",
    "bench.context=48",
    "bench.new_tokens=4",
    "bench.rounds=1",
]


@pytest.fixture(scope="session")
def shared_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def job(shared_out: Path) -> Callable[..., JobConfig]:
    """A configuration from overrides that add to `SMALL`; without `out=` in the shared folder."""

    def make(*overrides: str) -> JobConfig:
        return compose([*SMALL, f"out={shared_out}", *overrides])

    return make


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
