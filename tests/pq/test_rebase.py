"""Keys relative to the origin of their block: scores, inverses, files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from million_cli.errors import UserError
from million_cli.files import read_safetensors
from million_cli.pq import Codebook, CodebookMeta, ProductQuantizer, decode, encode
from million_cli.pq.codebook import content_hash
from million_cli.pq.rebase import LAYOUTS, Rebase, turn
from million_cli.pq.transform import Transform
from million_cli.recipe import Recipe
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint

B, HKV, D, L = 2, 2, 8, 3
META = CodebookMeta(
    fingerprint=ModelFingerprint("llama", L, tuple(range(L)), HKV, D, "abc"),
    calibration="some text",
    calibration_sha256="0" * 64,
    tokens=100,
    samples=50,
    held_out=0,
    seed=7,
    recipe=Recipe(),
    key_error=[[0.1, 0.2]] * L,
    value_error=[[0.3, 0.4]] * L,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def rebases(draw: st.DrawFn) -> Rebase:
    n = draw(st.integers(1, D // 2))  # below D / 2 only some dimensions are rotated
    frequencies = torch.tensor(draw(st.lists(st.floats(1e-5, 1.0), min_size=n, max_size=n))).double()
    gain = draw(st.sampled_from([1.0, 1.37]))
    return Rebase(draw(st.sampled_from([16, 48, 64])), frequencies, draw(st.sampled_from(LAYOUTS)), 1.0, gain)


def rotated(x: torch.Tensor, rebase: Rebase, positions: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., T, D]` as a model with the rebase's frequencies and gain turns them."""
    angles = positions.double()[:, None] * rebase.frequencies
    return turn(x, rebase.gain * angles.cos(), rebase.gain * angles.sin(), rebase.layout)


@examples(80)
@given(rebases(), st.integers(0, 200), st.integers(1, 150))
def test_absolute_undoes_relative(rebase: Rebase, start: int, T: int) -> None:
    keys = normal(B, HKV, T, D)
    relative = rebase.relative(keys, start)
    torch.testing.assert_close(rebase.absolute(relative, start), keys, rtol=0, atol=1e-13)
    part = T // 3
    pieces = [rebase.relative(keys[:, :, :part], start), rebase.relative(keys[:, :, part:], start + part)]
    torch.testing.assert_close(torch.cat(pieces, 2), relative, rtol=0, atol=1e-13)


