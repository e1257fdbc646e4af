import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from million_cli.errors import UserError
from million_cli.files import read_safetensors
from million_cli.pq import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.rotation import random_hadamard
from million_cli.pq.transform import Transform
from million_cli.recipe import Recipe
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint

L, HKV, D = 3, 2, 8
FINGERPRINT = ModelFingerprint("llama", 4, (0, 1, 3), HKV, D, "abc")
META = CodebookMeta(
    fingerprint=FINGERPRINT,
    calibration="some text",
    calibration_sha256="0" * 64,
    tokens=100,
    samples=50,
    held_out=3,
    seed=7,
    recipe=Recipe().override("quantizer.keys.metric=fisher", "train.alternations=2"),
    key_error=[[0.1, 0.2]] * L,
    value_error=[[0.3, 0.4]] * L,
    versions={"torch": "2.13.0"},
)


def quantizer(scope, M, nbits, transform=None):
    """M: of all layers, or of each."""
    specs = tuple(CodeSpec(D, m, nbits) for m in (M if isinstance(M, tuple) else (M,) * L))
    Hc = HKV if scope == "head" else 1
    tables = tuple(torch.randn(Hc, spec.M, spec.C, spec.dsub) for spec in specs)
    return ProductQuantizer(specs, scope, tables[:1] if scope == "merged" else tables, transform)


@pytest.fixture
def codebook():
    torch.manual_seed(0)
    transform = Transform.invertible(torch.eye(D) + torch.rand(L, 1, D, D) / D)
    return Codebook(quantizer("head", (4, 8, 2), 3, transform), quantizer("layer", 2, 9), META)


def test_a_saved_codebook_comes_back_whole(codebook, tmp_path):
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    loaded = Codebook.load(path)
    assert loaded.meta == codebook.meta
    assert loaded.specs == codebook.specs
    assert loaded.num_layers == L
    for ours, theirs in ((codebook.keys, loaded.keys), (codebook.values, loaded.values)):
        assert ours.scope == theirs.scope
        assert all(map(torch.equal, ours.centroids, theirs.centroids))
    assert loaded.values.transform is None
    assert torch.equal(codebook.keys.transform.encode, loaded.keys.transform.encode)
    assert torch.equal(codebook.keys.transform.decode, loaded.keys.transform.decode)


def test_bits_are_the_mean_over_layers_and_sides(codebook):
    keys = (4 + 8 + 2) * 3 / (3 * D)
    assert codebook.bits_per_element == pytest.approx((keys + 2 * 9 / D) / 2)


