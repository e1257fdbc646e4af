"""Perplexity and KL against their definitions, and one forward pass against decoding token by token."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from million_cli.errors import UserError
from million_cli.hf.models import random_model
from million_cli.pq import decode, encode
from million_cli.tasks import perplexity
from million_cli.tasks.perplexity import (
    Comparison,
    Config,
    context_lengths,
    cut_windows,
    find_head,
    measure,
    read_states,
)
from million_cli.text import Text

SMALL = {"context": 96, "max_tokens": 96 * 5, "batch": 2}


def test_the_dense_cache_agrees_with_itself_exactly(tiny, text):
    found = measure(tiny.model, tiny.tokenizer, tiny.caches("dense"), text, Config(**SMALL), 0).metrics
    assert found["kl_e3"] == 0
    assert found["top1_agreement"] == 1
    assert found["nll"] == found["nll_dense"]
    assert found["perplexity_change_percent"] == 0
    assert found["tokens"] == 5 * 95
    assert found["context"] == 96
    assert found["bits_nominal"] == 64  # a float64 model


def test_dense_perplexity_is_the_model_loss_without_a_cache(tiny, text):
    config = Config(**SMALL)
    found = measure(tiny.model, tiny.tokenizer, tiny.caches(), text, config, 0).metrics
    ids = cut_windows(tiny.tokenizer(text.content).input_ids[:480], 96, text.source)
    with torch.no_grad():
        logits = tiny.model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert found["nll_dense"] == pytest.approx(loss, rel=1e-9)
    assert found["perplexity_dense"] == pytest.approx(math.exp(loss), rel=1e-9)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_one_forward_pass_equals_decoding_token_by_token(tiny, text, kind):
    results = {}
    for mode in ("parallel", "step"):
        config = Config(**SMALL, mode=mode)
        results[mode] = measure(tiny.model, tiny.tokenizer, tiny.caches(kind), text, config, 0).metrics
    assert results["parallel"]["kl_e3"] > 0.01  # codes were seen
    assert results["parallel"].keys() == results["step"].keys()
    for name, value in results["parallel"].items():
        expected = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-7)
        assert results["step"][name] == expected, name


def test_contiguous_and_paged_measure_the_same(tiny, text):
    contiguous, paged = (
        measure(tiny.model, tiny.tokenizer, tiny.caches(kind), text, Config(**SMALL), 0).metrics
        for kind in ("contiguous", "paged")
    )
    for name in ("nll", "kl_e3", "top1_agreement", "code_bytes", "window_bytes", "codebook_bytes"):
        assert contiguous[name] == paged[name], name
    assert contiguous["block_table_bytes"] == 0 < paged["block_table_bytes"]


def test_distorting_everything_costs_more_than_keeping_a_window(tiny, text):
    found = {
        mode: measure(tiny.model, tiny.tokenizer, tiny.caches(), text, Config(**SMALL, mode=mode), 0).metrics
        for mode in ("parallel", "distort")
    }
    assert found["distort"]["kl_e3"] > found["parallel"]["kl_e3"]
    assert found["distort"]["bits_nominal"] == found["parallel"]["bits_nominal"] == 2.0
    assert "cache_bytes" not in found["distort"]


def test_the_distorting_cache_holds_what_the_codec_makes_of_keys_and_values(tiny):
    ids = torch.arange(40)[None]
    dense, distorted = tiny.caches("dense")("exact"), tiny.caches()("distort")
    with torch.no_grad():
        for cache in (dense, distorted):
            tiny.model(input_ids=ids, past_key_values=cache)
    # Only the first layer reads the same input in both.
    for side, quantizer in (("keys", tiny.codebook.keys), ("values", tiny.codebook.values)):
        exact, pq = getattr(dense.layers[0], side), quantizer.layer(0)
        assert torch.equal(getattr(distorted.layers[0], side), decode(encode(exact, pq), pq, exact.dtype))


def test_the_sums_are_the_definitions_whatever_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dense, cached = (torch.randn(3, 7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(11, (3, 7), generator=generator)
    p, q = dense.softmax(-1), cached.softmax(-1)
    window_kl = (p * (p / q).log()).sum(-1).mean(-1)
    for elements in (1, 30, 1 << 20):
        monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", elements)
        comparison = Comparison()
        comparison.add(dense[:2], cached[:2], targets[:2])
        comparison.add(dense[2:], cached[2:], targets[2:])
        found = comparison.metrics()
        assert found["kl_e3"] == pytest.approx(1e3 * window_kl.mean().item(), rel=1e-12)
        assert found["kl_se_e3"] == pytest.approx(1e3 * window_kl.std().item() / math.sqrt(3), rel=1e-12)
        nll = -q.gather(-1, targets[..., None]).log().mean().item()
        assert found["nll"] == pytest.approx(nll, rel=1e-12)
        assert found["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert found["tokens"] == 21


@pytest.mark.parametrize(
    ("buckets", "edges"),
    [
        (1, [(0, 6)]),
        (3, [(0, 2), (3, 5), (6, 6)]),
        (7, [(i, i) for i in range(7)]),
        (50, [(i, i) for i in range(7)]),
    ],
)
def test_buckets_of_positions_hold_the_means_over_their_positions(buckets, edges):
    generator = torch.Generator().manual_seed(0)
    dense, cached = (torch.randn(3, 7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(11, (3, 7), generator=generator)
    comparison = Comparison()
    comparison.add(dense[:1], cached[:1], targets[:1])
    comparison.add(dense[1:], cached[1:], targets[1:])
    p, q = dense.softmax(-1), cached.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    nll, nll_dense = (-x.gather(-1, targets[..., None]).log()[..., 0] for x in (q, p))
    rows = comparison.positions(buckets)
    assert [(row["first"], row["last"]) for row in rows] == edges
    for row in rows:
        part = slice(row["first"], row["last"] + 1)
        assert row["tokens"] == kl[:, part].numel()
        windows = 1e3 * kl[:, part].mean(1)
        assert row["kl_e3"] == pytest.approx(windows.mean().item(), rel=1e-12)
        assert row["kl_se_e3"] == pytest.approx(windows.std().item() / math.sqrt(3), rel=1e-12)
        assert row["perplexity"] == pytest.approx(math.exp(nll[:, part].mean().item()), rel=1e-12)
        assert row["perplexity_dense"] == pytest.approx(math.exp(nll_dense[:, part].mean().item()), rel=1e-12)


def test_what_the_exact_window_covers_loses_nothing_and_the_rest_does(tiny, text):
    config = Config(**SMALL, buckets=6)
    result = measure(tiny.model, tiny.tokenizer, tiny.caches(), text, config, 0)
    rows = result.tables["positions"]
    assert [row["first"] for row in rows] == [0, 16, 32, 48, 64, 80]
    assert sum(row["tokens"] for row in rows) == result.metrics["tokens"]
    assert rows[0]["kl_e3"] == 0  # a window of 16 to 31 exact tokens
    assert all(row["kl_e3"] > 0.01 for row in rows[2:])
    mean = sum(row["kl_e3"] * row["tokens"] for row in rows) / result.metrics["tokens"]
    assert mean == pytest.approx(result.metrics["kl_e3"], rel=1e-9)


def test_the_standard_error_of_one_window_is_unknown():
    comparison = Comparison()
    logits = torch.randn(1, 4, 5)
    comparison.add(logits, logits, torch.zeros(1, 4, dtype=torch.int64))
    assert comparison.metrics()["kl_se_e3"] is None


def test_half_precision_logits_are_compared_in_float32():
    comparison = Comparison()
    logits = torch.randn(1, 50, 200, generator=torch.Generator().manual_seed(0)).half()
    comparison.add(logits, logits + 0.25, torch.zeros(1, 50, dtype=torch.int64))  # a constant changes nothing
    assert abs(comparison.metrics()["kl_e3"]) < 0.02


def test_too_short_a_text_and_too_long_a_window_are_refused(tiny):
    with pytest.raises(UserError, match=r"the text note has 5 tokens; accepted are at least task.context=64"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), Text("short", "note"), Config(context=64), 0)
    with pytest.raises(UserError, match=r"task\.context=257: accepted are 2 to 256"):
        measure(tiny.model, tiny.tokenizer, tiny.caches(), Text("x" * 999, "note"), Config(context=257), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "task.mode=fast"),
        ({"batch": 0}, "task.batch=0"),
        ({"buckets": 0}, "task.buckets=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_lengths_default_to_1k_2k_and_the_models_context_as_far_as_both_allow(tiny):
    def lengths(longest, tokens, **settings):
        model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=longest))
        return context_lengths(model, tokens, Config(**settings))

    assert lengths(8192, 10**6) == [1024, 2048, 8192]
    assert lengths(8192, 5000) == [1024, 2048]
    assert lengths(2048, 10**6) == [1024, 2048]
    assert lengths(1500, 10**6) == [1024, 1500]
    assert lengths(256, 10**6) == [256]
    assert lengths(8192, 10**6, context=512) == [512]
    assert lengths(8192, 10, contexts=[4096, 512, 512]) == [512, 4096]
    with pytest.raises(UserError, match=r"task.contexts=9000: accepted are 2 to 8192"):
        lengths(8192, 10**6, contexts=[512, 9000])


def test_each_length_has_its_columns_and_rows(tiny, text):
    several = measure(tiny.model, tiny.tokenizer, tiny.caches(), text, Config(contexts=[64, 128, 256]), 0)
    for context in (64, 128, 256):
        config = Config(context=context)
        alone = measure(tiny.model, tiny.tokenizer, tiny.caches(), text, config, 0)
        for name in ("kl_e3", "kl_e3_last_quarter", "perplexity", "perplexity_dense", "top1_agreement"):
            assert several.metrics[f"{name}_at_{context}"] == alone.metrics[name], name
        rows = [row for row in several.tables["positions"] if row["context"] == context]
        assert rows == alone.tables["positions"]
    assert several.metrics["context"] == 256
    assert several.metrics["kl_e3"] == several.metrics["kl_e3_at_256"]
    growth = several.metrics["kl_e3_last_quarter"] / several.metrics["kl_e3_first_quarter"]
    assert several.metrics["kl_growth"] == pytest.approx(growth)
    assert "kl_growth_at_64" in several.metrics


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logits_by_chunks_of_states_are_the_models_own(architecture, monkeypatch):
    shape = {**tiny_model(architecture).config.to_dict(), "final_logit_softcapping": 5.0}
    model = random_model(shape, dtype="float64")
    head = find_head(model)
    assert (head is None) == (architecture == "gemma2")  # whose logits are capped
    ids = torch.arange(40)[None] % 61
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", 61 * 7)
    sums = []
    with torch.no_grad():
        for h in (head, None):
            comparison = Comparison()
            states = [read_states(model, ids, DynamicCache(config=model.config), h, n) for n in (None, 3)]
            comparison.add(*states, ids, h)
            sums.append(comparison.metrics())
    assert sums[0]["nll"] == pytest.approx(sums[1]["nll"], rel=1e-12)
    assert sums[0]["top1_agreement"] == sums[1]["top1_agreement"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 64, "contexts": [64]}, "accepted is one of them"),
        ({"contexts": []}, r"task.contexts=\[\]"),
    ],
)
def test_lengths_are_given_once(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)
