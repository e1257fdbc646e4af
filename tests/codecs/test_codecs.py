"""The alternatives: each against its definition, and the simulated cache against decoding token by token."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_models import WINDOW, codebook_for, forward, random_ids, tiny_model

from million_cli.codecs import Shape, SimulatedCache
from million_cli.codecs.uniform import uniform
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache
from million_cli.pq import LayerPQ, decode, encode
from million_cli.registry import CODECS

P, D = 64, 32
INSTALLED = ("fp8", "kivi", "per-token")


def make_codec(kind: str, head_dim: int = D, page_size: int = P, **settings: Any) -> Any:
    codec_class = CODECS.load(kind)
    return codec_class(codec_class.Config(**settings), Shape(head_dim, page_size), 0)


def pages(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, Hkv, n, P, D], channels of very different scale and offset, as keys have them."""
    torch.manual_seed(0)
    return (torch.randn(2, 3, 2, P, D) * torch.logspace(0, 2, D) + torch.linspace(-50, 50, D)).to(dtype)


class PQCodec:
    """Product codes as a codec, which makes a simulated cache comparable with the real one."""

    bits = 4.0

    def __init__(self, keys: LayerPQ, values: LayerPQ) -> None:
        self._keys, self._values = keys, values

    def _through(self, x: torch.Tensor, pq: LayerPQ) -> torch.Tensor:
        return decode(encode(x.flatten(2, 3), pq), pq, x.dtype).view_as(x)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._through(x, self._keys)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return self._through(x, self._values)


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_uniform_hits_the_ends_and_errs_by_half_a_step_at_most(nbits: int) -> None:
    x = torch.randn(100, 32, dtype=torch.float64)
    y = uniform(x, nbits)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**nbits - 1)
    rounding = 2e-3 * (high - low) + 1e-3 * low.abs()  # minimum and step are stored in float16
    assert ((y - x).abs() <= step / 2 + rounding).all()
    assert ((y.amin(-1, keepdim=True) - low).abs() <= rounding).all()
    assert max(len(row.unique()) for row in y) <= 2**nbits
    assert torch.equal(uniform(torch.full((3, 8), 2.5), nbits), torch.full((3, 8), 2.5))


def test_kivi_groups_keys_along_tokens_and_values_along_channels() -> None:
    x = pages()
    codec = make_codec("kivi", nbits=2, group=32)
    keys, values = codec.keys(x), codec.values(x)
    for page in (0, 1):
        group = x[1, 2, page, 32:64, 5]
        torch.testing.assert_close(keys[1, 2, page, 32:64, 5], uniform(group, 2), rtol=0, atol=0)
    torch.testing.assert_close(values[0, 1, 1, 7], uniform(x[0, 1, 1, 7], 2), rtol=0, atol=0)
    # Keys a channel are the point of KIVI: along tokens their scales are equal.
    assert (keys - x).square().mean() < 0.5 * (codec.values(x) - x).square().mean()


def test_hadamard_is_undone_and_spreads_outliers() -> None:
    x = pages().sub(pages().mean(3, keepdim=True))
    plain, rotated = (make_codec("per-token", hadamard=h) for h in (False, True))
    assert (rotated.keys(x) - x).square().mean() < (plain.keys(x) - x).square().mean()
    fine = make_codec("per-token", nbits=8, hadamard=True).values(x)
    assert (fine - x).square().mean() < 1e-4 * x.square().mean()


def test_fp8_is_the_nearest_of_its_numbers_and_saturates() -> None:
    codec = make_codec("fp8")
    x = torch.tensor([0.0, 1.0, 1.06, -3.3, 447.0, 1e6, -1e6])
    assert codec.keys(x).tolist() == [0.0, 1.0, 1.0, -3.25, 448.0, 448.0, -448.0]
    error = (codec.values(pages()) - pages()).abs()
    assert (error <= pages().abs() / 16 + 2**-10).all()


@pytest.mark.parametrize(
    ("kind", "head_dim", "settings", "bits"),
    [
        ("fp8", 128, {}, 8.0),
        ("kivi", 128, {"nbits": 4, "group": 64}, 4.5),
        ("kivi", 128, {"nbits": 4, "group": 32}, 5.0),
        ("kivi", 128, {"nbits": 2, "group": 32}, 3.0),
        ("kivi", 32, {"nbits": 4, "group": 64}, 4.75),  # a head of 32 is a group of 32
        ("per-token", 128, {"nbits": 4, "group": 128}, 4.25),
        ("per-token", 64, {"nbits": 4, "group": 128}, 4.5),
    ],
)
def test_scales_and_zero_points_are_counted(
    kind: str, head_dim: int, settings: dict[str, int], bits: float
) -> None:
    assert make_codec(kind, head_dim, **settings).bits == bits