@pytest.mark.parametrize("scope", SCOPES)
def test_layer_picks_the_tables_of_a_layer(scope):
    side = quantizer(scope, 4, 3, Transform.rotation(random_hadamard(D, 0).float()[None, None]))
    for i in range(L):
        layer = side.layer(i)
        assert torch.equal(layer.centroids, side.centroids[0 if scope == "merged" else i])
        assert layer.centroids.shape[0] == (HKV if scope == "head" else 1)
        assert torch.equal(layer.transform.encode, side.transform.encode[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_size_is_that_of_the_tensors_in_use(codebook, dtype):
    held = 0
    for side in (codebook.keys, codebook.values):
        for i in range(L):
            layer = side.layer(i).to("cpu", dtype)
            assert layer.centroids.dtype == dtype
            held += layer.centroids.nbytes
            if layer.transform is not None:
                held += layer.transform.encode.nbytes + layer.transform.decode.nbytes
    assert codebook.size_bytes(dtype) == held


def test_a_transform_stays_invertible_when_centroids_become_half(codebook):
    transform = codebook.keys.layer(0).to(dtype=torch.float16).transform
    assert transform.decode.dtype == torch.float32


def test_check_names_every_field_that_differs(codebook):
    codebook.check(FINGERPRINT)
    other = replace(FINGERPRINT, num_kv_heads=4, head_dim=16, weights="abd")
    with pytest.raises(UserError) as caught:
        codebook.check(other)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("num_kv_heads: 2 != 4", "head_dim: 8 != 16", "weights: 'abc' != 'abd'"):
        assert part in message
    assert "num_layers" not in message


def edit_card(change):
    def edit(tensors, metadata):
        card = json.loads(metadata["card"])
        change(card)
        return tensors, {**metadata, "card": json.dumps(card)}

    return edit


def edit_tensors(change):
    def edit(tensors, metadata):
        change(tensors)
        return tensors, metadata

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: (t, {}), "is not a codebook: format=None"),
        (lambda t, m: (t, {**m, "card": "{"}), "no readable card"),
        (lambda t, m: (t, {"format": m["format"]}), "no readable card"),
        (edit_card(lambda c: c.update(version=99)), "format version 99; accepted is 5: train it again"),
        (edit_card(lambda c: c["meta"].pop("tokens")), "damaged card"),
        (edit_card(lambda c: c["meta"]["fingerprint"].update(layers=3)), "damaged card"),
        (edit_card(lambda c: c["meta"]["recipe"]["train"].update(trainer="x")), "damaged card: .*trainer=x"),
        (edit_card(lambda c: c["meta"].pop("recipe")), "damaged card: KeyError: 'recipe'"),
        (edit_card(lambda c: c.pop("values")), "damaged card: KeyError: 'values'"),
        (
            edit_card(lambda c: c["keys"]["specs"][1].update(M=3)),
            "damaged card: UserError: M=3 does not divide",
        ),
        (edit_card(lambda c: c["keys"].update(scope="both")), "keys: scope='both', accepted are merged"),
        (
            edit_card(lambda c: c["keys"]["specs"][0].update(nbits=4)),
            r"keys: centroids.0 have shape \[2, 4, 8, 2\], expected \[2, 4, 16, 2\]",
        ),
        (
            edit_card(lambda c: c["keys"]["specs"][2].update(head_dim=16)),
            "keys: head_dim=16, but the model has 8",
        ),
        (edit_card(lambda c: c["keys"]["specs"].pop()), "keys: 2 layers, but the model has 3"),
        (
            edit_card(lambda c: c["keys"].update(scope="merged")),
            "keys: layers that share centroids have diff",
        ),
        (edit_card(lambda c: c["values"].update(scope="head")), r"values: centroids.0 have shape \[1, "),
        (edit_tensors(lambda t: t.pop("values.centroids.1")), "values: centroids.1 are missing"),
        (
            edit_tensors(lambda t: t["keys.centroids.0"].view(-1)[5:6].fill_(torch.nan)),
            "keys: centroids.0 are not",
        ),
        (edit_tensors(lambda t: t.update({"keys.encode": torch.eye(4)})), "keys: encode has shape"),
        (edit_tensors(lambda t: t.pop("keys.decode")), "keys: encode is there without its inverse"),
        (
            edit_tensors(lambda t: t.update({"keys.decode": t["keys.decode"][:1].clone()})),
            "keys: encode and decode differ in shape",
        ),
        (edit_tensors(lambda t: t.update({"keys.encode": t["keys.encode"].half()})), "keys: encode are not"),
    ],
)
def test_a_damaged_codebook_is_refused_in_one_line(codebook, tmp_path, damage, message):
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    tensors, metadata = damage(load_file(path), read_safetensors(path)[1])
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=message) as caught:
        Codebook.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_truncated_codebook_is_refused_in_one_line(codebook, tmp_path):
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is not a readable safetensors file") as caught:
            Codebook.load(path)
        assert "\n" not in str(caught.value)


def test_equal_codebooks_are_equal_bytes(codebook, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        codebook.save(file)
    assert len({file.read_bytes() for file in files}) == 1
    Codebook.load(files[0]).save(files[1])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_any_flipped_bit_is_found(codebook, tmp_path):
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    content = path.read_bytes()
    step = max(1, len(content) // 199)
    for place in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            Codebook.load(path)
        assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_not_saved(codebook, tmp_path):
    centroids = codebook.keys.centroids[0].clone()
    centroids.view(-1)[3] = float("nan")
    keys = replace(codebook.keys, centroids=(centroids, *codebook.keys.centroids[1:]))
    with pytest.raises(UserError, match=r"keys\.centroids\.0 holds NaN or infinity"):
        replace(codebook, keys=keys).save(tmp_path / "codebook.safetensors")
    assert not list(tmp_path.iterdir())
