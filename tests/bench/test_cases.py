"""Cases, times and searches of the end-to-end benchmark, with runners that do nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from million_cli.bench import cases as e2e
from million_cli.bench.cases import Case, Config, Times, largest_batch, measure_round
from million_cli.errors import UserError


class Recorder:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *(a for a in arguments if isinstance(a, int))))


@pytest.fixture
def ticking(monkeypatch):
    counter = itertools.count()
    monkeypatch.setattr(e2e.time, "perf_counter", lambda: float(next(counter)))


def test_a_round_reads_warms_and_steps(ticking):
    runner, times = Recorder(), Times()
    case = Case(16, ("dense",), batch=2)
    for _ in range(2):
        measure_round(runner, case, torch.zeros(2, 16), 3, torch.device("cpu"), times)
    first = [("prefill",), ("reset",), ("prefill",), ("warm", 3), *[("step",)] * 3]
    assert runner.calls == first + first[2:]
    assert times.ttft == [1000.0] * 2
    assert times.steps == [1000.0] * 6
    assert times.row(2) == {
        "ttft_ms": 1000.0, "tpot_ms": 1000.0, "tpot_p90_ms": 1000.0, "tokens_per_s": 2.0,
    }  # fmt: skip


def test_filling_gives_no_time_to_first_token(ticking):
    runner, times = Recorder(), Times()
    measure_round(
        runner, Case(16, ("dense",), batch=2, fill=True), torch.zeros(2, 16), 3, torch.device("cpu"), times
    )
    assert runner.calls[:2] == [("fill", 2, 16), ("warm", 3)]
    assert times.row(2)["ttft_ms"] is None


@pytest.mark.parametrize("most", [1, 5, 100])
@pytest.mark.parametrize("guess", [1, 4, 50, 1000])
def test_the_largest_batch_is_found_wherever_one_starts(guess, most):
    for limit in range(0, 101, 7):
        tried = []

        def fits(batch, limit=limit, tried=tried):
            assert batch not in tried
            tried.append(batch)
            return batch <= limit

        assert largest_batch(fits, guess, most) == min(limit, most)
        assert len(tried) <= 16


def test_mistakes_are_named():
    good = {"context": 8, "impls": ["dense"]}
    for change, message in (
        ({"impls": ["fast"]}, r"impls=fast: accepted are dense, paged-4bit"),
        ({"what": "all"}, r"what=all"),
        ({"batch": 0}, r"batch=0: accepted are integers from 1"),
        ({"contxt": 8}, r"unknown key bench\.cases\.contxt"),
    ):
        with pytest.raises(UserError, match=message):
            Config(cases=[{**good, **change}]).parsed()
    with pytest.raises(UserError, match="a case without context"):
        Config(cases=[{"impls": ["dense"]}]).parsed()
    with pytest.raises(UserError, match=r"bench\.rounds=0"):
        Config(rounds=0)


def test_breakdown_adds_a_case_of_our_own_engines():
    cases = Config(
        cases=[
            {"context": 8, "batch": 2, "impls": ["dense", "transformers-static"]},
            {"context": 8, "impls": ["transformers-static"]},
        ],
        breakdown=True,
    ).parsed()
    assert [(c.what, c.impls, c.fill, c.batch) for c in cases] == [
        ("speed", ("dense", "transformers-static"), False, 2),
        ("breakdown", ("dense",), True, 2),
        ("speed", ("transformers-static",), False, 1),
    ]
