"""Fisher information of stored keys and values: how much each direction of an error changes the predictions.

For every vector x that a cache would code, g is the gradient of the log-likelihood of tokens drawn from the
model's own next-token distributions.  It comes from the queries that would see x coded, not from those that
see it in the exact window.  F = E[g g^T] over vectors, a layer and KV head (see `pq.metric`).  Gradients of
keys are turned to position 0, as the sampled keys are (see `calibration.moving`); those of the first tokens
stay where they are.

Letters: B batch, T tokens, L full-attention layers, Hkv KV heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from million_cli.codecs.simulated import SimulatedCache
from million_cli.hf.models import fingerprint
from million_cli.hf.rotary import Rotary
from million_cli.spec import WindowSpec


@dataclass(frozen=True)
class Observed:
    """One layer of a batch of windows.

    keys, values: `[B, Hkv, T, D]`, keys after RoPE; squares: |g|^2 of keys and of values, float32
    `[2, B, Hkv, T]`, -1 for tokens that are not coded.
    """

    keys: Tensor
    values: Tensor
    squares: Tensor


_LOGITS = 1 << 24  # elements of the distributions that are looked at together
_HALF_SCALES = (2.0**-4, 2.0**-10, 2.0**-16)
"""Factors on the likelihood, tried in turn: in float16 the gradients inside a deep model can pass 65504."""


FIRST_TOKENS = 4
"""Tokens at the start of a text that are not moved.  Most attention that goes nowhere else goes to the first
one (Xiao et al., StreamingLLM, arXiv:2309.17453), and never from another position; its gradient can outweigh
those of all others together, so at drawn positions it would drown them."""


class NoGradients(RuntimeError):  # noqa: N818 (a state, as PagePoolExhausted)
    """The model cannot be differentiated with respect to its keys and values."""


class Information:
    """Sums of g g^T, in float64 on the model's device: 16 L Hkv D^2 bytes however long the text.

    Args:
        model: the model to differentiate.
        window: which tokens of a text would be coded, and for which queries.
        seed: with the number of windows read so far it decides the draws.
        rotary: the model's, to turn gradients of keys to position 0; None leaves them as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        window: WindowSpec | None = None,
        seed: int = 0,
        rotary: Rotary | None = None,
    ) -> None:
        self._model, self._window, self._seed = model, window or WindowSpec(), seed
        self._rotary = rotary
        ours = fingerprint(model)
        shape = (len(ours.layers), ours.num_kv_heads, ours.head_dim, ours.head_dim)
        self._sums = {
            of: torch.zeros(shape, dtype=torch.float64, device=model.device)
            for of in ("keys", "first_keys", "values")
        }
        self._vectors = 0  # of each head
        self.read_tokens = self._windows = 0

    def read(self, input_ids: Tensor) -> list[Observed]:
        """Add the vectors of texts `[B, T]` int64; texts too short to be coded add nothing.

        The weights get no gradients.  Memory is that of the activations of one forward pass.

        Returns:
            For each full-attention layer, what sampling needs of it.

        Raises:
            NoGradients: the model's layers do not pass gradients on, or give NaN or infinity.
        """
        half = self._model.dtype == torch.float16
        vectors: list[tuple[Tensor, Tensor]] = []
        for scale in _HALF_SCALES if half else (1.0,):
            vectors = []
            gradients = self._gradients(input_ids, scale, vectors)
            if bool(torch.stack([g.isfinite().all() for g in gradients]).all() if gradients else True):
                break
        else:
            raise NoGradients(f"gradients hold NaN or infinity in {self._model.dtype}")
        self.read_tokens += input_ids.numel()
        self._windows += len(input_ids)
        B, Hkv, T, _ = vectors[0][0].shape
        squares = torch.full((len(vectors), 2, B, Hkv, T), -1.0, device=vectors[0][0].device)
        for i, gradient in enumerate(gradients):
            layer, g = i // 2, gradient.flatten(2, 3).float() / scale  # [B, Hkv, coded, D]
            squares[layer, i % 2, :, :, : g.shape[2]] = g.square().sum(-1)
            if i % 2:
                self._add("values", layer, g)
                continue
            if self._rotary is not None:
                self._add("first_keys", layer, g[:, :, :FIRST_TOKENS])
                g = g[:, :, FIRST_TOKENS:]
                at = torch.arange(FIRST_TOKENS, FIRST_TOKENS + g.shape[2], device=g.device)
                g = self._rotary.to_origin(layer, g, at, input_ids.shape[1])
            self._add("keys", layer, g)
        if gradients:
            self._vectors += gradients[0][:, 0].flatten(0, -2).shape[0]
        return [Observed(*both, of_layer) for both, of_layer in zip(vectors, squares, strict=True)]

    def _add(self, of: str, layer: int, g: Tensor) -> None:
        """Add the moments of gradients `[B, Hkv, N, D]`."""
        g = g.transpose(0, 1).flatten(1, 2)
        g = g.double() if g.device.type == "cpu" else g
        self._sums[of][layer] += (g.mT @ g).double()

    def _gradients(
        self, input_ids: Tensor, scale: float, vectors: list[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Gradients of `scale` times the likelihood, `[B, Hkv, pages, P, D]`: keys, values of each layer.

        K and V of each layer are put into `vectors`.
        """

        def observe(layer: int, keys: Tensor, values: Tensor, start: int) -> None:
            vectors.append((keys.detach(), values.detach()))

        model = self._model
        taps = [_Tap() for _ in self._sums["keys"]]
        cache = SimulatedCache(model, taps, self._window, prefill="quantized", observe=observe)
        with torch.enable_grad(), _frozen(model):
            try:
                ids = input_ids.to(model.device)
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
                inputs = [x for tap in taps for x in tap.stored]
                if not inputs:
                    return []
                towards = self._towards_draws(logits.detach(), scale)
                gradients = torch.autograd.grad(logits, inputs, towards, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise NoGradients(str(error).splitlines()[0]) from error
        unreached = [i // 2 for i, gradient in enumerate(gradients) if gradient is None]
        if unreached:
            raise NoGradients(f"keys or values of layer {unreached[0]} do not reach the logits")
        return list(gradients)

    def _towards_draws(self, logits: Tensor, scale: float) -> Tensor:
        """Gradient of sum ln p(drawn token) by the logits `[B, T, V]`, times `scale`: (one-hot - p) scale.

        Each window's draws depend on its number alone, not on the batch.
        """
        towards = torch.empty_like(logits)
        rows = max(1, _LOGITS // logits.shape[-1])
        for b, window in enumerate(logits):
            generator = torch.Generator(logits.device).manual_seed((self._seed << 32) + self._windows + b)
            for start in range(0, len(window), rows):
                part = slice(start, start + rows)
                p = torch.softmax(window[part].float(), -1)
                drawn = torch.multinomial(p, 1, generator=generator)
                towards[b, part] = scale * (torch.zeros_like(p).scatter_(-1, drawn, 1.0) - p)
        return towards

    def forget(self) -> None:
        """Forget all vectors."""
        for total in self._sums.values():
            total.zero_()
        self._vectors = 0

    def mean(self, turned: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor] | None:
        """See `mean_of_state`."""
        return mean_of_state(self.state(), turned)

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on exactly, as tensors."""
        counts = torch.tensor([self._vectors, self.read_tokens, self._windows])
        return {**{side: total.cpu() for side, total in self._sums.items()}, "counts": counts}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a `state()` of the same model."""
        self._sums = {side: state[side].to(self._model.device) for side in self._sums}
        self._vectors, self.read_tokens, self._windows = state["counts"].tolist()


def mean_of_state(
    state: dict[str, Tensor], turned: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """F of keys and of values, float64 `[L, Hkv, D, D]` on the CPU; None if no vector was coded yet.

    turned: maps F of keys at position 0 to F at the positions that codes are made for.
    """
    vectors = int(state["counts"][0])
    if not vectors:
        return None
    keys = state["keys"] if turned is None else turned(state["keys"])
    return (keys + state["first_keys"]) / vectors, state["values"] / vectors


def windows_at_once(model: PreTrainedModel, tokens: int) -> int:
    """Windows of so many tokens whose backward pass is sure to fit beside the model, at least one.

    A GPU may spend 0.4 of its memory on activations.  A layer of a Llama keeps about 16 vectors of the hidden
    size and 4 of the MLP's a token (SmolLM2: 13.6 GiB for 16,384 tokens).  On a CPU windows go one by one.
    """
    if model.device.type != "cuda":
        return 1
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    bytes_a_token = model.dtype.itemsize * config.num_hidden_layers * (16 * hidden + 4 * inner)
    free = 0.4 * torch.cuda.get_device_properties(model.device).total_memory
    return max(1, int(free / (bytes_a_token * tokens)))


class _Tap:
    """A codec that changes nothing and keeps its results, so that gradients can be taken at them."""

    bits = 16.0

    def __init__(self) -> None:
        self.stored: list[Tensor] = []

    def keys(self, pages: Tensor) -> Tensor:
        """Pages `[B, Hkv, n, P, D]`, as a node of the graph that gradients are asked for."""
        tapped = pages.view_as(pages) if pages.requires_grad else pages.detach().requires_grad_(True)
        self.stored.append(tapped)
        return tapped

    values = keys


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter requires gradients inside."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
