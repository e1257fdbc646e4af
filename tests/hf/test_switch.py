"""A model uses our attention function while a PQ cache goes through it, and its own before and after."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from device_ops import DeviceOps
from tiny_models import WINDOW, codebook_for, forward, new_model, random_ids
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.select import Kernels
from million_cli.hf.static import StaticPQCache
from million_cli.hf.switch import use_pq_attention

KERNELS = {"compute": "kernel", "kernels": Kernels(lambda query: None, DeviceOps)}


def eager_model(architecture: str = "llama") -> PreTrainedModel:
    model = new_model(architecture)
    model.set_attn_implementation("eager")
    return model


def attentions(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(ids, output_attentions=True).attentions


def test_the_model_is_its_own_between_forward_passes():
    model, ids = eager_model(), random_ids(2, 50)
    expected = attentions(model, ids)
    cache = PagedPQCache(model, codebook_for(), WINDOW)
    for use in (
        lambda: None,  # a cache that was only made
        lambda: forward(model, cache, ids),
        lambda: model.generate(ids, past_key_values=PagedPQCache(model, codebook_for(), WINDOW)),
        lambda: list(
            Engine(model, PagedPQCache(model, codebook_for(), WINDOW, **KERNELS), graphs=None).generate(
                ids, max_new_tokens=5
            )
        ),
        lambda: model.generate(
            ids,
            past_key_values=StaticPQCache(model, codebook_for(), WINDOW, max_length=100, **KERNELS),
            disable_compile=True,
            max_new_tokens=5,
        ),
    ):
        use()
        assert model.config._attn_implementation == "eager"
        assert all(torch.equal(a, b) for a, b in zip(attentions(model, ids), expected, strict=True))


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 9])
def test_tokens_do_not_depend_on_the_models_own_function(own, padding):
    ids, mask = random_ids(2, 45), torch.ones(2, 45, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    model = eager_model()
    model.set_attn_implementation(own)
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    tokens = [
        model.generate(ids, past_key_values=cache, disable_compile=True, **options).tolist()
        for cache in (
            PagedPQCache(model, codebook_for(), WINDOW),
            StaticPQCache(model, codebook_for(), WINDOW, max_length=100, **KERNELS),
        )
    ]
    model.set_attn_implementation("million_pq")
    cache = PagedPQCache(model, codebook_for(), WINDOW)
    assert tokens == [model.generate(ids, past_key_values=cache, **options).tolist()] * 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_ends_early_leaves_nothing(error, monkeypatch):
    model, ids = eager_model(), random_ids(1, 20)
    expected = attentions(model, ids)
    cache = PagedPQCache(model, codebook_for(), WINDOW)

    def stop(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", stop)
        with pytest.raises(error):
            forward(model, cache, ids)
    with torch.no_grad():
        model(ids, past_key_values=DynamicCache(config=model.config))
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(attentions(model, ids), expected, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_switches_for_itself(duplicate):
    model, ids = eager_model(), random_ids(1, 60)
    expected = forward(model, PagedPQCache(model, codebook_for(), WINDOW), ids)
    other = duplicate(model)
    cache = PagedPQCache(other, codebook_for(), WINDOW)
    assert use_pq_attention(other) is not use_pq_attention(model)
    assert use_pq_attention(other).configs[0] is other.config
    assert torch.equal(forward(other, cache, ids), expected)
    assert other.config._attn_implementation == model.config._attn_implementation == "eager"


def test_the_decoder_alone_switches_too():
    model, ids = eager_model(), random_ids(1, 60)
    cache, again = (PagedPQCache(model, codebook_for(), WINDOW) for _ in range(2))
    with torch.no_grad():
        hidden = model.get_decoder()(ids, past_key_values=cache).last_hidden_state
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model.lm_head(hidden), forward(model, again, ids))


def test_training_a_codebook_leaves_the_model_as_it_was():
    from million_cli import train_codebook
    from million_cli.hf.models import random_model
    from million_cli.pipelines.session import byte_tokenizer
    from million_cli.recipe import Recipe

    shape = {"model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    model = random_model(shape)
    model.set_attn_implementation("eager")
    ids = random_ids(1, 20)
    expected = attentions(model, ids)
    text = "All work and no play makes a dull text. " * 60
    recipe = Recipe.named(
        "pq-4bit", "sample.reservoir=600", "quantizer.keys.nbits=4", "quantizer.values.nbits=4"
    )
    train_codebook(
        model, byte_tokenizer(), text, recipe.override("quantizer.bits=null", "quantizer.keys.dsub=4")
    )
    with pytest.raises(UserError):
        train_codebook(model, byte_tokenizer(), "", recipe)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(attentions(model, ids)[0], expected[0])
