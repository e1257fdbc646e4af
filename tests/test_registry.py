"""The list of names: every object is there, and reading the list imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import is_dataclass

import pytest

from million_cli.registry import BENCHES, CACHES, CODECS, TASKS, VERBS

ALL = {"verb": VERBS, "cache": CACHES, "codec": CODECS, "task": TASKS, "bench": BENCHES}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, r in ALL.items() for name in r.own])
def test_every_name_has_its_object(what, name):
    found = ALL[what].load(name)
    assert ALL[what].package(name) == "million"
    if what in ("task", "bench", "codec"):
        assert is_dataclass(found.Config)
    if what in ("task", "bench"):
        assert found.Config().name == name
    if what == "task":
        assert callable(found.measure)


def test_the_list_is_free_of_torch():
    code = (
        "import sys; from million_cli.registry import CODECS, TASKS; assert CODECS.names and TASKS.names; "
        "assert not {'torch', 'transformers', 'hydra', 'pandas'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
