"""Windows of tokens: none is longer than the positions that a model has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import VOCABULARY

from million_cli.calibration.calibrate import Calibration
from million_cli.errors import UserError
from million_cli.hf.models import random_model
from million_cli.recipe import Recipe
from million_cli.spec import WindowSpec
from million_cli.text import Text, synthetic_text


class Characters:
    """A tokenizer: a token a character."""

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(character) % (VOCABULARY - 3) for character in text]}

    def __len__(self):
        return VOCABULARY


LEARNED = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "word_embed_proj_dim": 32, "max_position_embeddings": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", LEARNED)
def test_learned_positions_are_read_within_them(family):
    model = random_model({"model_type": family, "vocab_size": VOCABULARY, **LEARNED[family]})
    text, recipe = Text(synthetic_text(0, 20_000), "synthetic"), Recipe.named("pq-4bit")
    make = Calibration(model, Characters(), text, recipe, 0, WindowSpec(), False)
    assert {len(window) for window in make.windows} == {256}
    with torch.no_grad():
        model(make.windows[0][None])
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 300), 5))
    longer = replace(recipe, sample=replace(recipe.sample, context=300))
    with pytest.raises(UserError, match=r"sample\.context=300: accepted are 2 to 256"):
        len(Calibration(model, Characters(), text, longer, 0, WindowSpec(), False).windows)
