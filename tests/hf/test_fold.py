"""The values' maps inside the projections: the same model, the same codes, the same answers."""

from __future__ import annotations

import pytest
import torch
from random_codebook import random_codebook
from tiny_models import ARCHITECTURES, WINDOW, codebook_for, forward, random_ids, tiny_model
from transformers import DynamicCache

from million_cli.errors import UserError
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.fold import FoldedValues
from million_cli.hf.models import fingerprint, random_model

IDS = random_ids(2, 100)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quantised(model, codebook):
    return forward(model, PagedPQCache(model, codebook, WINDOW, prefill="quantized"), IDS)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_folding_changes_no_logits_and_is_undone_bit_by_bit(architecture):
    model, codebook = tiny_model(architecture), codebook_for(architecture)
    before = weights(model)
    dense = forward(model, DynamicCache(config=model.config), IDS)
    coded = quantised(model, codebook)
    with FoldedValues(model, codebook) as folded:
        assert folded.codebook.values.transform is None
        assert folded.codebook.keys is codebook.keys
        changed = [name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])]
        assert changed
        assert all("self_attn" in name for name in changed)
        again = forward(model, DynamicCache(config=model.config), IDS)
        torch.testing.assert_close(again, dense, rtol=0, atol=1e-5)  # maps and inverses are float32
        torch.testing.assert_close(quantised(model, folded.codebook), coded, rtol=0, atol=1e-5)
    assert (coded - dense).abs().max() > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    codebook.check(fingerprint(model))


def test_biases_are_folded_too():
    config = {**tiny_model().config.to_dict(), "attention_bias": True}
    model = random_model(config, seed=1, dtype="float64")
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).bias.normal_()
    codebook = random_codebook(model, (8, 5), (4, 8))
    coded = quantised(model, codebook)
    with FoldedValues(model, codebook) as folded:
        torch.testing.assert_close(quantised(model, folded.codebook), coded, rtol=0, atol=1e-5)


def test_refusals():
    model = tiny_model()
    with pytest.raises(UserError, match="no rotation or metric to fold"):
        FoldedValues(model, codebook_for(mapped=False))
    with pytest.raises(UserError, match="belongs to another model"):
        FoldedValues(tiny_model(seed=1), codebook_for())
    norm = model.model.layers[1].self_attn
    norm.v_norm = torch.nn.Identity()
    before = weights(model)
    try:
        with pytest.raises(UserError, match="its values pass a norm"):
            FoldedValues(model, codebook_for())
    finally:
        del norm.v_norm
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_what_a_model_does_to_values_beyond_projections_is_noticed_and_undone(monkeypatch):
    model, codebook = tiny_model(), codebook_for()
    before = weights(model)
    for layer in model.model.layers:  # a gate between the value and the output projection
        monkeypatch.setattr(layer.self_attn.o_proj, "forward", gated(layer.self_attn.o_proj))
    with pytest.raises(UserError, match=r"fold=true: model_type=llama: .* changes its logits by"):
        FoldedValues(model, codebook)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def gated(projection):
    return lambda x: torch.nn.functional.linear(x * x.sigmoid(), projection.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_accepted(dtype):
    model = random_model(tiny_model().config, seed=0, dtype=dtype)
    with FoldedValues(model, random_codebook(model, (8, 5), (4, 8))) as folded:
        assert folded.codebook.values.transform is None
