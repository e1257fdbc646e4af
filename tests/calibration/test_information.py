"""Fisher information against its definition: the divergence that an error causes, and gradients by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from million_cli.calibration.information import Information, NoGradients
from million_cli.codecs.simulated import SimulatedCache
from million_cli.errors import UserError
from million_cli.spec import WindowSpec

WINDOW = WindowSpec(16, 32)
T = 80


class Shift:
    """A codec that adds given errors to keys and values."""

    bits = 16.0

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = keys, values

    def keys(self, pages: torch.Tensor) -> torch.Tensor:
        return pages + self._keys.unflatten(2, (-1, 16))[:, :, : pages.shape[2]]

    def values(self, pages: torch.Tensor) -> torch.Tensor:
        return pages + self._values.unflatten(2, (-1, 16))[:, :, : pages.shape[2]]


def log_p(model, ids, codecs):
    cache = SimulatedCache(model, codecs, WINDOW, prefill="quantized")
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits.log_softmax(-1)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_it_predicts_the_divergence_of_small_errors(architecture: str, side: int) -> None:
    """KL of random independent errors d of all coded vectors of a layer is their sum of d F d^T / 2."""
    model = tiny_model(architecture)
    information = Information(model, WINDOW, seed=1)
    ids = random_ids(1, T, seed=3)
    for _ in range(4):
        information.read(ids.expand(50, -1))  # each with its own draws of the next tokens
    F = information.mean()[side]  # type: ignore[index]
    L, Hkv, D = F.shape[:3]
    coded = WINDOW.coded_length(T)
    generator = torch.Generator().manual_seed(0)
    exact = log_p(model, ids, [Shift(*torch.zeros(2, 1, Hkv, coded, D).double())] * L)
    layer, epsilon, divergences, predicted = L - 1, 1e-3, [], []
    for _ in range(40):
        errors = torch.zeros(L, 2, 1, Hkv, coded, D, dtype=torch.float64)
        errors[layer, side] = (
            torch.randn(1, Hkv, coded, D, generator=generator, dtype=torch.float64) * epsilon
        )
        shifted = log_p(model, ids, [Shift(*pair) for pair in errors])
        divergences.append((exact.exp() * (exact - shifted)).sum().item())
        d = errors[layer, side, 0]
        predicted.append(torch.einsum("htd,hde,hte->", d, F[layer], d).item() / 2)
    ratio = sum(divergences) / sum(predicted)
    assert 0.8 < ratio < 1.25


def test_the_exact_window_is_not_counted() -> None:
    """A text that is never coded has no information; one page of it has that page's alone."""
    model = tiny_model()
    information = Information(model, WINDOW)
    information.read(random_ids(1, 31))
    assert information.mean() is None
    assert information.read_tokens == 31
    information.read(random_ids(1, 33))
    keys, values = information.mean()  # type: ignore[misc]
    assert keys.shape == (2, 2, 16, 16)
    for F in (keys, values):
        assert torch.equal(F, F.mT) or (F - F.mT).abs().max() < 1e-12 * F.abs().max()
        assert (torch.linalg.eigvalsh(F) > -1e-12).all()
        assert F.abs().max() > 0


def test_a_batch_counts_as_its_texts() -> None:
    model = tiny_model()
    ids = random_ids(3, T)
    together = Information(model, WINDOW)
    together.read(ids)
    assert together.read_tokens == 3 * T
    assert int(together.state()["counts"][0]) == 3 * WINDOW.coded_length(T)


def test_it_resumes_exactly() -> None:
    model, texts = tiny_model(), [random_ids(1, T, seed=s) for s in range(4)]
    straight, first, second = (Information(model, WINDOW, seed=5) for _ in range(3))
    for text in texts:
        straight.read(text)
    for text in texts[:2]:
        first.read(text)
    second.restore(first.state())
    for text in texts[2:]:
        second.read(text)
    for a, b in zip(straight.mean(), second.mean(), strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)


def test_weights_get_no_gradients_and_ask_for_them_as_before() -> None:
    model = tiny_model()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    Information(model, WINDOW).read(random_ids(1, T))
    assert all(parameter.grad is None for parameter in parameters)
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    parameters[0].requires_grad_(True)


def test_a_model_that_passes_no_gradients_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    head = model.get_output_embeddings()
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: forward(hidden.detach()))
    with pytest.raises(NoGradients):
        Information(model, WINDOW).read(random_ids(1, T))
    monkeypatch.setattr(head, "forward", lambda hidden: forward(hidden) * float("inf"))
    with pytest.raises((NoGradients, UserError)):
        Information(model, WINDOW).read(random_ids(1, T))


def test_it_returns_the_squares_whose_mean_is_the_trace() -> None:
    model = tiny_model()
    information = Information(model, WINDOW)
    observed = information.read(random_ids(1, T))
    coded = WINDOW.coded_length(T)
    for side, F in enumerate(information.mean()):  # type: ignore[arg-type]
        for layer, seen in enumerate(observed):
            assert seen.keys.shape[:3] == seen.squares.shape[1:] == (1, 2, T)
            squares = seen.squares[side, 0, :, :coded].double()
            trace = F[layer].diagonal(dim1=-2, dim2=-1).sum(-1)
            torch.testing.assert_close(squares.mean(-1), trace, rtol=1e-5, atol=0)
            assert (seen.squares[..., coded:] == -1).all()
    assert all((seen.squares == -1).all() for seen in information.read(random_ids(1, 20)))
