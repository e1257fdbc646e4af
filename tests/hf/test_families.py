"""Families of models: logits are those of the dequantising reference, or the model is refused in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, FULL, HYBRIDS, REFUSED, WINDOWS, family_model
from random_codebook import random_codebook
from tiny_models import WINDOW, forward, random_ids, reference_cache, tiny_config
from transformers import PreTrainedModel

from million_cli.calibration.sampling import SamplingCache
from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import PagedPQCache
from million_cli.hf.models import full_attention_layers, random_model

README = Path(__file__).resolve().parents[2] / "README.md"


def logits(model: PreTrainedModel, cache: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([forward(model, cache, part) for part in parts], 1)


def assert_as_reference(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_reference(family: str) -> None:
    model = family_model(family)
    codebook, ids = random_codebook(model, (4, 5), (2, 8)), random_ids(2, 62)
    parts = ids.split([50, *[1] * 12], dim=1)
    cache = PagedPQCache(model, codebook, WINDOW)
    ours = logits(model, cache, parts)
    theirs = logits(model, reference_cache(model, codebook), parts)
    assert cache.get_seq_length() == 62
    assert_as_reference(ours, theirs)
    assert (ours[:, -1] - forward(model, None, ids)[:, -1]).abs().max() > 1e-3, "nothing was coded"


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(family: str) -> None:
    settings, reason = REFUSED[family]
    with pytest.raises(UserError, match=reason) as error:
        SamplingCache(family_model(family, settings), samples=8)
    assert "\n" not in str(error.value)


def test_the_readme_lists_the_families_of_these_tests() -> None:
    rows = re.findall(r"^\| ([a-z ,-]+) \| ((?:`[a-z0-9_]+`(?:, )?)+) \|", README.read_text(), re.MULTILINE)
    listed = {kind: re.findall(r"`([a-z0-9_]+)`", names) for kind, names in rows}
    assert listed == {
        "full attention": sorted(FULL),
        "sliding windows in some layers": sorted(WINDOWS),
        "linear attention in some layers": sorted(HYBRIDS),
        "refused": sorted(REFUSED),
    }


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
