import sys
from dataclasses import replace

import pytest
import torch

from million_cli.errors import UserError
from million_cli.pq import Setup, decode, encode, train_codebook, train_quantizer
from million_cli.pq import train as module
from million_cli.pq.rotation import random_hadamard, random_orthogonal
from million_cli.pq.transform import Transform
from million_cli.recipe import TRAINERS
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint

L, HKV, N, D = 2, 3, 400, 8
FINGERPRINT = ModelFingerprint("llama", 4, (1, 3), HKV, D, "abc")
KEYS = CodeSpec(D, 4, 4)
SETUP = Setup().override(
    "quantizer.keys.M=4", "quantizer.keys.nbits=4", "quantizer.values.M=2", "quantizer.values.nbits=3"
)
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


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_has_its_shape_and_its_errors_in_the_card(scope, trainer):
    keys, values = samples(0), samples(1).half()
    progress = []
    codebook = train_codebook(
        keys,
        values,
        FINGERPRINT,
        replace(SETUP, seed=5).override(
            f"quantizer.scope={scope}", f"train.trainer={trainer}", "quantizer.values.rotation=hadamard"
        ),
        progress=lambda done, total: progress.append((done, total)),
        **CARD,
    )
    shape = {"merged": (1, 1), "layer": (L, 1), "head": (L, HKV)}[scope]
    assert [tuple(table.shape) for table in codebook.keys.centroids] == [(shape[1], 4, 16, 2)] * shape[0]
    assert [tuple(table.shape) for table in codebook.values.centroids] == [(shape[1], 2, 8, 4)] * shape[0]
    assert codebook.keys.transform is None
    assert torch.equal(codebook.values.transform.encode, random_hadamard(D, 5).float()[None, None])
    meta = codebook.meta
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    held = order[: N // 16].sort().values
    for x, side, error in (
        (keys, codebook.keys, meta.key_error),
        (values, codebook.values, meta.value_error),
    ):
        expected = relative_errors(x[:, :, held].float(), side)
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)
    assert (meta.tokens, meta.samples, meta.held_out, meta.seed) == (1000, N - N // 16, N // 16, 5)
    assert meta.recipe.train.trainer == trainer
    assert meta.recipe.quantizer.values.rotation == "hadamard"
    assert set(meta.versions) == {"torch", "million"} | ({"faiss"} if trainer == "faiss" else set())
    total = 6 * shape[0] * shape[1]
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)


def test_finer_scopes_fit_better():
    errors = [
        sum(map(sum, train_quantizer(samples(), KEYS, SETUP.override(f"quantizer.scope={scope}")).error))
        for scope in SCOPES
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_seed_decides_everything():
    train = SETUP.override(
        "quantizer.scope=layer", "quantizer.keys.rotation=hadamard", "train.max_samples_per_centroid=20"
    )
    first, again, other = (
        train_codebook(samples(), samples(1), FINGERPRINT, t, **CARD)
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
    train = SETUP.override(f"quantizer.scope={scope}", "train.iterations=2")
    transform = Transform.rotation(rotation.float())
    inside = train_quantizer(x, KEYS, train, transform=transform).quantizer
    outside = train_quantizer(x.float() @ rotation.float(), KEYS, train).quantizer
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
    train_quantizer(x, KEYS, SETUP.override(f"quantizer.scope={scope}", "train.max_samples_per_centroid=6"))
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
    trained = train_quantizer(x, KEYS, SETUP)
    assert all(table.isfinite().all() for table in trained.quantizer.centroids)
    assert trained.error[0][1] < 1e-12


def test_one_sample_is_enough():
    x = samples()[:, :, :1]
    pq = train_quantizer(x, KEYS, SETUP).quantizer.layer(1)
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
        train_codebook(keys, values, FINGERPRINT, SETUP, **CARD)
    assert "\n" not in str(caught.value)


def test_without_faiss_the_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"million\[cpu\].*million\[gpu\]") as caught:
        Setup().override("train.trainer=faiss")
    assert "\n" not in str(caught.value)


def test_held_out_samples_do_not_train():
    """Samples that are far off change errors and nothing else if they are held out."""
    keys = samples()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    spoiled = keys.clone()
    spoiled[:, :, order[: N // 16]] += 1000
    one, other = (train_codebook(x, samples(1), FINGERPRINT, SETUP, **CARD) for x in (keys, spoiled))
    assert all(map(torch.equal, one.keys.centroids, other.keys.centroids))
    assert other.meta.key_error[0][0] > one.meta.key_error[0][0]
    everything = train_codebook(keys, samples(1), FINGERPRINT, SETUP.override("train.held_out=0"), **CARD)
    assert (everything.meta.samples, everything.meta.held_out) == (N, 0)
    torch.testing.assert_close(
        everything.meta.key_error, relative_errors(keys, everything.keys), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(("scope", "enough"), [("head", 16), ("layer", 6), ("merged", 3)])
def test_fewer_samples_than_centroids_are_refused_and_few_are_warned_of(scope, enough, caplog):
    """16 centroids; heads that share a codebook share their samples."""
    setup = SETUP.override(f"quantizer.scope={scope}", "train.held_out=0")
    shared = {"head": 1, "layer": HKV, "merged": L * HKV}[scope]

    def train(n):
        caplog.clear()
        return train_codebook(samples()[:, :, :n], samples(1)[:, :, :n], FINGERPRINT, setup, **CARD)

    with pytest.raises(
        UserError, match=f"^{(enough - 1) * shared} samples for 16 centroids: accepted are at"
    ):
        train(enough - 1)
    train(enough)
    assert f"{enough * shared} samples for 16 centroids: below 39 a centroid" in caplog.text
    train(-(-39 * 16 // shared) if scope != "head" else N)
    assert bool(caplog.text) == (scope == "head")  # there are 400 samples a head here, of 624
