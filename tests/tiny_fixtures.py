"""A random float64 model, its codebook and caches: exact arithmetic for statements about equality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import million_cli
from million_cli.codecs.distort import DistortCache
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.models import random_model
from million_cli.pipelines.session import byte_tokenizer
from million_cli.pq import Codebook
from million_cli.recipe import Recipe
from million_cli.spec import WindowSpec
from million_cli.text import Text, synthetic_text

WINDOW = WindowSpec(page_size=16, residual=32)


@dataclass
class Tiny:
    model: PreTrainedModel
    tokenizer: Any
    codebook: Codebook

    def caches(self, kind: str = "contiguous") -> Any:
        def make(prefill: str) -> Cache:
            if kind == "dense":
                return DynamicCache(config=self.model.config)
            if prefill == "distort":
                return DistortCache(self.model, self.codebook)
            cls = PagedPQCache if kind == "paged" else DynamicPQCache
            return cls(self.model, self.codebook, WINDOW, prefill=prefill)

        return make


SHAPE = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
"""A model of two layers that a test trains and reads in a second."""


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    model, tokenizer = random_model(SHAPE, seed=0, dtype="float64"), byte_tokenizer()
    recipe = Recipe.named(
        "pq-4bit",
        "quantizer.bits=null",
        "quantizer.keys.nbits=4",
        "quantizer.values.nbits=4",
        "sample.context=128",
        "sample.code=0",
        "sample.repeats=0",
    )
    codebook = million_cli.train_codebook(
        model, tokenizer, synthetic_text(1, 2000), recipe, show_progress=False
    )
    return Tiny(model, tokenizer, codebook)


@pytest.fixture(scope="session")
def text() -> Text:
    return Text(synthetic_text(2, 3000), "synthetic")
