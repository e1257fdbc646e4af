"""Families of models by what they call their projections: logits are those of the dequantising reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_codebook import random_codebook
from tiny_models import VOCABULARY, WINDOW, forward, random_ids, reference_cache

from million_cli.hf.cache import PagedPQCache
from million_cli.hf.models import random_model

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
