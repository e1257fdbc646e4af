"""Transforms against their definition, their metric, and how they are fitted."""

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli.pq import LayerPQ, Setup, decode, encode, train_quantizer
from million_cli.pq.metric import metric_root
from million_cli.pq.rotation import fit_transform, random_hadamard
from million_cli.pq.transform import Transform
from million_cli.recipe import ROTATIONS
from million_cli.spec import CodeSpec

D, H = 16, 3
SPEC = CodeSpec(D, 8, 5)


def random_maps(*shape, seed=0):
    """Invertible, far from orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*shape, D, D, generator=generator, dtype=torch.float64))[0]
    return q * torch.logspace(-1, 1, D, dtype=torch.float64)


def information(rank, seed=0):
    """Positive semidefinite [H, D, D] of the given rank, axes turned by head."""
    gradients = torch.randn(H, rank, D, generator=torch.Generator().manual_seed(seed)) * torch.logspace(
        0, -2, D
    )
    return (gradients @ random_maps(H, seed=seed + 1).float()).double().mT @ (
        gradients @ random_maps(H, seed=seed + 1).float()
    ).double()


@pytest.mark.parametrize("maps", [1, H])
@examples(20)
@given(seed=st.integers(0, 1000))
def test_scores_and_outputs_are_unchanged_under_a_transform(maps, seed):
    transform = Transform.invertible(random_maps(maps, seed=seed))
    q, k, v = torch.randn(3, 2, H, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = transform.query(q) @ transform.apply(k).mT
    torch.testing.assert_close(scores, q @ k.mT, atol=1e-10, rtol=0)
    weights = scores.softmax(-1)
    torch.testing.assert_close(transform.undo(weights @ transform.apply(v)), weights @ v, atol=1e-10, rtol=0)


def test_a_rotation_maps_queries_and_keys_alike():
    R = random_hadamard(D, 1)[None]
    transform = Transform.rotation(R)
    q = torch.randn(2, H, 5, D, dtype=torch.float64)
    assert torch.equal(transform.query(q), transform.apply(q))
    torch.testing.assert_close(transform.undo(transform.apply(q)), q, atol=1e-12, rtol=0)


def test_layers_of_a_stack():
    layers = [Transform.invertible(random_maps(H, seed=s)) for s in range(3)]
    stack = Transform.stack(layers)
    assert torch.equal(stack.layer(2).decode, layers[2].decode)
    shared = Transform.stack(layers[:1])
    assert torch.equal(shared.layer(2).encode, layers[0].encode)


def test_the_roots_are_inverse_and_of_unit_volume():
    F = information(40)
    root, inverse = metric_root(F)
    eye = torch.eye(D).double().expand(H, D, D)
    torch.testing.assert_close(root @ inverse, eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.linalg.det(root), torch.ones(H).double(), atol=1e-9, rtol=1e-9)
    mean = F.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    expected = F + 0.03 * mean * eye  # up to a factor a head
    ratio = (root @ root) / expected
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), atol=0, rtol=1e-4)


@pytest.mark.parametrize("F", [torch.zeros(H, D, D), information(3)], ids=["zero", "rank 3"])
def test_the_roots_of_poor_information_are_finite(F):
    root, inverse = metric_root(F)
    assert root.isfinite().all()
    assert inverse.isfinite().all()
    if not F.any():
        torch.testing.assert_close(root, torch.eye(D).double().expand(H, D, D))


def weighted_error(x, pq, F):
    difference = (x[None] - decode(encode(x[None], pq), pq, torch.float32))[0].double()
    return torch.einsum("hnd,hde,hne->hn", difference, F, difference).mean(1)


@pytest.mark.parametrize("method", ROTATIONS)
def test_coding_in_a_metric_lowers_the_error_in_it(method):
    x = torch.randn(1, H, 3000, D, generator=torch.Generator().manual_seed(3))
    F = information(200)[None]
    train = Setup().override("train.iterations=8")
    plain, fitted = (
        train_quantizer(x, SPEC, train, transform=fit_transform(method, x, SPEC, Setup(), metric)).quantizer
        for metric in (None, F)
    )
    before, after = (weighted_error(x[0], side.layer(0), F[0]) for side in (plain, fitted))
    assert (after < (0.9 if method == "none" else 0.5) * before).all()


def test_the_predicted_divergence_is_half_the_weighted_error():
    x = torch.randn(1, H, 500, D)
    F = information(50)[None]
    side = train_quantizer(x, SPEC, Setup().override("train.iterations=2"), information=F)
    expected = weighted_error(x[0], side.quantizer.layer(0), F[0]) / 2
    torch.testing.assert_close(torch.tensor(side.predicted_kl[0]).double(), expected, rtol=1e-4, atol=0)


def test_centroids_in_half_precision_cost_nothing():
    """What the compiled kernels read: fp16 tables, of vectors that lie far from the origin as keys do.

    Rounding moves a centroid off the mean of its vectors: one draw gains or loses, the mean does not.
    """
    rises = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, H, 4000, D, generator=generator) + 8 * torch.randn(1, H, 1, D, generator=generator)
        F = information(100)[None] * 1e-6
        transform = fit_transform("opq", x, SPEC, Setup(), F)
        exact = train_quantizer(x, SPEC, Setup(), transform=transform).quantizer.layer(0)
        half = LayerPQ(exact.spec, exact.centroids.half().float(), exact.transform)
        rises.append(weighted_error(x[0], half, F[0]) / weighted_error(x[0], exact, F[0]))
    assert torch.stack(rises).mean() < 1.001
