import sys
from dataclasses import replace

import pytest
import torch

from million_cli.errors import UserError
from million_cli.pq import TrainSpec, decode, encode, train_codebook, train_quantizer
from million_cli.pq import train as module
from million_cli.pq.rotation import random_hadamard, random_orthogonal
from million_cli.pq.transform import Transform
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint, PQSpec

L, HKV, N, D = 2, 3, 400, 8
FINGERPRINT = ModelFingerprint("llama", 4, (1, 3), HKV, D, "abc")
SPEC = PQSpec(CodeSpec(D, 4, 4), CodeSpec(D, 2, 3))
CARD = {"calibration": "noise", "calibration_sha256": "0" * 64, "tokens": 1000}


def samples(seed=0):
    """Every layer and head has its own scales and offsets, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    scale, offset = torch.rand(2, L, HKV, 1, D, generator=generator)
    return torch.randn(L, HKV, N, D, generator=generator) * (scale + 0.1) + 4 * offset


def relative_errors(x, quantizer):
    """[L][Hkv] in float64, one head at a time."""
    errors = []
    for i in range(L):
        pq = quantizer.layer(i)
        decoded = decode(encode(x[i : i + 1], pq), pq, torch.float32)[0].double()
        heads = zip(x[i].double(), decoded, strict=True)
        errors.append([((a - b).square().mean() / (a - a.mean(0)).square().mean()).item() for a, b in heads])
    return errors


@pytest.mark.parametrize("trainer", module.TRAINERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_has_its_shape_and_its_errors_in_the_card(scope, trainer):
    keys, values = samples(0), samples(1).half()
    progress = []
    codebook = train_codebook(
        keys,
        values,
        SPEC,
        FINGERPRINT,
        TrainSpec(scope=scope, trainer=trainer, value_rotation="hadamard", seed=5),
        progress=lambda done, total: progress.append((done, total)),
        **CARD,
    )
    shape = {"merged": (1, 1), "layer": (L, 1), "head": (L, HKV)}[scope]
    assert [tuple(table.shape) for table in codebook.keys.centroids] == [(shape[1], 4, 16, 2)] * shape[0]
    assert [tuple(table.shape) for table in codebook.values.centroids] == [(shape[1], 2, 8, 4)] * shape[0]
    assert codebook.keys.transform is None
    assert torch.equal(codebook.values.transform.encode, random_hadamard(D, 5).float()[None, None])
    meta = codebook.meta
    torch.testing.assert_close(meta.key_error, relative_errors(keys, codebook.keys), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        meta.value_error, relative_errors(values.float(), codebook.values), rtol=1e-4, atol=0
    )
    assert (meta.trainer, meta.tokens, meta.samples, meta.seed) == (trainer, 1000, N, 5)
    assert (meta.key_rotation, meta.value_rotation) == ("none", "hadamard")
    assert set(meta.versions) == {"torch", "million"} | ({"faiss"} if trainer == "faiss" else set())
    total = 6 * shape[0] * shape[1]
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)


def test_finer_scopes_fit_better():
    errors = [
        sum(map(sum, train_quantizer(samples(), SPEC.keys, TrainSpec(scope=scope)).error)) for scope in SCOPES
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_seed_decides_everything():
    train = TrainSpec(scope="layer", key_rotation="hadamard", max_samples_per_centroid=20)
    first, again, other = (
        train_codebook(samples(), samples(1), SPEC, FINGERPRINT, t, **CARD)
        for t in (train, train, replace(train, seed=1))
    )
    for side in ("keys", "values"):
        one, same, another = (getattr(codebook, side).centroids for codebook in (first, again, other))
        assert all(map(torch.equal, one, same))
        assert not any(map(torch.equal, one, another))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(1, 1), (L, 1), (1, HKV), (L, HKV)])
def test_training_sees_each_head_under_its_transform(scope, shape):
    """Training on mapped samples without a transform gives the same centroids."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.stack([random_orthogonal(D, generator) for _ in range(shape[0] * shape[1])])
    rotation = rotation.view(*shape, D, D)
    x = samples().double()
    train = TrainSpec(scope=scope, iterations=2)
    transform = Transform.rotation(rotation.float())
    inside = train_quantizer(x, SPEC.keys, train, transform=transform).quantizer
    outside = train_quantizer(x.float() @ rotation.float(), SPEC.keys, train).quantizer
    torch.testing.assert_close(inside.centroids, outside.centroids, rtol=1e-4, atol=1e-4)
    assert inside.transform is transform


