"""Fisher information of stored keys and values: how much each direction of an error changes the predictions.

For every vector x that a cache would code, g is the gradient of the log-likelihood of tokens that are drawn
from the model's own next-token distributions, taken through the queries that would see x coded, not those
that find it still in the exact window.  F = E[g g^T] over vectors, a layer and KV head (see `pq.metric`).

Letters: B batch, T tokens, L full-attention layers, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from million_cli.codecs.simulated import SimulatedCache
from million_cli.hf.models import fingerprint
from million_cli.spec import WindowSpec

Squares = tuple[Tensor, Tensor]
"""|g|^2 of the coded keys and values of a layer, float32 `[B, Hkv, coded]` each."""


class NoGradients(RuntimeError):  # noqa: N818 (a state, as PagePoolExhausted)
    """The model cannot be differentiated with respect to its keys and values."""


class Information:
    """Sums of g g^T, in float64 on the CPU: 16 L Hkv D^2 bytes however long the text.

    Args:
        model: whose information is gathered.
        window: which tokens of a text would be coded, and for which queries.
        seed: of the draws; with the number of tokens read so far it decides them.
    """

    def __init__(self, model: PreTrainedModel, window: WindowSpec | None = None, seed: int = 0) -> None:
        self._model, self._window, self._seed = model, window or WindowSpec(), seed
        print_ = fingerprint(model)
        shape = (len(print_.layers), print_.num_kv_heads, print_.head_dim, print_.head_dim)
        self._sums = {"keys": torch.zeros(shape, dtype=torch.float64)}
        self._sums["values"] = self._sums["keys"].clone()
        self._vectors = 0  # of each head
        self.read_tokens = 0

    def read(self, input_ids: Tensor) -> list[Squares]:
        """Add the vectors of texts `[B, T]` int64; those of a text too short to be coded add nothing.

        The weights get no gradients.  Memory is that of the activations of one forward pass.

        Returns:
            The squared gradients of each layer, of the tokens from the first to the last that is coded.

        Raises:
            NoGradients: the model's layers do not pass gradients on, or give NaN or infinity.
        """
        taps = [_Tap() for _ in range(len(self._sums["keys"]))]
        device = self._model.device
        generator = torch.Generator(device).manual_seed((self._seed << 32) + self.read_tokens)
        cache = SimulatedCache(self._model, taps, self._window, prefill="quantized")
        with torch.enable_grad(), _frozen(self._model):
            try:
                logits = self._model(
                    input_ids=input_ids.to(device), past_key_values=cache, use_cache=True
                ).logits
                drawn = _draw(logits.detach(), generator)
                likelihood = torch.log_softmax(logits.float(), -1).gather(-1, drawn).sum()
                inputs = [x for tap in taps for x in tap.stored]
                gradients = torch.autograd.grad(likelihood, inputs, allow_unused=True) if inputs else ()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise NoGradients(str(error).splitlines()[0]) from error
        self.read_tokens += input_ids.numel()
        if not inputs:
            return []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                raise NoGradients(f"keys or values of layer {i // 2} do not reach the logits")
            g = gradient.transpose(0, 1).flatten(1, -2)  # [Hkv, B * coded, D]
            moment = (g.mT.double() @ g.double()) if g.device.type == "cpu" else (g.float().mT @ g.float())
            if not bool(moment.isfinite().all()):
                raise NoGradients(f"gradients of layer {i // 2} hold NaN or infinity in {g.dtype}")
            self._sums["values" if i % 2 else "keys"][i // 2] += moment.cpu().double()
        self._vectors += gradients[0][:, 0].flatten(0, -2).shape[0]
        squares = [g.float().square().sum(-1).flatten(2) for g in gradients]
        return list(zip(squares[::2], squares[1::2], strict=True))

    def forget(self) -> None:
        """Drop what was gathered."""
        for total in self._sums.values():
            total.zero_()
        self._vectors = 0

    def mean(self) -> tuple[Tensor, Tensor] | None:
        """F of keys and of values, float64 `[L, Hkv, D, D]`; None if no vector was coded yet."""
        return mean_of_state(self.state())

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on exactly, as tensors."""
        return {**self._sums, "counts": torch.tensor([self._vectors, self.read_tokens])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a `state()` of the same model."""
        self._sums = {side: state[side].clone() for side in self._sums}
        self._vectors, self.read_tokens = state["counts"].tolist()


def mean_of_state(state: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """`Information.mean` of a `state()`."""
    vectors = int(state["counts"][0])
    return (state["keys"] / vectors, state["values"] / vectors) if vectors else None


class _Tap:
    """A codec that changes nothing and keeps what it gave back, to be differentiated by."""

    bits = 16.0

    def __init__(self) -> None:
        self.stored: list[Tensor] = []

    def keys(self, pages: Tensor) -> Tensor:
        """Pages `[B, Hkv, n, P, D]`, as a node of the graph that gradients are asked for."""
        tapped = pages.view_as(pages) if pages.requires_grad else pages.detach().requires_grad_(True)
        self.stored.append(tapped)
        return tapped

    values = keys


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token of each position's distribution: logits `[B, T, V]` -> `[B, T, 1]`, in bounded memory."""
    rows = [
        torch.multinomial(torch.softmax(part.float(), -1), 1, generator=generator)
        for part in logits.flatten(0, 1).split(256)
    ]
    return torch.cat(rows).view(*logits.shape[:2], 1)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter asks for gradients meanwhile."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
