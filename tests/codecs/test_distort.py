"""The distorting cache holds exactly the coded and decoded K and V."""

from __future__ import annotations

import pytest
import torch
from tiny_models import codebook_for, forward, quantise, random_ids, tiny_model
from transformers import DynamicCache

from million_cli.codecs.distort import DistortCache
from million_cli.errors import UserError


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_everything_is_quantised_at_once(architecture: str) -> None:
    model, codebook = tiny_model(architecture), codebook_for(architecture)
    model.set_attn_implementation("plain_float64")
    dense, distorted = DynamicCache(config=model.config), DistortCache(model, codebook)
    ids = random_ids(2, 20)
    assert not torch.equal(forward(model, dense, ids), forward(model, distorted, ids))
    first = codebook.meta.fingerprint.layers[0]  # its input is not distorted yet
    expected = quantise(dense.layers[first].keys, codebook.keys, 0)
    torch.testing.assert_close(distorted.layers[first].keys, expected, rtol=0, atol=1e-9)
    expected = quantise(dense.layers[first].values, codebook.values, 0)
    torch.testing.assert_close(distorted.layers[first].values, expected, rtol=0, atol=1e-9)
    assert distorted.bits == codebook.bits_per_element


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_chunks_and_reset(architecture: str) -> None:
    model, ids = tiny_model(architecture), random_ids(2, 60)
    cache = DistortCache(model, codebook_for(architecture))
    whole = forward(model, cache, ids)
    cache.reset()
    parts = torch.cat([forward(model, cache, part) for part in ids.split(17, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_codebook_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="model_type"):
        DistortCache(tiny_model("qwen3"), codebook_for("llama"))
