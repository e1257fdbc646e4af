"""How models turn their keys, found by reading; a codebook of one scaling serves another."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from device_ops import DeviceOps
from random_codebook import random_codebook
from tiny_models import VOCABULARY, WINDOW, forward, random_ids, reference_cache, tiny_config, tiny_model
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from million_cli.codecs.distort import DistortCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.models import full_attention_layers, random_model
from million_cli.hf.rotary import Rotary, served
from million_cli.hf.select import Kernels, log_once
from million_cli.hf.static import StaticPQCache
from million_cli.pq.rebase import Rebase

ORIGINAL = 256
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
    },
}
LENGTHS = {"dynamic": (256, 512, 1024), "longrope": (256, 1024)}
"""Of texts whose angles differ, where they do; 1024 is the context."""
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_SLIDING = {"sliding_window": 24, "num_hidden_layers": 4}
LAYOUTS: dict[str, tuple[dict[str, Any], list[str | None], int]] = {
    "llama": ({}, ["halves"] * 2, 8),
    "stablelm": ({"partial_rotary_factor": 0.5}, ["halves"] * 2, 2),  # of head_dim 8
    "gpt_neox": ({"rotary_pct": 0.25}, ["halves"] * 2, 1),
    "glm": ({"partial_rotary_factor": 0.5}, ["neighbours"] * 2, 4),
    "cohere": ({}, ["neighbours"] * 2, 4),
    "ernie4_5": ({}, ["neighbours"] * 2, 8),
    "smollm3": ({"num_hidden_layers": 4}, [*["halves"] * 3, "still"], 4),
    "cohere2": (_SLIDING, ["still"], 0),  # the layers that rotate have sliding windows
    "gemma2": ({}, ["halves"], 8),
    "gemma3_text": ({}, ["halves"], 8),  # frequencies of their own a type of layer
    "llama4_text": ({"num_local_experts": 2, "intermediate_size_mlp": 48}, ["neighbours"] * 2, 8),
    "gpt2": (_GPT, [None] * 2, 0),  # positions are learned and added
    "bloom": ({"n_head": 4, "n_layer": 2}, ["still"] * 2, 0),  # scores fall with the distance
}


@cache
def scaled(scaling: str, head_dim: int = 16) -> PreTrainedModel:
    """The same weights whatever the scaling."""
    rope = {"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]}
    return random_model(tiny_config("llama", rope_parameters=rope, head_dim=head_dim), dtype="float64")


@torch.no_grad()
def keys_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """Keys `[1, Hkv, T, D]` of each full-attention layer."""
    text = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    model(input_ids=ids, position_ids=positions[None], past_key_values=text, use_cache=True)
    return [text.layers[i].keys for i in full_attention_layers(model.config)]  # type: ignore[misc]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("length", [200, 500, 1000])
def test_keys_are_found_again_at_position_0(scaling: str, length: int) -> None:
    """In the first layer a key before RoPE depends on its token alone."""
    model = scaled(scaling)
    rotary = Rotary(model)
    assert rotary.layouts == ["halves"] * 2
    assert rotary.context == 1024
    assert rotary.lengths(1024) == LENGTHS.get(scaling, (1024,))
    regime = min(n for n in LENGTHS.get(scaling, (1024,)) if n >= length)
    if scaling == "dynamic":  # each length has angles of its own; the regime's end stands for it
        length = regime
    at = torch.arange(length - 40, length)
    ids = random_ids(1, 40)
    keys = keys_at(model, ids, at)[0]
    before_rope = model.model.layers[0].self_attn.k_proj(
        model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    )
    before_rope = before_rope.view(1, 40, 2, 16).transpose(1, 2) * rotary.scale(0)
    found = rotary.to_origin(0, keys, at, length)
    torch.testing.assert_close(found, before_rope.detach(), rtol=0, atol=2e-4)  # angles are float32
    assert (keys - found).abs().max() > 1


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_layouts_of_architectures(architecture: str) -> None:
    settings, expected, pairs = LAYOUTS[architecture]
    if architecture in ("gemma2", "gemma3_text", "llama"):
        model = tiny_model(architecture)
    else:
        shape = tiny_config(architecture, **settings)
        if architecture not in ("ernie4_5", "glm", "llama4_text"):
            del shape["head_dim"]
        model = random_model({**shape, "vocab_size": VOCABULARY}, dtype="float64")
    rotary = Rotary(model)
    assert rotary.layouts == expected
    assert rotary.movable == (None not in expected)
    for layer, layout in enumerate(expected):
        if layout in ("halves", "neighbours"):
            assert rotary.frequencies(layer).shape == (pairs,)
    if rotary.movable:
        made = rotary.rebases(64)
        assert [rebase and rebase.layout for rebase in made] == [
            None if layout == "still" else layout for layout in expected
        ]


@pytest.mark.parametrize("architecture", ["smollm3", "gpt_neox", "cohere"])
def test_logits_of_relative_keys_are_those_of_the_reference(architecture: str) -> None:
    """Layers without positions, rotation in part, neighbours."""
    shape = tiny_config(architecture, **LAYOUTS[architecture][0])
    del shape["head_dim"]
    if architecture == "gpt_neox":
        del shape["num_key_value_heads"]  # each head has its own
    model = random_model(shape, dtype="float64")
    codebook, ids = random_codebook(model, (4, 5), (2, 8), rebase=32), random_ids(2, 130)
    parts = ids.split([100, *[1] * 30], dim=1)
    ours = joined(model, PagedPQCache(model, codebook, WINDOW), parts)
    theirs = joined(model, reference_cache(model, codebook), parts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def joined(model: PreTrainedModel, text: Any, parts: Any) -> torch.Tensor:
    return torch.cat([forward(model, text, part) for part in parts], 1)


@pytest.mark.parametrize("cache_class", [DynamicPQCache, PagedPQCache])
def test_a_codebook_serves_another_scaling(cache_class: Any) -> None:
    """YaRN turns slower and scales keys: the blocks take its angles, and its factor is taken out of keys."""
    plain, yarn = scaled("default"), scaled("yarn")
    codebook = random_codebook(plain, (8, 5), (4, 8), rebase=32)
    embedding = yarn.model.rotary_emb
    by_hand = Rebase(32, embedding.inv_freq.double(), "halves", 1.0, float(embedding.attention_scaling))
    assert by_hand.gain > 1.1
    expected = replace(codebook, keys=replace(codebook.keys, rebases=(by_hand,) * 2))
    for ours in served(codebook, yarn).keys.rebases:
        assert ours is not None
        assert (ours.every, ours.layout, ours.scale) == (32, "halves", 1.0)
        assert ours.gain == pytest.approx(by_hand.gain, rel=1e-6)
        torch.testing.assert_close(ours.frequencies, by_hand.frequencies, rtol=1e-6, atol=0)
    ids = random_ids(2, 130)
    parts = ids.split([100, *[1] * 30], dim=1)
    text = cache_class(yarn, codebook, WINDOW)
    ours = joined(yarn, text, parts)
    theirs = joined(yarn, reference_cache(yarn, expected), parts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # angles are float32
    assert torch.equal(served(codebook, plain).keys.centroids[0], codebook.keys.centroids[0])


def test_keys_of_another_scaling_are_coded_at_the_calibrated_size() -> None:
    plain, yarn, ids, at = scaled("default"), scaled("yarn"), random_ids(1, 80), torch.arange(80)
    rebase = served(random_codebook(plain, (8, 5), (4, 8), rebase=32), yarn).keys.rebases[0]
    assert rebase is not None
    relative = rebase.relative(keys_at(yarn, ids, at)[0], 0)
    torch.testing.assert_close(relative.norm(dim=-1), keys_at(plain, ids, at)[0].norm(dim=-1))


def test_a_padding_token_does_not_hide_the_layout() -> None:
    """Its embedding is zero, so in the first layer its key is too."""
    model = scaled("default")
    assert not model.model.embed_tokens.weight[0].any()
    assert Rotary(model).movable


# -- which positions codes were made for ---------------------------------------------------------------------


def positions_of(calibrated: str, serving: str, positions: int | None = None) -> int | None:
    codebook = random_codebook(scaled(calibrated), (8, 5), (4, 8), rebase=32)
    codebook = replace(codebook, meta=replace(codebook.meta, positions=positions))
    return served(codebook, scaled(serving)).meta.positions


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_calibrated_scaling_is_covered(scaling: str) -> None:
    """Dynamic scaling goes on changing with the text, so its blocks hold for the context alone."""
    assert Rotary(scaled(scaling)).limit == positions_of(scaling, scaling)
    assert positions_of(scaling, scaling) == (1024 if scaling == "dynamic" else None)


@pytest.mark.parametrize("serving", ["linear", "yarn", "llama3"])
def test_slower_turns_are_covered(serving: str) -> None:
    assert positions_of("default", serving) is None


def test_faster_turns_are_not() -> None:
    """Linear by 4 sees angles of 31 / 4 positions in 31; pairs that went all the way round do not count."""
    assert positions_of("linear", "default") == 1 + 31 // 4
    assert positions_of("default", "longrope") == 32  # angles by length, origins by one of them
    faster = served(random_codebook(scaled("linear"), (8, 5), (4, 8), rebase=32), scaled("default"))
    assert served(faster, scaled("default")).meta.positions == 8  # a cache's codebook in another cache
    whole_turns = Rebase(1024, torch.full((8,), 0.01).double(), "halves")
    assert Rotary(scaled("default")).covered(0, whole_turns) is None


@pytest.mark.parametrize("cache_class", [DynamicPQCache, PagedPQCache])
def test_a_text_beyond_the_positions_is_recorded_once(cache_class: Any, caplog: Any) -> None:
    model = tiny_model()
    codebook = random_codebook(model, (8, 5), (4, 8))
    codebook = replace(codebook, meta=replace(codebook.meta, positions=50))
    text = cache_class(model, codebook, WINDOW)
    forward(model, text, random_ids(1, 50))
    assert text.fallbacks == ()
    log_once.cache_clear()
    for _ in range(3):
        forward(model, text, random_ids(1, 1))
    text.reset()
    forward(model, text, random_ids(1, 60))
    (fallback,) = text.fallbacks
    assert str(fallback).startswith("codes for every position -> codes for the first 50: the text goes on")
    assert [record.message for record in caplog.records] == [f"fallback: {fallback}"]
    strict = cache_class(model, codebook, WINDOW, strict=True)
    with pytest.raises(UserError, match="strict run: codes for every position -> codes for the first 50"):
        forward(model, strict, random_ids(1, 51))


def test_steps_and_distorted_caches_record_it_too() -> None:
    model = tiny_model()
    codebook = random_codebook(model, (8, 5), (4, 8))
    codebook = replace(codebook, meta=replace(codebook.meta, positions=50))
    on_device = Kernels(lambda query: None, DeviceOps)
    text = PagedPQCache(model, codebook, WINDOW, compute="kernel", kernels=on_device)
    engine = Engine(model, text, graphs=None)
    tokens = engine.generate(random_ids(1, 40), max_new_tokens=30)
    for _ in range(9):
        next(tokens)
    assert text.fallbacks == ()
    assert len(list(tokens)) == 21
    assert engine.mode == "steps"
    assert [fallback.got for fallback in text.fallbacks] == ["codes for the first 50"]
    static = StaticPQCache(model, codebook, WINDOW, max_length=80, compute="kernel", kernels=on_device)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "disable_compile": True}
    model.generate(random_ids(1, 40), past_key_values=static, **options)  # type: ignore[operator]
    assert [fallback.got for fallback in static.fallbacks] == ["codes for the first 50"]
    distorted = DistortCache(model, codebook)
    forward(model, distorted, random_ids(1, 50))
    assert distorted.fallbacks == ()
    forward(model, distorted, random_ids(1, 1))
    assert [fallback.got for fallback in distorted.fallbacks] == ["codes for the first 50"]


def test_a_saved_text_is_refused_under_another_scaling(tmp_path: Any) -> None:
    codebook = random_codebook(scaled("default"), (8, 5), (4, 8), rebase=32)
    text = PagedPQCache(scaled("yarn"), codebook, WINDOW)
    forward(scaled("yarn"), text, random_ids(1, 70))
    text.save(tmp_path / "text")
    assert PagedPQCache.load(tmp_path / "text", scaled("yarn"), codebook).get_seq_length() == 70
    with pytest.raises(UserError, match="another codebook"):
        PagedPQCache.load(tmp_path / "text", scaled("default"), codebook)
