"""Weights by gradients against the formula in float64; unknown gradients."""

import torch

from million_cli.pq import Setup, decode, encode, train_quantizer
from million_cli.pq.weights import LEAST, MOST, POWER, weights_of
from million_cli.spec import CodeSpec


def test_the_formula() -> None:
    squares = torch.tensor([0.0, 1e-9, 0.5, 2.0, 90.0] + [0.1] * 95)
    s = squares.double()
    expected = (s / s.mean()).clamp(LEAST, MOST) ** POWER
    weights = weights_of(squares)
    torch.testing.assert_close(weights.double(), expected / expected.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights_of(squares * 1e6), weights)


def test_what_is_not_known_counts_as_the_mean() -> None:
    known = torch.tensor([0.2, 3.0, 1.0])
    weights = weights_of(torch.cat([known, torch.full((2,), -1.0)]))
    torch.testing.assert_close(weights, torch.cat([weights_of(known), torch.ones(2)]))
    assert torch.equal(weights_of(torch.stack([torch.zeros(4), torch.full((4,), -1.0)])), torch.ones(2, 4))


def test_training_heeds_the_weights_of_each_scope() -> None:
    """Vectors with large gradients get smaller errors than without; unknown gradients change nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 800, 8, generator=generator)
    squares = torch.full((2, 2, 800), 1e-2)
    squares[..., :100] = 10.0
    spec = CodeSpec(8, 2, 4)
    for scope in ("head", "layer", "merged"):
        errors = {}
        for name, weighting, given in (
            ("plain", "none", squares),
            ("unknown", "gradient", torch.full_like(squares, -1)),
            ("weighted", "gradient", squares),
        ):
            train = Setup().override(f"quantizer.scope={scope}", f"quantizer.weighting={weighting}")
            pq = train_quantizer(x, spec, train, squares=given).quantizer
            decoded = torch.stack(
                [decode(encode(x[i : i + 1], pq.layer(i)), pq.layer(i), x.dtype)[0] for i in (0, 1)]
            )
            errors[name] = (x - decoded)[:, :, :100].double().square().mean().item()
        assert errors["weighted"] < 0.9 * errors["plain"], scope
        assert abs(errors["unknown"] / errors["plain"] - 1) < 1e-6, scope
