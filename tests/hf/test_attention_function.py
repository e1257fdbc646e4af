"""The registered attention function: dense caches work, unsupported features are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, WINDOW, codebook_for, forward, new_model, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from million_cli.errors import UserError
from million_cli.hf.attention import pq_attention_forward
from million_cli.hf.cache import DynamicPQCache
from million_cli.hf.switch import ATTENTION_NAME, use_pq_attention
from million_cli.spec import ModelFingerprint, WindowSpec


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache], ids=["dynamic", "static"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_caches_work_as_before(architecture: str, make_cache: Any) -> None:
    model = tiny_model(architecture)
    ids, results = random_ids(2, 60), []
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    for implementation, cache_class in ((ATTENTION_NAME, make_cache), ("plain_float64", DynamicCache)):
        model.set_attn_implementation(implementation)
        for padding in (None, mask):
            options = {"max_cache_len": 64} if cache_class is StaticCache else {}
            cache = cache_class(config=model.config, **options)
            seen = [forward(model, cache, ids[:, :50], None if padding is None else padding[:, :50])]
            seen += [
                forward(model, cache, ids[:, t : t + 1], None if padding is None else padding[:, : t + 1])
                for t in range(50, 60)
            ]
            results.append(torch.cat(seen, dim=1)[:, 13:])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_text_within_the_window_is_exact(architecture: str) -> None:
    model, ids = tiny_model(architecture), random_ids(2, WINDOW.residual - 1)
    cache = DynamicPQCache(model, codebook_for(architecture), WINDOW)
    parts = [forward(model, cache, part) for part in ids.split([10, 1, 20], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), forward(model, None, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("use", [
    lambda handle: handle.shape,
    lambda handle: handle.transpose(1, 2),
    lambda handle: torch.chunk(handle, 2, dim=1),
    lambda handle: torch.zeros(3, 4) @ handle,
    lambda handle: handle * 2,
    lambda handle: handle[:, :1],
    lambda handle: list(handle),
    lambda handle: torch.nn.functional.scaled_dot_product_attention(torch.zeros(1, 1, 1, 8), handle, handle),
])  # fmt: skip
def test_any_use_of_a_handle_as_a_tensor_ends_in_one_line(use: Any) -> None:
    cache = DynamicPQCache(tiny_model(), codebook_for(), WINDOW)
    K = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    handle, _ = cache.update(K, K, 0)
    with pytest.raises(UserError, match="attention cannot read a PQ cache") as error:
        use(handle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"learned_temperature": 2.0}, "learned_temperature"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "cu_seq_lens_q"),
        ({"sliding_window": 39}, "40 tokens: this model attends to the latest 39"),
        ({"dropout": 0.1}, "attention_dropout=0.1"),
        ({"is_causal": False}, "causal attention only"),
    ],
)
def test_features_without_a_form_over_codes_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    cache = DynamicPQCache(model, codebook_for(), WINDOW)
    K = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    handle, _ = cache.update(K, K, 0)
    query = torch.randn(1, 4, 40, 16, dtype=torch.float64)
    with pytest.raises(UserError, match=message):
        pq_attention_forward(model.model.layers[0].self_attn, query, handle, handle, None, **options)


def test_attention_weights_are_refused_through_the_model() -> None:
    model = tiny_model()
    cache = DynamicPQCache(model, codebook_for(), WINDOW)
    with pytest.raises((UserError, ValueError), match="output_attentions"), torch.no_grad():
        model(random_ids(1, 40), past_key_values=cache, output_attentions=True)


def test_handle_is_inert() -> None:
    cache = DynamicPQCache(tiny_model(), codebook_for(), WINDOW)
    K = torch.zeros(1, 2, 3, 16, dtype=torch.float64)
    key, value = cache.update(K, K, 0)
    assert key.to("cpu") is key
    assert key is value
    assert not hasattr(key, "__len__")
    with pytest.raises(UserError, match=r"`\.transpose`"):
        key.transpose(1, 2)


def test_codebook_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="model_type: 'llama' != 'qwen3'"):
        DynamicPQCache(tiny_model("qwen3"), codebook_for("llama"))
    with pytest.raises(UserError, match="weights"):
        DynamicPQCache(tiny_model("llama", seed=3), codebook_for("llama"))
    all_full = tiny_model("gemma2").config.__class__(
        **{**tiny_model("gemma2").config.to_dict(), "layer_types": ["full_attention"] * 2}
    )
    with pytest.raises(UserError, match=r"layers: \(1,\) != \(0, 1\)"):
        DynamicPQCache(all_full, codebook_for("gemma2"))


def test_codebook_by_path(tmp_path: Any) -> None:
    codebook_for().save(tmp_path / "codebook.safetensors")
    cache = DynamicPQCache(tiny_model(), tmp_path / "codebook.safetensors", WINDOW)
    assert all(map(torch.equal, cache.codebook.keys.centroids, codebook_for().keys.centroids))
    with pytest.raises(UserError, match="no such file"):
        DynamicPQCache(tiny_model(), tmp_path / "missing.safetensors")


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="prefill='lossy'"):
        DynamicPQCache(tiny_model(), codebook_for(), prefill="lossy")
    with pytest.raises(UserError, match="page_size=0"):
        DynamicPQCache(tiny_model(), codebook_for(), WindowSpec(page_size=0))
    cache = DynamicPQCache(tiny_model(), codebook_for(), WINDOW)
    forward(tiny_model(), cache, random_ids(2, 5))
    with pytest.raises(UserError, match="batch=3"):
        forward(tiny_model(), cache, random_ids(3, 5))
    with pytest.raises(UserError, match=r"\(KV heads, head_dim\)=\(4, 16\): the codebook is for \(2, 16\)"):
        DynamicPQCache(tiny_model().config, codebook_for()).update(
            torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16), 0
        )


def test_model_outside_the_attention_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("phi3")
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(UserError, match="model_type=phi3: its attention cannot be replaced"):
        use_pq_attention(model)


def test_fingerprint_is_what_the_codebook_carries() -> None:
    assert isinstance(codebook_for().meta.fingerprint, ModelFingerprint)
    assert codebook_for("gemma2").meta.fingerprint.layers == (1,)
