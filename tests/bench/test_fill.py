"""Random tokens instead of a prompt: steps continue from them, and host and device count the same."""

from __future__ import annotations

import pytest
from device_ops import DeviceOps
from tape_graphs import TapeGraphs
from tiny_models import WINDOW, codebook_for, tiny_model
from transformers.cache_utils import DynamicCache

from million_cli.bench import fill as fill_module
from million_cli.bench.fill import fill
from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.select import Kernels

BOOK = codebook_for("llama")
ON_DEVICE = Kernels(lambda query: None, DeviceOps)


@pytest.mark.parametrize("cache_class", [PagedPQCache, DynamicPQCache])
def test_steps_go_on_from_random_codes(cache_class):
    cache = cache_class(tiny_model(), codebook_for("llama"), WINDOW, compute="kernel", kernels=ON_DEVICE)
    engine = Engine(tiny_model(), cache, graphs=TapeGraphs())
    fill(engine, 3, 200, new_tokens=40)
    assert cache.store.length() == int(cache.steps.device_length()) == 200
    codes, _ = cache.store.codes(0)
    assert codes.read(0, WINDOW.coded_length(200)).unique().numel() > 1
    for _ in range(40):
        engine.step()
    assert engine.logits.isfinite().all()
    assert engine.length == cache.store.length() == int(cache.steps.device_length()) == 240
    assert cache.memory()["key_codes"] > 0


def test_steps_go_on_from_random_keys_and_values():
    engine = Engine(tiny_model(), DenseCache(tiny_model(), 240), graphs=TapeGraphs())
    fill(engine, 3, 200, new_tokens=40)
    for _ in range(40):
        engine.step()
    assert engine.logits.isfinite().all()
    assert engine.length == 240
    with pytest.raises(UserError, match="made for 240"):
        engine.step()


@pytest.mark.parametrize(
    "make", [lambda m: DynamicCache(config=m.config), lambda m: PagedPQCache(m, BOOK, WINDOW)]
)
def test_a_cache_without_steps_is_appended_to(make, monkeypatch):
    monkeypatch.setattr(fill_module, "CHUNK", 48)
    engine = Engine(tiny_model(), make(tiny_model()))
    assert engine.steps is None
    fill(engine, 2, 100)
    for _ in range(3):
        engine.step()
    assert engine.cache.get_seq_length() == 103
    assert engine.logits.isfinite().all()
