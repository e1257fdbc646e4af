"""Stages of a step on a CPU: found by calls of modules and of the cache, and summing to the step."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
from tiny_models import WINDOW, codebook_for, random_ids, tiny_model
from transformers.cache_utils import DynamicCache

from million_cli.bench import host_stages
from million_cli.bench.host_stages import host_spans
from million_cli.bench.spans import STAGES
from million_cli.bench.stages import breakdown, measure_stages, shares
from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.hf.cache import PagedPQCache

CACHES = {
    "paged": lambda model: PagedPQCache(model, codebook_for("llama"), WINDOW),
    "dense": lambda model: DenseCache(model, 100),
    "dynamic": lambda model: DynamicCache(config=model.config),
}
USED = (
    "embedding",
    "projections",
    "rope",
    "append",
    "attention",
    "output projection",
    "MLP",
    "norms",
    "head",
)


def engine_of(kind):
    model = tiny_model()
    engine = Engine(model, CACHES[kind](model))
    engine.prefill(random_ids(1, 64), new_tokens=30)
    return engine


@pytest.mark.parametrize("kind", CACHES)
def test_stages_are_found_and_sum_to_the_steps(kind):
    engine = engine_of(kind)
    spans = host_spans(engine.step, 5, engine.model)
    found = breakdown(shares(spans))
    assert tuple(found) == STAGES
    assert {stage for stage, us in found.items() if us > 0} == {*USED, "sampling", "host gap"}
    starts = [step[0].start_us for step in spans]
    assert sum(found.values()) == pytest.approx(fmean(b - a for a, b in itertools.pairwise(starts)), rel=1e-9)


def test_spans_are_in_the_order_of_the_model(monkeypatch):
    """With a clock that ticks once a look, each span lasts as long as every other."""
    counter = itertools.count()
    monkeypatch.setattr(host_stages.time, "perf_counter", lambda: float(next(counter)))
    engine = engine_of("paged")
    layers = engine.model.config.num_hidden_layers
    step, _ = host_spans(engine.step, 2, engine.model)
    stages = [span.stage for span in step]
    assert stages[0] == "embedding"
    assert stages[-2:] == ["head", "sampling"]
    assert stages.count("append") == stages.count("attention") == stages.count("output projection") == layers
    assert stages.count("projections") == 3 * layers
    assert stages.count("MLP") == layers
    assert {span.duration_us for span in step} == {1e6}
    assert all(a.start_us < b.start_us for a, b in itertools.pairwise(step))


def test_measuring_stages_leaves_no_trace_and_changes_no_token():
    watched, plain = engine_of("paged"), engine_of("paged")
    model = watched.model
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tokens = []
    measure_stages(lambda: tokens.append(watched.step().item()), 6, model)
    assert tokens == [plain.step().item() for _ in range(6)]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
