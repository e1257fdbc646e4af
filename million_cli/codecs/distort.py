"""A dense cache of coded and decoded K and V, without an exact window.

It measures a codebook by itself, as the MILLION paper does, and saves no memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from million_cli.hf.models import fingerprint
from million_cli.hf.own_layers import reset_layer
from million_cli.hf.rotary import served
from million_cli.hf.select import Fallback, beyond_positions, log_once
from million_cli.pq import Codebook, LayerPQ, decode, encode


class DistortLayer(DynamicLayer):
    """Keeps coded and decoded vectors in place of K and V."""

    def __init__(self, keys: LayerPQ, values: LayerPQ) -> None:
        super().__init__()
        self._keys, self._values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, N, D]`, coded and decoded, and return all of K and V."""
        self._keys, self._values = self._keys.to(key_states.device), self._values.to(key_states.device)
        start = self.get_seq_length()
        codes = encode(key_states, self._keys, start=start)
        keys = decode(codes, self._keys, key_states.dtype, start=start)
        values = decode(encode(value_states, self._values), self._values, value_states.dtype)
        return super().update(keys, values, *args, **kwargs)


class DistortCache(Cache):
    """Full-attention layers distorted by a codebook, sliding ones as transformers has them.

    Attributes:
        bits: nominal code bits per element.
        fallbacks: what the text did not get, as of a PQ cache.

    Raises:
        UserError: the codebook belongs to another model.
    """

    def __init__(self, model: PreTrainedModel, codebook: Codebook) -> None:
        ours = fingerprint(model)
        codebook.check(ours)
        codebook = served(codebook, model)
        self.bits = codebook.bits_per_element
        self.fallbacks: tuple[Fallback, ...] = ()
        self._positions = codebook.meta.positions
        layers = DynamicCache(config=model.config).layers
        for position, index in enumerate(ours.layers):
            layers[index] = DistortLayer(codebook.keys.layer(position), codebook.values.layer(position))
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' own; texts beyond the codebook's positions are recorded."""
        made = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        beyond = beyond_positions(self._positions, self.get_seq_length(layer_idx))
        if beyond is not None:
            self.fallbacks = (beyond,)
            log_once(beyond)
        return made

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            reset_layer(layer)
