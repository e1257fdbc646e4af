"""Coded layers beside transformers' own, linear attention and sliding windows, under changes of a cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import HYBRIDS, family_model
from random_codebook import random_codebook
from tiny_models import WINDOW, forward, random_ids
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from million_cli.engine.engine import Engine
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.trial import parts_of
from million_cli.pq.codebook import Codebook

IN_ONE_PIECE = {"jamba"}
each_hybrid = pytest.mark.parametrize("family", HYBRIDS)


@cache
def served(family: str) -> tuple[PreTrainedModel, Codebook]:
    model = family_model(family)
    return model, random_codebook(model, (4, 5), (2, 8))


def read(family: str, ids: torch.Tensor, cache: Any = None) -> Any:
    """A cache that has read `ids`, the newest tokens one by one."""
    model, codebook = served(family)
    cache = cache or PagedPQCache(model, codebook, WINDOW)
    for part in (ids[:, :50], *ids[:, 50:].split(1, 1)):
        forward(model, cache, part)
    return cache


def assert_goes_on_alike(family: str, cache: Any, other: Any, batch: int) -> None:
    model = served(family)[0]
    for token in random_ids(batch, 4, seed=5).split(1, 1):
        ours, theirs = forward(model, cache, token), forward(model, other, token)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@each_hybrid
def test_a_reset_cache_is_as_a_new_one_in_any_batch(family: str) -> None:
    cache = read(family, random_ids(2, 60))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_goes_on_alike(family, read(family, random_ids(3, 60), cache), read(family, random_ids(3, 60)), 3)


@each_hybrid
def test_sequences_are_reordered_repeated_and_selected(family: str) -> None:
    ids = random_ids(3, 60)
    cache = read(family, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 1]))
    assert_goes_on_alike(family, cache, read(family, ids[[0, 2, 2]]), 3)


@each_hybrid
def test_a_crop_goes_to_the_start_or_is_refused_without_a_change(family: str) -> None:
    ids = random_ids(2, 60)
    cache = read(family, ids)
    with pytest.raises(
        UserError, match="a crop by 3 tokens: linear attention and sliding windows keep no earlier"
    ):
        cache.crop(-3)
    cache.crop(0)
    assert cache.get_seq_length() == 60
    assert_goes_on_alike(family, cache, read(family, ids), 2)
    cache.crop(-64)
    assert cache.get_seq_length() == 0
    assert_goes_on_alike(family, read(family, ids, cache), read(family, ids), 2)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_sliding_windows_are_cropped_as_far_as_they_hold(family: str) -> None:
    model, codebook = served(family)
    ids, cache = random_ids(2, 60), PagedPQCache(*served(family), WINDOW)
    forward(model, cache, ids[:, :20])
    cache.crop(-3)  # the window of 24 was not reached
    forward(model, cache, ids[:, 17:50])
    with pytest.raises(UserError, match="a crop by 3 tokens: linear attention and sliding windows keep"):
        cache.crop(-3)
    cache.crop(0)
    assert cache.get_seq_length() == 50
    cache.activate_past_recording()
    forward(model, cache, random_ids(2, 4, seed=9))
    with pytest.raises(UserError, match="a crop by 5 tokens"):
        cache.crop(-5)
    cache.crop(-4)
    fresh = PagedPQCache(model, codebook, WINDOW)
    for part in (ids[:, :17], ids[:, 17:50]):
        forward(model, fresh, part)
    assert_goes_on_alike(family, cache, fresh, 2)
    cache.crop(-54)
    assert cache.get_seq_length() == 0
    assert_goes_on_alike(family, read(family, ids, cache), read(family, ids), 2)


def test_convolutions_alone_are_cropped_as_far_as_they_recorded() -> None:
    model, codebook = served("lfm2")
    ids, cache = random_ids(2, 60), PagedPQCache(model, codebook, WINDOW)
    forward(model, cache, ids[:, :50])
    cache.activate_past_recording()
    for token in random_ids(2, 4, seed=9).split(1, 1):
        forward(model, cache, token)
    with pytest.raises(UserError, match="a crop by 5 tokens"):
        cache.crop(-5)
    cache.crop(-4)
    fresh = PagedPQCache(model, codebook, WINDOW)
    forward(model, fresh, ids[:, :50])
    assert_goes_on_alike("lfm2", cache, fresh, 2)


@each_hybrid
@pytest.mark.parametrize("read_by", [PagedPQCache, DynamicPQCache])
def test_a_saved_text_goes_on(family: str, read_by: Any, tmp_path: Any) -> None:
    model, codebook = served(family)
    cache = read(family, random_ids(2, 60))
    cache.save(tmp_path / "text.safetensors")
    again = read_by.load(tmp_path / "text.safetensors", model, codebook)
    assert again.memory()["linear"] == cache.memory()["linear"] > 0
    assert again.memory()["total"] == sum(
        size for part, size in again.memory().items() if part not in ("linear", "codebooks", "total")
    )
    assert_goes_on_alike(family, again, cache, 2)


@each_hybrid
def test_a_text_in_parts_is_right_or_refused(family: str) -> None:
    model, codebook = served(family)
    ids = random_ids(1, 30)
    assert parts_of(model).in_two == (family not in IN_ONE_PIECE)
    for each in (PagedPQCache(model, codebook, WINDOW), DynamicCache(config=model.config)):
        engine = Engine(model, each, graphs=None)
        if family in IN_ONE_PIECE:
            engine.prefill(ids)
            with pytest.raises(UserError, match="forget what they read before several tokens"):
                engine.prefill(ids, continue_text=True)
            with pytest.raises(UserError, match="forget what they read"):
                engine.prefill(ids, chunk=20)
        else:
            engine.prefill(ids, chunk=20)
            whole = forward(model, None, ids)[:, -1]
            assert engine.logits is not None
            torch.testing.assert_close(engine.logits, whole, rtol=0, atol=1e-3)
    if family in IN_ONE_PIECE:
        pq_cache = PagedPQCache(model, codebook, WINDOW)
        forward(model, pq_cache, ids)
        with pytest.raises(UserError, match="30 tokens after 30"):
            forward(model, pq_cache, ids)


@pytest.mark.parametrize("family", ["qwen3_next", "granitemoehybrid", "lfm2"])
def test_beams_and_left_padding(family: str) -> None:
    model, codebook = served(family)
    ids, mask = random_ids(2, 45), torch.ones(2, 45).long()
    mask[0, :9] = 0
    tokens = [
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, num_beams=3, do_sample=False
        )
        for cache in (PagedPQCache(model, codebook, WINDOW), DynamicPQCache(model, codebook, WINDOW))
    ]
    assert tokens[0].tolist() == tokens[1].tolist()
