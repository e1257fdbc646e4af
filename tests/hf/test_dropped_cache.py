"""A model that drops its cache in the middle of a text: its results are refused."""

from __future__ import annotations

import pytest
import torch
from random_codebook import random_codebook
from tiny_models import WINDOW, random_ids, tiny_config
from transformers import PreTrainedModel

from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.models import random_model
from million_cli.pipelines.session import byte_tokenizer
from million_cli.tasks.answers import greedy

CHANGES = 64


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = tiny_config("phi3", head_dim=8, rope_parameters=rope, original_max_position_embeddings=CHANGES)
    return random_model(config, dtype="float64")


def cache(model: PreTrainedModel) -> PagedPQCache:
    return PagedPQCache(model, random_codebook(model, (4, 5), (2, 8)), WINDOW)


def test_answers_beyond_the_change_are_refused(model):
    """Prompt and answer lie on both sides of the length at which Phi-3 drops its cache."""
    prompts, tokenizer = random_ids(1, 55).tolist(), byte_tokenizer()
    with pytest.raises(UserError, match="the model did not keep its text in the cache: of 74 tokens"):
        greedy(model, tokenizer, prompts, cache(model), new_tokens=20, stops=())
    assert len(greedy(model, tokenizer, prompts, cache(model), new_tokens=8, stops=())[0]) == 8
    with pytest.raises(UserError, match="of 99 tokens it holds 0"):  # dropped at once
        greedy(model, tokenizer, random_ids(1, 80).tolist(), cache(model), new_tokens=20, stops=())


@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_an_engine_does_not_mix_two_embeddings(model, kind):
    make = (lambda: DenseCache(model, 300)) if kind == "dense" else lambda: cache(model)
    engine = Engine(model, make(), graphs=None)
    message = "rotary embedding changes at 64"
    with pytest.raises(UserError, match=message):
        list(engine.generate(random_ids(1, 55), max_new_tokens=20))
    with pytest.raises(UserError, match=message):
        engine.prefill(random_ids(1, 10), continue_text=True)
    with pytest.raises(UserError, match=message):
        engine.prefill(random_ids(1, 100), chunk=40)
    assert len(list(engine.generate(random_ids(1, 80), max_new_tokens=20))) == 20
    assert torch.isfinite(engine.logits).all()
