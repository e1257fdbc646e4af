"""GPU tests: all are marked `gpu`; without a CUDA device they are not collected."""

from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_sessionstart() -> None:
    if torch.cuda.is_available():
        from million_cli.ops.compiled import load

        load()  # tests call the ops themselves too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
