"""Families of models by what they call their projections: logits are those of the dequantising reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_codebook import random_codebook
from tiny_models import VOCABULARY, WINDOW, forward, random_ids, reference_cache, tiny_config
from transformers import PreTrainedModel

from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.models import full_attention_layers, random_model

_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    },
    "persimmon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_reference(family: str) -> None:
    config = {"model_type": family, "vocab_size": VOCABULARY, "initializer_range": 0.25, **FAMILIES[family]}
    model = random_model({**config, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, dtype="float64")
    codebook, ids = random_codebook(model, (4, 5), (2, 8)), random_ids(2, 70)
    parts = ids.split([50, *[1] * 20], dim=1)
    cache = PagedPQCache(model, codebook, WINDOW)
    ours = torch.cat([forward(model, cache, part) for part in parts], 1)
    expected = reference_cache(model, codebook)
    theirs = torch.cat([forward(model, expected, part) for part in parts], 1)
    assert cache.get_seq_length() == 70
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def phi3_with_a_long_window() -> PreTrainedModel:
    return random_model(tiny_config("phi3", sliding_window=120, max_position_embeddings=120), dtype="float64")


@pytest.mark.parametrize("padding", [0, 9])
def test_a_window_as_long_as_the_trained_context_is_full_attention(padding: int) -> None:
    model = phi3_with_a_long_window()
    codebook, ids, mask = (
        random_codebook(model, (8, 5), (4, 8)),
        random_ids(2, 100),
        torch.ones(2, 100).long(),
    )
    mask[0, :padding] = 0
    assert codebook.meta.fingerprint.layers == (0, 1)
    cache, expected = PagedPQCache(model, codebook, WINDOW), reference_cache(model, codebook)
    for start, stop in ((0, 60), *((t, t + 1) for t in range(60, 100))):
        ours, theirs = (
            forward(model, each, ids[:, start:stop], mask[:, :stop]) for each in (cache, expected)
        )
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="121 tokens: this model attends to the latest 120"):
        forward(model, cache, random_ids(2, 21), torch.ones(2, 121).long())


@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_an_engine_stops_where_a_window_would_slide(kind: str) -> None:
    model = phi3_with_a_long_window()
    codebook = random_codebook(model, (8, 5), (4, 8))
    cache = DenseCache(model, 300) if kind == "dense" else PagedPQCache(model, codebook, WINDOW)
    engine = Engine(model, cache, graphs=None)
    run = engine.generate(random_ids(1, 100), max_new_tokens=100)
    with pytest.raises(UserError, match="121 tokens: this model attends to the latest 120"):
        list(run)
    assert engine.length == 120
    with pytest.raises(UserError, match="130 tokens"):
        engine.prefill(random_ids(1, 130))


def test_a_window_shorter_than_the_context_slides() -> None:
    model = random_model(tiny_config("phi3", sliding_window=60, max_position_embeddings=120), dtype="float64")
    with pytest.raises(UserError, match="no layer has full attention"):
        full_attention_layers(model.config)
