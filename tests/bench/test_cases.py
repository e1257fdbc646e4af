"""Cases and settings of the end-to-end benchmark: accepted and refused values."""

from __future__ import annotations

import pytest
import torch

from million_cli.bench.cases import Config, resolve_compile
from million_cli.bench.implementations import DENSE, IMPLEMENTATIONS, PQ, STATIC
from million_cli.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_mistakes_are_named():
    good = {"context": 8, "impls": ["dense"]}
    for change, message in (
        ({"impls": ["fast"]}, r"impls=fast: accepted are dense, paged-4bit"),
        ({"what": "all"}, r"what=all"),
        ({"batch": 0}, r"batch=0: accepted are integers from 1"),
        ({"new_tokens": 0}, r"new_tokens=0: accepted are integers from 1"),
        ({"contxt": 8}, r"unknown key bench\.cases\.contxt"),
    ):
        with pytest.raises(UserError, match=message):
            Config(cases=[{**good, **change}]).parsed(CPU)
    with pytest.raises(UserError, match="a case without context"):
        Config(cases=[{"impls": ["dense"]}]).parsed(CPU)
    with pytest.raises(UserError, match=r"bench\.rounds=0"):
        Config(rounds=0)
    with pytest.raises(UserError, match=r"bench\.compile=fast: accepted are auto, none, default, tuned"):
        resolve_compile("fast", CPU)


def test_names_are_of_objects():
    assert IMPLEMENTATIONS["paged-4bit"] == PQ("paged", 4)
    assert IMPLEMENTATIONS["paged-4bit-mixed"] == PQ("paged", 4, mixed=True)
    assert {name: impl.name for name, impl in IMPLEMENTATIONS.items()} == {n: n for n in IMPLEMENTATIONS}
    assert {name for name, impl in IMPLEMENTATIONS.items() if not impl.ours} == {
        "transformers-dynamic", "transformers-static", "transformers-quanto", "transformers-hqq",
    }  # fmt: skip


def test_steps_are_compiled_where_compiling_pays():
    assert resolve_compile("auto", CUDA) == "default"
    assert resolve_compile("auto", CPU) == "none"
    assert resolve_compile("tuned", CPU) == "tuned"
    assert (DENSE.compiled("tuned"), STATIC.compiled("tuned")) == ("tuned", "reduce-overhead")
    assert IMPLEMENTATIONS["transformers-dynamic"].compiled("tuned") == "none"


def test_the_suite_is_that_of_the_device():
    settings = {"cuda": [{"context": 9, "impls": ["dense"]}], "cpu": [{"context": 8, "impls": ["dense"]}]}
    assert [c.context for c in Config(suites=settings).parsed(CPU)] == [8]
    assert [c.context for c in Config(suites=settings).parsed(CUDA)] == [9]
    mine = [{"context": 7, "impls": ["dense"]}]
    assert [c.context for c in Config(suites=settings, cases=mine).parsed(CPU)] == [7]
    with pytest.raises(UserError, match="there are none for device=cpu"):
        Config().parsed(CPU)


def test_breakdown_adds_a_case_of_our_own_engines():
    cases = Config(
        cases=[
            {"context": 8, "batch": 2, "impls": ["dense", "transformers-static"]},
            {"context": 8, "impls": ["transformers-static"]},
        ],
        breakdown=True,
    ).parsed(CPU)
    assert [(c.what, c.impls, c.fill, c.batch) for c in cases] == [
        ("speed", (DENSE, STATIC), False, 2),
        ("breakdown", (DENSE,), True, 2),
        ("speed", (STATIC,), False, 1),
    ]
