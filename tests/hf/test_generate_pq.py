"""`model.generate` with PQ caches gives a dequantising reference's tokens, in every mode of generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    ARCHITECTURES,
    WINDOW,
    codebook_for,
    forward,
    random_ids,
    reference_cache,
    tiny_model,
)
from transformers import AttentionInterface, set_seed

from million_cli.hf.attention import PQHandle, pq_attention_forward
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.pq_cache import PQCache
from million_cli.hf.switch import ATTENTION_NAME

CACHES: dict[str, type[PQCache]] = {"contiguous": DynamicPQCache, "paged": PagedPQCache}
both_caches = pytest.mark.parametrize("store", CACHES)


def make_cache(store: str, architecture: str = "llama", **options: Any) -> PQCache:
    return CACHES[store](tiny_model(architecture), codebook_for(architecture), WINDOW, **options)


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = random_ids(len(lengths), width)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def generate(
    architecture: str, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> Any:
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    set_seed(7)
    return tiny_model(architecture).generate(ids, attention_mask=mask, past_key_values=cache, **options)


def assert_same_tokens(store: str, architecture: str = "llama", **call: Any) -> None:
    ids, mask = call.pop("inputs", None) or left_padded([70, 41])
    expected = generate(
        architecture, reference_cache(tiny_model(architecture), codebook_for(architecture)), ids, mask, **call
    )
    tokens = generate(architecture, make_cache(store, architecture), ids, mask, **call)
    assert tokens.tolist() == expected.tolist()
    assert len(set(tokens[0, ids.shape[1] :].tolist())) > 4, "a text that repeats itself proves little"


@both_caches
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_left_padded_batch(architecture: str, store: str) -> None:
    assert_same_tokens(store, architecture)


@both_caches
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 23},
    ],
    ids=["sampling", "beams", "sampled beams", "chunked prefill"],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_modes_of_generation(architecture: str, store: str, options: dict[str, Any]) -> None:
    assert_same_tokens(store, architecture, **options)


@both_caches
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_crops(architecture: str, store: str, how: str) -> None:
    one = (random_ids(1, 9).repeat(1, 6), torch.ones(1, 54, dtype=torch.long))
    if how == "assistant":
        options: dict[str, Any] = {"assistant_model": tiny_model("llama", seed=5)}
    else:
        options = {"prompt_lookup_num_tokens": 4}
    assert_same_tokens(store, architecture, inputs=one, max_new_tokens=40, min_new_tokens=0, **options)


@both_caches
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_turns_of_a_conversation_and_reuse_after_reset(architecture: str, store: str) -> None:
    def talk(cache: Any) -> list[list[int]]:
        ids, mask = left_padded([50, 33])
        for turn in range(3):
            ids = generate(architecture, cache, ids, mask)
            question = random_ids(2, 11, seed=turn)
            ids = torch.cat([ids, question], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], dim=1)
        return ids.tolist()

    expected = talk(reference_cache(tiny_model(architecture), codebook_for(architecture)))
    cache = make_cache(store, architecture)
    assert talk(cache) == expected
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory()["total"] == 0
    assert talk(cache) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_quantised_pass_is_token_by_token_decoding(architecture: str) -> None:
    ids = random_ids(2, 90)
    one_pass = forward(tiny_model(architecture), make_cache("paged", architecture, prefill="quantized"), ids)
    cache = make_cache("contiguous", architecture)
    steps = torch.cat([forward(tiny_model(architecture), cache, ids[:, t : t + 1]) for t in range(90)], dim=1)
    torch.testing.assert_close(one_pass, steps, rtol=0, atol=1e-9)
    dense = forward(tiny_model(architecture), None, ids)
    assert (one_pass - dense).abs().max() > 1e-2, "quantisation must show"


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_quantised_prefill_does_not_depend_on_chunks(chunk: int) -> None:
    ids = random_ids(2, 80)
    whole = forward(tiny_model(), make_cache("contiguous", prefill="quantized"), ids)
    cache = make_cache("contiguous", prefill="quantized")
    parts = torch.cat([forward(tiny_model(), cache, part) for part in ids.split(chunk, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@both_caches
def test_padding_of_whole_pages_changes_nothing(store: str) -> None:
    """Padding is coded like text, so only padding by whole pages leaves the boundaries where they were."""
    ids, (pad, length) = random_ids(1, 60), (2 * WINDOW.page_size, 50)
    padded = torch.cat([ids.new_zeros(1, pad), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= pad).long()[None]
    plain, shifted = make_cache(store), make_cache(store)
    a = [forward(tiny_model(), plain, ids[:, :length])]
    b = [
        padded_forward(tiny_model(), shifted, padded[:, : pad + length], mask[:, : pad + length], 0)[:, pad:]
    ]
    for t in range(length, 60):
        a.append(forward(tiny_model(), plain, ids[:, t : t + 1]))
        b.append(
            padded_forward(tiny_model(), shifted, padded[:, : pad + t + 1], mask[:, : pad + t + 1], pad + t)
        )
    torch.testing.assert_close(torch.cat(a, dim=1), torch.cat(b, dim=1), rtol=0, atol=1e-9)


@torch.no_grad()
def padded_forward(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, start: int) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(
        ids[:, start:],
        attention_mask=mask,
        position_ids=positions[:, start:],
        past_key_values=cache,
        use_cache=True,
    ).logits


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 50)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("reorder"), st.randoms(use_true_random=False)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.just(2)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=8,
)


@examples(60)
@given(operations=operations, store=st.sampled_from(list(CACHES)))
def test_any_sequence_of_operations(operations: list[tuple[str, Any]], store: str) -> None:
    """Logits after appends, crops, reorders, repeats, selections and resets are those of the reference."""
    model, cache = tiny_model(), make_cache(store)
    expected, B = reference_cache(model, codebook_for()), 2
    for step, (name, argument) in enumerate([*operations, ("append", 3), ("append", 1)]):
        if name == "append":
            ids = random_ids(B, argument, seed=step)
            ours = forward(model, cache, ids)
            torch.testing.assert_close(ours, forward(model, expected, ids), rtol=0, atol=1e-9)
        elif name == "crop" and cache.get_seq_length():
            n = min(argument, cache.get_seq_length() - 1)
            cache.crop(-n)
            expected.crop(-n)
        elif name == "reorder":
            order = torch.tensor([argument.randrange(B) for _ in range(B)])
            cache.reorder_cache(order)
            expected.reorder_cache(order)
        elif name == "repeat" and B < 4:
            cache.batch_repeat_interleave(argument)
            expected.batch_repeat_interleave(argument)
            B = B * argument if cache.get_seq_length() else B
        elif name == "select" and B > 2:
            cache.batch_select_indices(torch.tensor([B - 1, 0]))
            expected.batch_select_indices(torch.tensor([B - 1, 0]))
            B = 2
        elif name == "reset":
            cache.reset()
            expected, B = reference_cache(model, codebook_for()), 2
        assert cache.get_seq_length() == expected.get_seq_length()


@both_caches
def test_decoding_never_sees_dense_keys_or_values(store: str) -> None:
    seen: list[tuple[int, int, int]] = []

    def spy(module: Any, query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(key, PQHandle):
            assert value is key
            seen.append((module.layer_idx, query.shape[2], key.view.keys.shape[2]))
        else:
            assert module.layer_idx == 0, "only the sliding layer of this model is dense"
        return pq_attention_forward(module, query, key, value, *args, **kwargs)

    cache = make_cache(store, "gemma2")
    AttentionInterface.register(ATTENTION_NAME, spy)
    try:
        generate("gemma2", cache, random_ids(2, 80))
    finally:
        AttentionInterface.register(ATTENTION_NAME, pq_attention_forward)
    decode = [exact for layer, queries, exact in seen if queries == 1]
    assert len(decode) == 23
    assert max(decode) < WINDOW.residual
    assert {layer for layer, _, _ in seen} == {1}
    assert cache.bits == codebook_for().bits_per_element
    memory = cache.memory()
    coded = WINDOW.coded_length(cache.get_seq_length())
    assert memory["key_codes"] == 2 * 2 * coded * codebook_for().specs[0].keys.row_bytes
    assert memory["total"] == sum(v for name, v in memory.items() if name not in ("total", "codebooks"))


def test_crop_by_the_length_to_keep() -> None:
    """The positive argument that older versions of transformers use."""
    ids = random_ids(1, 70)
    kept, removed = make_cache("paged"), make_cache("contiguous")
    for cache, argument in ((kept, 55), (removed, -15)):
        forward(tiny_model(), cache, ids)
        cache.crop(argument)
        assert cache.get_seq_length() == 55
    kept.crop(60)
    assert kept.get_seq_length() == 55
    torch.testing.assert_close(
        forward(tiny_model(), kept, ids[:, 55:]),
        forward(tiny_model(), removed, ids[:, 55:]),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_both_stores_agree_bit_for_bit_in_every_dtype(architecture: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model(architecture)).to(dtype)
    ids, mask = left_padded([70, 41])
    caches = [cache_class(model, codebook_for(architecture), WINDOW) for cache_class in CACHES.values()]
    for start, stop in ((0, 60), (60, 61), (61, 70)):
        a, b = (padded_forward(model, cache, ids[:, :stop], mask[:, :stop], start)[1] for cache in caches)
        assert torch.equal(a, b)
        assert a.isfinite().all()


@both_caches
def test_copies_of_a_prefix_go_their_own_ways(store: str) -> None:
    ids = random_ids(1, 90)
    prefix = make_cache(store)
    forward(tiny_model(), prefix, ids[:, :60])
    branches = [copy.deepcopy(prefix) for _ in range(2)]
    for branch, tail in zip(branches, (ids[:, 60:], ids[:, 60:].flip(1)), strict=True):
        whole = make_cache(store)
        forward(tiny_model(), whole, ids[:, :60])
        expected = forward(tiny_model(), whole, tail)
        torch.testing.assert_close(forward(tiny_model(), branch, tail), expected, rtol=0, atol=1e-12)
    assert prefix.get_seq_length() == 60
