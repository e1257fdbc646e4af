"""`generate` with a static PQ cache: its compiled path, one compilation, the paged cache's tokens."""

from __future__ import annotations

import pytest
import torch
from device_ops import DeviceOps
from tiny_models import WINDOW, codebook_for, random_ids, tiny_model
from transformers import CompileConfig

from million_cli.errors import UserError
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.select import Kernels
from million_cli.hf.static import StaticPQCache

ON_DEVICE = Kernels(lambda query: None, DeviceOps)


def static_cache(max_length=200, architecture="llama", compute="kernel"):
    return StaticPQCache(
        tiny_model(architecture),
        codebook_for(architecture),
        WINDOW,
        max_length=max_length,
        compute=compute,
        kernels=ON_DEVICE,
    )


def tokens(cache, ids, n, mask=None, **options):
    return tiny_model().generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


def reference():
    return PagedPQCache(tiny_model(), codebook_for(), WINDOW, compute="torch")


def padded():
    ids, mask = random_ids(2, 45), torch.ones(2, 45, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    return ids, mask


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_are_those_of_the_paged_cache(compiled):
    ids, mask = padded()
    cache = static_cache()
    assert cache.is_compileable
    options = {"disable_compile": True}
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True, dynamic=False)
        config._compile_all_devices = True
        options = {"compile_config": config}
    expected = tokens(reference(), ids, 60, mask)
    for _ in range(2):
        assert tokens(cache, ids, 60, mask, **options).tolist() == expected.tolist()
        assert cache.store.ops.calls["append"] > 0
        memory = cache.memory()
        assert cache.store.length() == 45 + 59
        assert memory["key_codes"] > 0
        cache.reset()
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_several_turns():
    cache, paged = static_cache(), reference()
    first = random_ids(2, 45)
    for other in (cache, paged):
        text = tokens(other, first, 20, disable_compile=True)
        text = tokens(other, torch.cat([text, random_ids(2, 30, seed=2)], 1), 20, disable_compile=True)
        if other is cache:
            ours = text
    assert ours.tolist() == text.tolist()


def test_beams():
    ids, mask = padded()
    ours, expected = (
        tokens(cache, ids, 30, mask, num_beams=3, disable_compile=True)
        for cache in (static_cache(), reference())
    )
    assert ours.tolist() == expected.tolist()


def test_no_more_tokens_than_it_was_made_for():
    with pytest.raises(UserError, match="65 tokens: this cache was made for 64"):
        tokens(static_cache(64), random_ids(1, 45), 40, disable_compile=True)
    with pytest.raises(UserError, match="made for 20"):
        tokens(static_cache(20), random_ids(1, 45), 4, disable_compile=True)
    with pytest.raises(UserError, match="max_length=0"):
        static_cache(0)
    assert tokens(static_cache(64), random_ids(1, 45), 20, disable_compile=True).shape[1] == 65


def test_without_kernels_it_is_a_paged_cache():
    cache = static_cache(compute="torch")
    assert not cache.is_compileable
    ids, mask = padded()
    assert tokens(cache, ids, 40, mask).tolist() == tokens(reference(), ids, 40, mask).tolist()
    assert not static_cache(architecture="gemma3_text").is_compileable


def test_memory_is_taken_once():
    cache = static_cache(150)
    tokens(cache, random_ids(2, 45), 90, disable_compile=True)
    before = cache.memory()
    assert cache.store.page_stats.total == 2 * WINDOW.coded_length(150) // WINDOW.page_size
    assert before["total"] == sum(v for k, v in before.items() if k not in ("total", "codebooks"))
