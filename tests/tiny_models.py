"""Tiny random float64 models of each supported architecture, codebooks for them, an independent reference.

The reference is a dense cache that overwrites tokens by their quantised and decoded vectors, with a plain
softmax attention in float64: none of it shares code with the package.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from random_codebook import random_codebook
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from million_cli.hf.models import random_model
from million_cli.pq.codebook import Codebook, ProductQuantizer
from million_cli.pq.rebase import Rebase
from million_cli.spec import WindowSpec

VOCABULARY = 61
WINDOW = WindowSpec(page_size=16, residual=32)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,  # large, so that attention is far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 9,  # not head_dim
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {**_SLIDING, "attn_logit_softcapping": 3.0},
    "gemma3_text": _SLIDING,
}


def tiny_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """The same object for the same arguments."""
    return _tiny_model(architecture, seed)


@cache
def _tiny_model(architecture: str, seed: int) -> PreTrainedModel:
    return new_model(architecture, seed)


def tiny_config(architecture: str, **settings: Any) -> dict[str, Any]:
    """Fields of a configuration; `settings` take precedence."""
    return {"model_type": architecture, **_SHAPE, **ARCHITECTURES.get(architecture, {}), **settings}


def new_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A new model, for engines, which change its projections."""
    return random_model(tiny_config(architecture), seed=seed, dtype="float64")


@cache
def codebook_for(architecture: str = "llama", mapped: bool = True, rebase: int = 0) -> Codebook:
    """Random centroids and transforms: keys in 8 subspaces of 5 bits, values in 4 of 8 bits."""
    return random_codebook(tiny_model(architecture), (8, 5), (4, 8), mapped, rebase=rebase)


def random_ids(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def quantise(x: Tensor, quantizer: ProductQuantizer, layer: int, start: int = 0) -> Tensor:
    """`[B, Hkv, T, D]`, tokens from `start` on, replaced by nearest centroids, by the definition."""
    B, Hkv, T, D = x.shape
    rebase = quantizer.rebases[layer] if quantizer.rebases else None
    if rebase is not None:
        x = from_origin(x, rebase, start, -1)
    spec, result = quantizer.specs[layer], torch.empty_like(x)
    for head in range(Hkv):
        there = back = torch.eye(D).double()
        if quantizer.transform is not None:
            there, back = (
                m[layer, head].double() for m in (quantizer.transform.encode, quantizer.transform.decode)
            )
        parts = (x[:, head] @ there).unflatten(-1, (spec.M, spec.dsub))
        centroids = quantizer.centroids[layer][head].double()
        nearest = torch.stack(
            [
                torch.cdist(parts[..., m, :].reshape(-1, spec.dsub), centroids[m]).argmin(-1)
                for m in range(spec.M)
            ]
        )
        decoded = torch.stack([centroids[m][nearest[m]] for m in range(spec.M)], dim=1)
        result[:, head] = decoded.reshape(B, T, D) @ back
    return result if rebase is None else from_origin(result, rebase, start, 1)


def from_origin(x: Tensor, rebase: Rebase, start: int, sign: int) -> Tensor:
    """float64 keys `[B, Hkv, T, D]` turned by the angles of their blocks' origins, on (1) or back (-1).

    Pairs of dimensions as complex numbers, which is how the rotation is defined.
    """
    n, x = len(rebase.frequencies), x.clone()
    first, second = (
        (slice(n), slice(n, 2 * n)) if rebase.layout == "halves" else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    )
    origins = torch.arange(start, start + x.shape[2]).double() // rebase.every * rebase.every
    angles = sign * origins[:, None] * rebase.frequencies
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)
    z = z * rebase.gain**sign
    x[..., first], x[..., second] = z.real, z.imag
    return x


class ReferenceLayer(DynamicLayer):
    """Dense K and V in which all tokens up to `coded_length` have been quantised and decoded."""

    def __init__(self, codebook: Codebook, position: int) -> None:
        super().__init__()
        self._codebook, self._position = codebook, position

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        coded = WINDOW.coded_length(self.get_seq_length())
        seen = super().update(key_states, value_states)
        coded_after = WINDOW.coded_length(self.get_seq_length())
        self.keys = self._quantised(self.keys, self._codebook.keys, coded, coded_after)
        self.values = self._quantised(self.values, self._codebook.values, coded, coded_after)
        return (self.keys, self.values) if key_states.shape[2] == 1 else seen

    def _quantised(self, x: Tensor, quantizer: ProductQuantizer, start: int, stop: int) -> Tensor:
        if start == stop:
            return x
        middle = quantise(x[:, :, start:stop], quantizer, self._position, start)
        return torch.cat([x[:, :, :start], middle, x[:, :, stop:]], dim=2)


def reference_cache(model: PreTrainedModel, codebook: Codebook) -> DynamicCache:
    """The reference for `prefill="exact"`; sets the model's attention to the plain one below."""
    model.set_attn_implementation("plain_float64")
    cache = DynamicCache(config=model.config)
    for position, index in enumerate(codebook.meta.fingerprint.layers):
        cache.layers[index] = ReferenceLayer(codebook, position)
    return cache


def plain_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    N, T = scores.shape[-2:]
    if attention_mask is None:
        attention_mask = torch.ones(N, T, dtype=torch.bool).tril(T - N)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    if s_aux is None:
        weights = scores.softmax(-1)
    else:
        column = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain_float64", plain_attention)
AttentionMaskInterface.register("plain_float64", sdpa_mask)


@torch.no_grad()
def forward(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits `[B, N, V]` of the next tokens of a text whose first part is in the cache."""
    return model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits
