"""The engine on a GPU: replayed steps are the eager ones, nothing waits, prefill keeps a layer's K and V."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE
from random_codebook import random_codebook
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.bench.cases import Config
from million_cli.bench.e2e import Bench
from million_cli.bench.fill import fill
from million_cli.bench.models import Source
from million_cli.bench.stages import breakdown, measure_stages
from million_cli.cache.side_stream import SideStream
from million_cli.engine.dense import DenseCache, DenseSteps
from million_cli.engine.engine import Engine
from million_cli.engine.sampler import Sampler
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.models import random_model
from million_cli.hf.static import StaticPQCache
from million_cli.pq.codebook import Codebook
from million_cli.spec import WindowSpec

VOCABULARY = 97
SMALL = WindowSpec(page_size=16, residual=32)
KINDS = ("paged", "contiguous", "dense")


@lru_cache
def model_and_codebook(
    seed: int = 0, layers: int = 2, group: int = 4, hidden: int = 512
) -> tuple[PreTrainedModel, Codebook]:
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * group,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "initializer_range": hidden**-0.5,
        "eos_token_id": None,
    }
    model = random_model(config, seed=seed, dtype=torch.float16, device=DEVICE)
    return model, random_codebook(model, (64, 8), (64, 8))


def make(
    kind: str, length: int = 2000, window: WindowSpec = SMALL, **which: int
) -> tuple[PreTrainedModel, Cache]:
    model, codebook = model_and_codebook(**which)
    if kind == "dense":
        return model, DenseCache(model, length)
    cls = PagedPQCache if kind == "paged" else DynamicPQCache
    return model, cls(model, codebook, window, strict=True)


def random_ids(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def left_padding(T: int, *padding: int) -> Tensor:
    return (torch.arange(T, device=DEVICE) >= torch.tensor(padding, device=DEVICE)[:, None]).long()


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_close(ours: Tensor, theirs: Tensor) -> None:
    size = theirs.double().norm()
    assert size > 0
    assert (ours.double() - theirs.double()).norm() <= 2e-3 * size


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("padding", [(), (0, 17, 70)], ids=["even", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_eager_ones(kind: str, padding: tuple[int, ...], group: int) -> None:
    ids = random_ids(3, 260)
    mask = left_padding(100, *padding) if padding else None
    engines = [Engine(*make(kind, group=group), graphs=graphs) for graphs in ("auto", None)]
    for engine in engines:
        engine.prefill(ids[:, :100], mask, new_tokens=160)
    for t in range(100, 260):
        replayed, eager = (engine.step(ids[:, t]).clone() for engine in engines)
        check_close(engines[0].logits, engines[1].logits)
        assert replayed.shape == eager.shape == (3,)
    assert [engine.mode for engine in engines] == ["graph", "steps"]
    assert [engine.notes for engine in engines] == [[], []]
    if kind != "dense":
        check_codes(engines[0].cache, engines[1].cache)
        assert len(engines[0]._captured) == 1


def check_codes(ours: Any, theirs: Any) -> None:
    for layer in range(ours.store.num_layers):
        for a, b in zip(ours.store.codes(layer), theirs.store.codes(layer), strict=True):
            assert a.length == b.length > 0
            a, b = a.read(0, a.length), b.read(0, b.length)
            assert int((a != b).sum()) <= 1e-3 * a.numel() + 2


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_steps_of_the_engine_are_those_of_the_cache_in_generate(kind: str) -> None:
    """Teacher-forced beside the model's forward with the cache's own layers."""
    ids, mask = random_ids(2, 220), left_padding(100, 0, 31)
    model, cache = make(kind)
    engine, (_, plain) = Engine(model, cache), make(kind)
    engine.prefill(ids[:, :100], mask, new_tokens=120)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids[:, :100], attention_mask=mask, position_ids=positions, past_key_values=plain)
        for t in range(100, 220):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            here = mask.sum(-1, keepdim=True) - 1
            theirs = model(
                ids[:, t : t + 1], attention_mask=mask, position_ids=here, past_key_values=plain
            ).logits[:, -1]
            engine.step(ids[:, t])
            check_close(engine.logits, theirs)


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_a_thousand_steps_without_waiting(kind: str) -> None:
    """Over 60 flushes, the pages of which the host hands out while the device runs."""
    engines = [Engine(*make(kind), graphs=graphs) for graphs in ("auto", None)]
    ids = random_ids(2, 1100)
    for engine in engines:
        engine.prefill(ids[:, :100], new_tokens=1000)
        for t in range(100, 102):
            engine.step(ids[:, t])
    with no_waiting():
        for t in range(102, 1100):
            engines[0].step(ids[:, t])
    for t in range(102, 1100):
        engines[1].step(ids[:, t])
    check_close(engines[0].logits, engines[1].logits)
    check_codes(engines[0].cache, engines[1].cache)
    assert int(engines[0].cache.steps.device_length()) == engines[0].cache.store.length() == 1100
    assert len(engines[0]._captured) == 1


def test_two_models_take_turns() -> None:
    ids = random_ids(2, 150)
    engines = {(kind, seed): Engine(*make(kind, seed=seed)) for kind in KINDS for seed in (0, 1)}
    logits: dict[tuple[str, int], list[Tensor]] = {key: [] for key in engines}
    for engine in engines.values():
        engine.prefill(ids[:, :100], new_tokens=50)
    for t in range(100, 150):
        for key, engine in engines.items():
            engine.step(ids[:, t])
            logits[key].append(engine.logits.clone())
    for (kind, seed), found in logits.items():
        alone = Engine(*make(kind, seed=seed), graphs=None)
        alone.prefill(ids[:, :100], new_tokens=50)
        for t, ours in zip(range(100, 150), found, strict=True):
            alone.step(ids[:, t])
            check_close(ours, alone.logits)


@pytest.mark.parametrize("compile", ["default", "tuned"])
def test_compiled_steps(compile: str) -> None:
    ids = random_ids(2, 140)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for kind in KINDS:
        compiled, eager = Engine(*make(kind), compile=compile), Engine(*make(kind), graphs=None)
        for engine in (compiled, eager):
            engine.prefill(ids[:, :100], new_tokens=40)
        for t in range(100, 140):
            for engine in (compiled, eager):
                engine.step(ids[:, t])
            size = eager.logits.double().norm()  # other orders of summation than eager ones
            assert (compiled.logits.double() - eager.logits.double()).norm() <= 2e-2 * size
        assert compiled.mode == "graph"
        assert compiled.notes == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_sampling_in_a_graph_draws_anew() -> None:
    model, cache = make("paged")
    engine = Engine(model, cache, sampler=Sampler(temperature=1.0))
    engine.prefill(random_ids(1, 50).repeat(8, 1), new_tokens=50)
    tokens = torch.stack([engine.step(torch.full((8,), 5, device=DEVICE)).clone() for _ in range(40)])
    assert engine.mode == "graph"
    assert len(tokens.unique()) > 5
    assert any(len(step.unique()) > 1 for step in tokens)  # the rows are the same but for the draw


def test_tokens_come_one_step_behind() -> None:
    ids = random_ids(2, 80)
    engine, forced = Engine(*make("paged")), Engine(*make("paged"))
    tokens = torch.tensor(list(engine.generate(ids, max_new_tokens=60)), device=DEVICE)
    assert tokens.shape == (60, 2)
    assert torch.equal(forced.prefill(ids, new_tokens=60), tokens[0])
    for given, expected in pairwise(tokens):
        assert torch.equal(forced.step(given), expected)


def test_the_next_text_uses_the_graph_of_the_last() -> None:
    engine, fresh = Engine(*make("paged")), Engine(*make("paged"))
    list(engine.generate(random_ids(2, 150, seed=1), max_new_tokens=60))
    (graph,) = engine._captured.values()
    engine.reset()
    ids = random_ids(2, 100)
    assert list(engine.generate(ids, max_new_tokens=60)) == list(fresh.generate(ids, max_new_tokens=60))
    assert list(engine._captured.values()) == [graph]


def test_graphs_captured_ahead_change_nothing() -> None:
    ids = random_ids(2, 100)
    for kind in KINDS:
        ahead, plain = Engine(*make(kind)), Engine(*make(kind))
        for engine in (ahead, plain):
            engine.prefill(ids, new_tokens=40)
            engine.step()
        ahead.capture(30)
        captured = len(ahead._captured)
        with no_waiting():
            tokens = [ahead.step().clone() for _ in range(30)]
        assert torch.equal(torch.stack(tokens), torch.stack([plain.step().clone() for _ in range(30)]))
        assert len(ahead._captured) == captured == (30 if kind == "dense" else 1)


def test_dense_attention_is_one_that_reads_no_mask() -> None:
    model, cache = make("dense", 8300)
    engine = Engine(model, cache)
    fill(engine, 1, 8192, 8)
    engine.step()
    assert isinstance(engine.steps, DenseSteps)
    assert str(engine.steps.attention).split()[0] in ("flash", "cudnn"), engine.steps.attention


# -- prefill -------------------------------------------------------------------------------------------------


def test_encoding_beside_compute_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 4000)
    (model, beside), (_, after) = make("paged", layers=6), make("paged", layers=6)
    for _ in range(3):
        Engine(model, beside).prefill(ids)
        with monkeypatch.context() as patch:
            patch.setattr(SideStream, "run", lambda self, layer, work, inputs: work())
            Engine(model, after).prefill(ids)
        check_codes(beside, after)
        beside.reset()
        after.reset()


def test_prefill_keeps_the_keys_and_values_of_a_layer_or_two() -> None:
    layers, T = 16, 16384
    ids = random_ids(1, T)
    peaks = {}
    for kind in ("paged", "dense"):
        model, cache = make(kind, T + 8, layers=layers, group=1)
        engine = Engine(model, cache)
        for _ in range(2):  # once to warm up
            engine.reset()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            engine.prefill(ids, new_tokens=8)
            torch.cuda.synchronize()
        peaks[kind] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        held = cache.memory()["total"]
        if kind == "dense":
            dense = held
        else:
            assert held < 0.27 * 2 * 2 * layers * 2 * 128 * T
        del engine, cache
    assert peaks["paged"] - peaks["dense"] < 3 * dense / layers


# -- generate and the benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generate_compiles_with_a_static_cache(mode: str) -> None:
    model, codebook = model_and_codebook()
    ids = random_ids(2, 60)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        cache = StaticPQCache(model, codebook, SMALL, max_length=160, strict=True)
        assert cache.is_compileable
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=100,
            do_sample=False,
            pad_token_id=0,
            compile_config=CompileConfig(mode=mode, dynamic=False),
        )
        assert text.shape == (2, 160)
        assert cache.memory()["key_codes"] > 0
        assert cache.store.length() == 159
    # Teacher-forced: the same text through the engine gives each token a place among the best.
    engine = Engine(*make("paged"), graphs=None)
    engine.prefill(text[:, :60])
    for t in range(60, 160):
        chosen = engine.logits.gather(1, text[:, t : t + 1])
        assert bool((engine.logits.amax(1, keepdim=True) - chosen <= 0.05 * engine.logits.std()).all())
        engine.step(text[:, t])


STAGES_OF_ALL = (
    "embedding", "projections", "rope", "append", "attention", "output projection", "MLP", "norms",
    "head", "sampling",
)  # fmt: skip


def test_stages_of_a_replayed_step() -> None:
    for kind in KINDS:
        model, cache = make(kind, 3000, WindowSpec(), layers=4)
        engine = Engine(model, cache, compile="default")
        fill(engine, 1, 2048, 64)
        engine.step()
        engine.capture(40)
        engine.step()
        found = breakdown(measure_stages(engine.step, 8, model))
        for stage in STAGES_OF_ALL:
            assert found[stage] > 0, (kind, stage, found)


def test_rows_of_the_benchmark(tmp_path: Path) -> None:
    model, _ = model_and_codebook(layers=4)
    impls = [
        "paged-4bit",
        "dense",
        "transformers-static",
        "transformers-dynamic",
        "contiguous-4bit",
        "paged-2bit",
    ]
    cases = [
        {"context": 1000, "batch": 2, "impls": impls},
        {"context": 1000, "batch": 2, "impls": ["paged-4bit", "dense", "transformers-static"], "fill": True},
        {"context": 1000, "batch": 2, "impls": ["paged-4bit", "dense"], "fill": True, "what": "breakdown"},
    ]
    device = torch.device("cuda", 0)
    own = Source("own", None, None, device, loaded=lambda: model)
    bench = Bench(Config(cases=cases, new_tokens=8), tmp_path, device, own=own)
    rows = bench.run()
    assert [row["status"] for row in rows] == ["ok"] * len(rows), [row["note"] for row in rows]
    assert all("graph" in str(row["detail"]) for row in rows if not str(row["impl"]).startswith("trans"))
    with (tmp_path / "e2e.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == len(rows)
    assert (tmp_path / "breakdown-own-1000-2.csv").is_file()
    assert (tmp_path / "breakdown-own-1000-2-kernels.csv").is_file()
