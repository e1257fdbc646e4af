import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from million_cli.errors import UserError
from million_cli.files import read_safetensors
from million_cli.pq import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.rotation import random_hadamard
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint

L, HKV, D = 3, 2, 8
FINGERPRINT = ModelFingerprint("llama", 4, (0, 1, 3), HKV, D, "abc")
META = CodebookMeta(
    fingerprint=FINGERPRINT,
    calibration="some text",
    calibration_sha256="0" * 64,
    tokens=100,
    samples=50,
    seed=7,
    trainer="torch",
    seeding="kmeans++",
    iterations=25,
    key_rotation="hadamard",
    value_rotation="none",
    key_error=[[0.1, 0.2]] * L,
    value_error=[[0.3, 0.4]] * L,
    versions={"torch": "2.13.0"},
)


def quantizer(scope, M, nbits, rotation=None):
    spec = CodeSpec(D, M, nbits)
    shape = {"merged": (1, 1), "layer": (L, 1), "head": (L, HKV)}[scope]
    return ProductQuantizer(spec, scope, torch.randn(*shape, M, spec.C, spec.dsub), rotation)


@pytest.fixture
def codebook():
    torch.manual_seed(0)
    rotation = torch.stack([random_hadamard(D, layer).float()[None] for layer in range(L)])
    return Codebook(quantizer("head", 4, 3, rotation), quantizer("layer", 2, 9), META)


def test_a_saved_codebook_comes_back_whole(codebook, tmp_path):
    path = tmp_path / "codebook.safetensors"
    codebook.save(path)
    loaded = Codebook.load(path)
    assert loaded.meta == codebook.meta
    assert loaded.spec == codebook.spec
    assert loaded.num_layers == L
    for ours, theirs in ((codebook.keys, loaded.keys), (codebook.values, loaded.values)):
        assert ours.scope == theirs.scope
        assert torch.equal(ours.centroids, theirs.centroids)
        assert (ours.rotation is None) == (theirs.rotation is None)
    assert torch.equal(codebook.keys.rotation, loaded.keys.rotation)


@pytest.mark.parametrize("scope", SCOPES)
def test_layer_picks_the_tables_of_a_layer(scope):
    side = quantizer(scope, 4, 3, random_hadamard(D, 0).float()[None, None])
    for i in range(L):
        layer = side.layer(i)
        assert torch.equal(layer.centroids, side.centroids[0 if scope == "merged" else i])
        assert layer.centroids.shape[0] == (HKV if scope == "head" else 1)
        assert torch.equal(layer.rotation, side.rotation[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_size_is_that_of_the_tensors_in_use(codebook, dtype):
    held = 0
    for side in (codebook.keys, codebook.values):
        for i in range(L):
            layer = side.layer(i).to("cpu", dtype)
            assert layer.centroids.dtype == dtype
            held += layer.centroids.nbytes + (0 if layer.rotation is None else layer.rotation.nbytes)
    assert codebook.size_bytes(dtype) == held


def test_a_rotation_stays_orthogonal_when_centroids_become_half(codebook):
    rotation = codebook.keys.layer(0).to(dtype=torch.float16).rotation
    assert rotation.dtype == torch.float32


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
        (edit_card(lambda c: c.update(version=99)), "format version 99; accepted is 1"),
        (edit_card(lambda c: c["meta"].pop("tokens")), "damaged card"),
        (edit_card(lambda c: c["meta"]["fingerprint"].update(layers=3)), "damaged card"),
        (edit_card(lambda c: c.pop("values")), "damaged card: KeyError: 'values'"),
        (edit_card(lambda c: c["keys"].update(M=3)), "damaged card: UserError: M=3 does not divide"),
        (edit_card(lambda c: c["keys"].update(scope="both")), "keys: scope='both', accepted are merged"),
        (
            edit_card(lambda c: c["keys"].update(nbits=4)),
            r"keys: centroids have shape \[3, 2, 4, 8, 2\], exp",
        ),
        (edit_card(lambda c: c["keys"].update(head_dim=16)), "keys: head_dim=16, but the model has 8"),
        (edit_card(lambda c: c["values"].update(scope="merged")), "values: centroids have shape"),
        (edit_tensors(lambda t: t.pop("values.centroids")), "values: centroids are missing"),
        (
            edit_tensors(lambda t: t["keys.centroids"].view(-1)[5:6].fill_(torch.nan)),
            "keys: centroids are not",
        ),
        (edit_tensors(lambda t: t.update({"keys.rotation": torch.eye(4)})), "keys: rotation has shape"),
        (
            edit_tensors(lambda t: t.update({"keys.rotation": t["keys.rotation"].half()})),
            "keys: rotation are",
        ),
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