@pytest.mark.parametrize("scope", SCOPES)
def test_a_problem_uses_no_more_samples_than_allowed(scope, monkeypatch):
    seen = []

    def spy(points, C, **options):
        seen.append(points)
        return torch.zeros(points.shape[0], C, points.shape[2])

    monkeypatch.setitem(module._KMEANS, "torch", spy)
    x = samples()
    train_quantizer(x, SPEC.keys, TrainSpec(scope=scope, max_samples_per_centroid=6))
    per_head = {"merged": 16, "layer": 32, "head": 96}[scope]  # 6 * 16 centroids over 6, 3 or 1 heads
    heads = {"merged": L * HKV, "layer": HKV, "head": 1}[scope]
    assert all(points.shape == (seen[0].shape[0], per_head * heads, 2) for points in seen)
    everything = {tuple(row) for row in x[..., :2].reshape(-1, 2).tolist()}
    used = [tuple(row) for row in seen[0][0].tolist()]
    assert len(set(used)) == len(used)
    assert set(used) <= everything


def test_constant_heads_have_no_error_and_no_nan():
    x = samples()
    x[0, 1] = 3.3
    trained = train_quantizer(x, SPEC.keys, TrainSpec())
    assert all(table.isfinite().all() for table in trained.quantizer.centroids)
    assert trained.error[0][1] < 1e-12


def test_one_sample_is_enough():
    x = samples()[:, :, :1]
    pq = train_quantizer(x, SPEC.keys, TrainSpec()).quantizer.layer(1)
    torch.testing.assert_close(decode(encode(x[1:], pq), pq, torch.float32), x[1:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda k, v: (k[:1], v),
            "keys were sampled from 1 layers, 3 heads, head_dim=8; accepted are 2, 3, 8",
        ),
        (lambda k, v: (k, v[..., :4]), "values were sampled from 2 layers, 3 heads, head_dim=4; accepted"),
        (lambda k, v: (k[:, :, :0], v[:, :, :0]), "no samples of keys: the text is too short"),
        (
            lambda k, v: (k, v.index_fill(0, torch.tensor([1]), torch.nan)),
            "values of layer 3 hold NaN or inf",
        ),
        (lambda k, v: (k.index_fill(2, torch.tensor([7]), torch.inf), v), "keys of layer 1 hold NaN or inf"),
    ],
)
def test_bad_samples_are_refused(spoil, message):
    keys, values = spoil(samples(), samples())
    with pytest.raises(UserError, match=message) as caught:
        train_codebook(keys, values, SPEC, FINGERPRINT, TrainSpec(), **CARD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scope": "all"}, "scope=all: accepted are merged, layer, head"),
        ({"trainer": "numpy"}, "trainer=numpy: accepted are torch, faiss"),
        ({"seeding": "pca"}, r"seeding=pca: accepted are kmeans\+\+, random"),
        ({"key_rotation": "haar"}, "key_rotation=haar: accepted are none, hadamard, opq"),
        ({"iterations": 0}, "iterations=0: accepted are numbers from 1"),
        ({"max_samples_per_centroid": 0}, "max_samples_per_centroid=0"),
    ],
)
def test_unknown_options_are_refused(option, message):
    with pytest.raises(UserError, match=message):
        TrainSpec(**option)


def test_without_faiss_the_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"million\[cpu\].*million\[gpu\]") as caught:
        TrainSpec(trainer="faiss")
    assert "\n" not in str(caught.value)