@pytest.mark.parametrize("kind", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pages_are_independent_and_keep_their_dtype(kind: str, dtype: torch.dtype) -> None:
    x, codec = pages(dtype), make_codec(kind, **({} if kind == "fp8" else {"group": 32}))
    for through in (codec.keys, codec.values):
        whole = through(x)
        assert (whole.dtype, whole.shape) == (dtype, x.shape)
        assert torch.equal(whole[:, :, 1:], through(x[:, :, 1:]))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_the_window_is_that_of_the_real_cache(architecture: str, prefill: str) -> None:
    """With product codes as its codec the simulated cache is the real one: at once, in chunks, by tokens."""
    model, codebook, ids = tiny_model(architecture), codebook_for(architecture), random_ids(2, 200)
    codecs = [PQCodec(codebook.keys.layer(i), codebook.values.layer(i)) for i in range(codebook.num_layers)]
    for sizes in ([200], [70, 1, 1, 57, 63, 8], [150, *[1] * 50]):
        real = DynamicPQCache(model, codebook, WINDOW, prefill=prefill)  # type: ignore[arg-type]
        simulated = SimulatedCache(model, codecs, WINDOW, prefill=prefill)  # type: ignore[arg-type]
        for part in ids.split(sizes, dim=1):
            expected, found = forward(model, real, part), forward(model, simulated, part)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert simulated.get_seq_length() == real.get_seq_length() == 200


@pytest.mark.parametrize("kind", INSTALLED)
def test_one_pass_equals_token_by_token(kind: str) -> None:
    model, ids = tiny_model("llama"), random_ids(2, 150)
    head_dim = codebook_for("llama").specs[0].keys.head_dim
    codec = make_codec(kind, head_dim, WINDOW.page_size, **({} if kind == "fp8" else {"group": 16}))
    once = SimulatedCache(model, codec, WINDOW, prefill="quantized")
    stepwise = SimulatedCache(model, codec, WINDOW)
    expected = torch.cat([forward(model, stepwise, token) for token in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(forward(model, once, ids), expected, rtol=0, atol=1e-9)
    once.reset()
    torch.testing.assert_close(forward(model, once, ids), expected, rtol=0, atol=1e-9)


def test_padding_beams_and_batches() -> None:
    model, ids = tiny_model("llama"), random_ids(2, 150)
    codec = make_codec("fp8", 16, WINDOW.page_size)
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[0, :70] = 0
    cache = SimulatedCache(model, codec, WINDOW)
    forward(model, cache, ids[:, :149], mask[:, :149])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    swapped, mask = ids[[1, 1, 0, 0]], mask[[1, 1, 0, 0]]
    found = forward(model, cache, swapped[:, 149:], mask)
    again = SimulatedCache(model, codec, WINDOW)
    forward(model, again, swapped[:, :149], mask[:, :149])
    torch.testing.assert_close(found, forward(model, again, swapped[:, 149:], mask), rtol=0, atol=1e-9)
    output = model.generate(ids, past_key_values=SimulatedCache(model, codec, WINDOW), max_new_tokens=3)
    assert output.shape == (2, 153)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("kivi", {"group": 48}, "group=48: accepted are divisors of cache.page_size=64"),
        ("per-token", {"group": 24}, "group=24: accepted are divisors of head_dim=32"),
        ("kivi", {"nbits": 9}, "nbits=9: accepted are 1 to 8"),
        ("kivi", {"group": 1}, "group=1: accepted are integers from 2"),
        ("int3", {}, "kind=int3: accepted are fp8, kivi"),
    ],
)
def test_impossible_settings_are_refused(kind: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_codec(kind, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "package"), [("quanto", "optimum-quanto"), ("hqq", "hqq")])
def test_a_missing_package_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_optimum_quanto_available", "is_hqq_available"):
        monkeypatch.setattr(sys.modules["transformers.cache_utils"], name, lambda: False)
    with pytest.raises(UserError, match=f"missing: pip install {package}") as caught:
        make_codec(kind)
    assert "\n" not in str(caught.value)
