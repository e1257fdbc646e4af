"""Timing: the arithmetic with a clock that ticks, the stages of a real step."""

from __future__ import annotations

import itertools

import pytest
import torch

from million_cli.bench import speed
from million_cli.bench import stage_clock as breakdown
from million_cli.bench.speed import Config, measure, next_token, time_generation, time_stages
from million_cli.bench.stage_clock import STAGES, StageClock
from million_cli.errors import UserError

PROMPT = torch.arange(1, 65)[None]  # no 0: generate takes it for padding


@pytest.fixture
def ticking(monkeypatch):
    """Every look at the clock is one second later."""
    for module in (speed, breakdown):
        counter = itertools.count()
        monkeypatch.setattr(module.time, "perf_counter", lambda counter=counter: float(next(counter)))


def test_times_are_taken_around_each_step(tiny, ticking):
    first, steps = time_generation(tiny.model, PROMPT, tiny.caches("dense")("exact"), 5)
    assert first == 1000.0
    assert steps == [1000.0] * 5


def test_stages_of_a_step_are_found_and_sum_to_it(tiny, ticking):
    stages = time_stages(tiny.model, PROMPT, tiny.caches()("exact"), 3)
    assert tuple(stages) == STAGES
    # One second between marks, so milliseconds count a stage's marks a step: 2 layers, 3 projections each.
    assert stages["embedding"] == 1000
    assert stages["head"] == 1000
    assert stages["cache append"] == stages["attention"] == stages["output projection"] == 2000
    assert stages["MLP"] == 2000
    assert stages["projections"] == 6000
    assert stages["rope"] == 1000 + 6000  # cos and sin once, then what follows each projection


def test_stages_sum_to_the_time_between_first_and_last_mark(tiny):
    cache = tiny.caches()("exact")
    token = next_token(tiny.model, PROMPT, cache)
    with StageClock(tiny.model, cache) as clock:
        clock.mark("other")
        next_token(tiny.model, token, cache)
        clock.stop()
    total = 1e3 * (clock._marks[-1][1] - clock._marks[0][1])
    assert sum(clock.totals_ms().values()) == pytest.approx(total, rel=1e-9)
    assert min(clock.totals_ms().values()) > 0


def test_measuring_stages_leaves_no_trace(tiny):
    cache = tiny.caches()("exact")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules())
    time_stages(tiny.model, PROMPT, cache, 2)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()) == hooks
    assert "update" not in vars(cache)


def test_steps_continue_the_text_as_generate_does(tiny):
    cache, reference = tiny.caches()("exact"), tiny.caches()("exact")
    expected = tiny.model.generate(
        PROMPT, past_key_values=reference, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    tokens = [next_token(tiny.model, PROMPT, cache)]
    for _ in range(7):
        tokens.append(next_token(tiny.model, tokens[-1], cache))
    assert torch.cat(tokens, dim=1).tolist() == expected[:, 64:].tolist()


def test_measure_reports_both_caches(tiny):
    config = Config(context=64, new_tokens=20, repeats=2, breakdown=True, batch=2)
    result = measure(tiny.model, tiny.tokenizer, tiny.caches("paged"), None, config, 0)
    found = result.metrics
    assert found["tpot_ratio"] == pytest.approx(found["tpot_dense_ms"] / found["tpot_ms"])
    assert found["tokens_per_s"] == pytest.approx(2000 / found["tpot_ms"])
    assert 0 < found["tpot_ms"] <= found["tpot_p90_ms"]
    assert found["cache_tokens"] == 2 * (64 + 20)
    assert found["code_bytes"] > 0
    rows = result.tables["breakdown"]
    assert [row["stage"] for row in rows] == list(STAGES)
    assert all(row["dense_ms"] > 0 and row["cache_ms"] > 0 for row in rows)


def test_the_warm_up_run_is_not_counted(tiny, monkeypatch):
    times = iter([(99.0, [99.0])] * 2 + [(1.0, [2.0]), (3.0, [4.0])])
    cached = tiny.caches()

    def fake(model, prompt, cache, new_tokens):
        next_token(model, prompt, cache)
        return next(times)

    monkeypatch.setattr(speed, "time_generation", fake)
    found = measure(
        tiny.model, tiny.tokenizer, cached, None, Config(context=48, new_tokens=1, repeats=1), 0
    ).metrics
    assert (found["ttft_dense_ms"], found["tpot_dense_ms"]) == (1.0, 2.0)
    assert (found["ttft_ms"], found["tpot_ms"], found["tpot_ratio"]) == (3.0, 4.0, 0.5)


def test_bad_settings_are_refused(tiny):
    with pytest.raises(UserError, match=r"bench\.repeats=0"):
        Config(repeats=0)
    with pytest.raises(UserError, match=r"context\+new_tokens=300"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), None, Config(context=200, new_tokens=100), 0)
