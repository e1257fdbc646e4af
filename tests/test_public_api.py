"""The names that the package offers, and the example in its docstring."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import million_cli
from million_cli.errors import UserError
from million_cli.hf import models as hf_models
from million_cli.hf.models import random_model
from million_cli.pq.codebook import Codebook
from million_cli.recipe import Recipe, SideCodes


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny random model over bytes instead of the shipped model."""
    torch.set_num_threads(1)
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = {"model_type": "llama", "vocab_size": 257, "hidden_size": 64, "intermediate_size": 64, **shape}
    folder = tmp_path / "reference-model"
    random_model({**config, "eos_token_id": 256, "max_position_embeddings": 512}).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    monkeypatch.setattr(hf_models, "REFERENCE_FOLDER", folder)
    return folder


def test_example_in_the_docstring(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is ten lines, runs as it stands, and fills a cache of codes."""
    example = inspect.cleandoc(million_cli.__doc__ or "").split(":\n\n", 1)[1]
    code = inspect.cleandoc(example)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    Path("calibration.txt").write_text(
        "".join(f"The {i}th line of a text that says little. " for i in range(50))
    )
    names: dict[str, object] = {}
    exec(code, names)
    cache, output = names["cache"], names["output"]
    assert isinstance(cache, million_cli.PagedPQCache)
    assert output.shape[1] > 128
    assert cache.memory()["key_codes"] > 0
    assert cache.bits == 4.0
    assert "key_codes" in capsys.readouterr().out


def test_train_codebook_takes_a_changed_recipe(reference: Path) -> None:
    model, tokenizer = million_cli.load_model("reference")
    recipe = Recipe.named("pq-4bit", "sample.context=160", "sample.code=0")
    quantizer = replace(
        recipe.quantizer, scope="layer", bits=None, keys=SideCodes(16, nbits=4), values=SideCodes(8, nbits=3)
    )
    recipe = replace(recipe, quantizer=quantizer)
    text = "one two three four " * 80
    codebook = million_cli.train_codebook(model, tokenizer, text, recipe, seed=3, show_progress=False)
    assert isinstance(codebook, Codebook)
    assert (codebook.specs[0].keys.M, codebook.specs[1].keys.nbits) == (16, 4)
    assert (codebook.specs[0].values.M, codebook.specs[1].values.nbits) == (8, 3)
    assert codebook.meta.tokens == len(tokenizer(text).input_ids) // 160 * 160 + 160  # and a repetition
    assert (codebook.meta.recipe, codebook.meta.seed) == (recipe, 3)
    assert million_cli.DynamicPQCache(model, codebook).bits == codebook.bits_per_element


@pytest.mark.parametrize(
    ("text", "recipe", "options", "message"),
    [
        ("", "pq-4bit", {}, "text is empty"),
        ("text", "pq-5bit", {}, "recipe=pq-5bit: accepted are million-paper"),
        ("text", "pq-4bit", {"seed": -1}, "seed=-1"),
        ("text " * 10, "pq-4bit", {}, "samples for 256 centroids: accepted are at least as many"),
        ("text", Recipe().override("quantizer.keys.M=7"), {}, "M=7 does not divide head_dim=64"),
    ],
)
def test_train_codebook_refuses(
    reference: Path, text: str, recipe: str | Recipe, options: dict[str, Any], message: str
) -> None:
    model, tokenizer = million_cli.load_model("reference")
    with pytest.raises(UserError, match=message):
        million_cli.train_codebook(model, tokenizer, text, recipe, show_progress=False, **options)


def test_every_name_is_there() -> None:
    assert set(million_cli.__all__) <= set(dir(million_cli))
    for name in million_cli.__all__:
        assert callable(getattr(million_cli, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        million_cli.no_such_name  # noqa: B018


def test_the_package_and_its_command_line_start_without_torch() -> None:
    code = "import sys, million_cli.cli; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