@examples(80)
@given(rebases(), st.integers(0, 10**6))
def test_coded_keys_are_those_of_the_first_block_and_scores_stay(rebase: Rebase, start: int) -> None:
    """q . k, for keys of any block: by the query's form for it, the one map of a kernel, and both forms."""
    plain, T = normal(HKV, 100, D), 100
    keys = rotated(plain, rebase, torch.arange(start, start + T))
    relative = rebase.relative(keys, start)
    at = torch.arange(start, start + T)
    as_first_block = rotated(plain, replace(rebase, gain=1.0), at % rebase.every)
    as_first_block[..., 2 * len(rebase.frequencies) :] = keys[..., 2 * len(rebase.frequencies) :]
    torch.testing.assert_close(relative, as_first_block, rtol=0, atol=1e-8)  # angles of 10^6 radians
    q = normal(HKV, 5, D, seed=1)
    for block in range(start // rebase.every, (start + T - 1) // rebase.every + 1):
        inside = at // rebase.every == block
        expected = q @ keys[:, inside].mT
        torch.testing.assert_close(rebase.query(q, block) @ relative[:, inside].mT, expected)
        mapped = keys[:, inside] @ rebase.matrix(block, D).double()
        torch.testing.assert_close(mapped, relative[:, inside], rtol=0, atol=1e-5)  # float32
        cos, sin = rebase.forms(torch.tensor([0, block]))
        formed = turn(q, cos[1:], -sin[1:], rebase.layout)
        torch.testing.assert_close(formed, rebase.query(q, block), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pairs_of_a_layout(layout: str) -> None:
    """A quarter turn sends each pair (x, y) to (-y, x); the rest of the dimensions stays."""
    x = torch.arange(1.0, 7.0)[None]
    turned = turn(x, torch.zeros(1, 2), torch.ones(1, 2), layout)  # type: ignore[arg-type]
    expected = [-3.0, -4, 1, 2, 5, 6] if layout == "halves" else [-2.0, 1, -4, 3, 5, 6]
    assert turned.tolist() == [expected]


def test_the_first_block_is_coded_as_it_lies() -> None:
    rebase = Rebase(64, torch.tensor([1.0, 0.1]).double(), "halves")
    keys = normal(1, 1, 64, D).half()
    assert rebase.relative(keys, 0) is keys
    assert rebase.relative(keys, 1).dtype == torch.float16


def test_served_takes_the_new_angles_and_the_ratio_of_scales() -> None:
    calibrated = Rebase(64, torch.tensor([0.5]).double(), "halves", scale=1.2)
    served = calibrated.served(torch.tensor([0.25]).double(), 1.5)
    assert served.gain == pytest.approx(1.5 / 1.2)
    key = torch.tensor([[1.0, 0.0]]).double()  # scale included
    relative = served.relative(1.5 * turn(key, *trig(0.25 * 70), "halves"), 70)
    torch.testing.assert_close(relative, 1.2 * turn(key, *trig(0.25 * 6), "halves"))


def trig(angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.tensor([[angle]]).double()
    return angles.cos(), angles.sin()


# -- codes ---------------------------------------------------------------------------------------------------


def keys_side(scope: str, layers: tuple[Rebase | None, ...], mapped: bool = True) -> ProductQuantizer:
    generator = torch.Generator().manual_seed(3)
    spec = CodeSpec(D, 4, 5)
    heads = HKV if scope == "head" else 1
    tables = [torch.randn(heads, 4, 32, 2, generator=generator) for _ in range(1 if scope == "merged" else L)]
    maps = torch.eye(D) + 0.1 * torch.rand(L, 1, D, D, generator=generator)
    transform = Transform.invertible(maps) if mapped else None
    return ProductQuantizer((spec,) * L, scope, tuple(tables), transform, layers)  # type: ignore[arg-type]


LAYERS = (
    Rebase(32, torch.tensor([1.0, 0.3, 0.09]).double(), "halves", 1.1),
    None,
    Rebase(32, torch.tensor([1.0, 0.3, 0.09]).double(), "neighbours"),
)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("layer", range(L))
def test_codes_are_those_of_the_relative_keys(scope: str, mapped: bool, layer: int) -> None:
    pq = keys_side(scope, LAYERS, mapped).layer(layer)
    assert pq.rebase is LAYERS[layer]
    keys = normal(B, HKV, 90, D)
    relative = keys if pq.rebase is None else pq.rebase.relative(keys, 50)
    codes = encode(keys, pq, start=50)
    assert torch.equal(codes, encode(relative, replace(pq, rebase=None)))
    decoded = decode(codes, pq, torch.float64, start=50)
    vectors = decode(codes, replace(pq, rebase=None), torch.float64)
    expected = vectors if pq.rebase is None else pq.rebase.absolute(vectors, 50)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-13)
    assert torch.equal(encode(decoded, pq, start=50), codes)  # a decoded key has its own code again
    if pq.rebase is not None:
        assert not torch.equal(encode(keys, pq, start=0), codes)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_a_saved_codebook_knows_its_blocks(scope: str, tmp_path) -> None:
    saved = Codebook(keys_side(scope, LAYERS), keys_side(scope, ()), META)
    saved.save(tmp_path / "codebook")
    loaded = Codebook.load(tmp_path / "codebook")
    assert loaded.values.rebases == ()
    for ours, theirs in zip(saved.keys.rebases, loaded.keys.rebases, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert torch.equal(ours.frequencies, theirs.frequencies)
        assert (ours.every, ours.layout, ours.scale, theirs.gain) == (
            theirs.every,
            theirs.layout,
            theirs.scale,
            1,
        )
    assert load_file(tmp_path / "codebook")["keys.frequencies"].shape == (1, 3)  # equal rows once


def test_layers_that_stand_still_need_no_blocks(tmp_path) -> None:
    Codebook(keys_side("head", (None,) * L), keys_side("head", ()), META).save(tmp_path / "codebook")
    assert Codebook.load(tmp_path / "codebook").keys.rebases == ()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ([0, 0], 0, "rebases: ValueError"),
        ([0, 1], "thirds", "rebases: ValueError"),
        ([0, 2], -1.0, "rebases: ValueError"),
        ([0, 3], 7, "rebases: IndexError"),
        ([0, 3], -1, "rebases: ValueError"),
        ([0], [32, "halves"], "rebases: ValueError"),
        ([0], 5, "rebases: TypeError"),
        ([], [None], "rebases of 1 layers, but the model has 3"),
    ],
)
def test_damaged_blocks_are_refused(place, value, message, tmp_path) -> None:
    def damage(card):
        if not place:
            card["keys"]["rebases"] = value
            return
        item = card["keys"]["rebases"]
        for step in place[:-1]:
            item = item[step]
        item[place[-1]] = value

    assert message in refusal(tmp_path, damage)


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        (None, "KeyError: 'keys.frequencies'"),
        (torch.ones(1, 3), "not finite float64"),
        (torch.full((1, 3), torch.nan).double(), "not finite float64"),
        (torch.ones(1, 5).double(), "5 frequencies for head_dim=8"),
        (torch.ones(1, 0).double(), "0 frequencies for head_dim=8"),
        (torch.ones(3).double(), "IndexError"),
    ],
)
def test_damaged_frequencies_are_refused(frequencies, message, tmp_path) -> None:
    assert message in refusal(tmp_path, lambda card: None, frequencies)


def refusal(folder, damage, frequencies: torch.Tensor | str | None = "whole") -> str:
    """The line that refuses a saved codebook whose card and frequencies were changed, hash and all."""
    path = folder / "codebook"
    Codebook(keys_side("head", LAYERS), keys_side("head", ()), META).save(path)
    tensors, metadata = load_file(path), read_safetensors(path)[1]
    card = json.loads(metadata["card"])
    damage(card)
    if frequencies is None:
        del tensors["keys.frequencies"]
    elif isinstance(frequencies, torch.Tensor):
        tensors["keys.frequencies"] = frequencies
    text = json.dumps(card, sort_keys=True)
    save_file(tensors, path, {**metadata, "card": text, "sha256": content_hash(text, tensors)})
    with pytest.raises(UserError) as caught:
        Codebook.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
