"""Times and searches of the benchmarks, with runners that do nothing and a clock that ticks."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import tiny_model

from million_cli.bench import measure
from million_cli.bench.cases import Case
from million_cli.bench.comparison import Comparison
from million_cli.bench.implementations import Dense
from million_cli.bench.measure import Times, largest_batch


class Recorder:
    """A runner that records its calls."""

    def __init__(self):
        self.calls = []

    def facts(self):
        return {"cache_bytes": 1}

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *(a for a in arguments if isinstance(a, int))))


class Recorded(Dense):
    """An implementation whose runners are kept."""

    def __init__(self, name):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "runners", [])

    def runner(self, job):
        self.runners.append(Recorder())
        ORDER.append(self.name)
        return self.runners[-1]


ORDER: list[str] = []


@pytest.fixture
def ticking(monkeypatch):
    """Every reading of the clock is one second later."""
    counter = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(counter)))
    ORDER.clear()


def comparison(rounds):
    return Comparison(tiny_model(), 3, rounds, "none", 0, lambda case, impl, run: {"status": "ok", **run()})


def test_a_round_reads_warms_and_steps(ticking):
    impl = Recorded("one")
    (row,) = comparison(2).speed(Case(16, (impl,), batch=2)).values()
    first = [("prefill",), ("reset",), ("prefill",), ("warm", 3), *[("step",)] * 3]
    assert [runner.calls for runner in impl.runners] == [first, first[2:]]
    assert row == {
        "status": "ok", "cache_bytes": 1, "ttft_ms": 1000.0, "tpot_ms": 1000.0, "tpot_p90_ms": 1000.0,
        "tokens_per_s": 2.0,
    }  # fmt: skip


def test_filling_gives_no_time_to_first_token(ticking):
    impl = Recorded("one")
    (row,) = comparison(1).speed(Case(16, (impl,), batch=2, fill=True)).values()
    assert impl.runners[0].calls[:2] == [("fill", 2, 16), ("warm", 3)]
    assert row["ttft_ms"] is None


def test_orders_alternate(ticking):
    comparison(3).speed(Case(16, tuple(map(Recorded, "abc"))))
    assert "".join(ORDER) == "abccbaabc"


def test_quantiles_are_over_all_steps():
    row = Times([1.0, 5.0, 2.0], [float(ms) for ms in range(1, 12)]).row(4)
    assert row == {
        "ttft_ms": 2.0,
        "tpot_ms": 6.0,
        "tpot_p90_ms": 10.0,
        "tokens_per_s": pytest.approx(4e3 / 6),
    }


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


def test_prompts_follow_the_seed():
    one, same, other = (measure.random_prompt(100, 2, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
