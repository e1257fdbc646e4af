"""The map from a key's position to its direction: how a model rotates keys, layer by layer.

A rotary embedding turns each pair of a key's dimensions by an angle that depends on the position alone
(Su et al., RoFormer, arXiv:2104.09864).  So a key can be moved: turned back from the position where it was
seen and on to any other.  Angles come from the model's own rotary module, with whatever scaling it applies
(linear, dynamic, yarn, llama3, longrope).  Which dimensions form the pairs is found by trying: the same text
is read at two offsets, and in each layer the keys of one reading must be the moved keys of the other.

Letters: L layers, B batch, Hkv KV heads, T tokens, D head_dim, n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from million_cli.hf.models import full_attention_layers

Layout = Literal["still", "halves", "neighbours"]
"""Pairs of dimensions (i, i + n) or (2 i, 2 i + 1); a layer that stands still does not rotate its keys."""

_PROBE_TOKENS = 48
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Relative error below which a layer's keys count as moved; other dtypes round more, see `_tolerance`."""


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of the positions 0, 1, ... of a text, float32 `[positions, n]` each.

    Both carry the factor that some scalings put on queries and keys.
    """

    cos: Tensor
    sin: Tensor

    @property
    def scale(self) -> float:
        """The factor on keys."""
        return math.hypot(float(self.cos[0, 0]), float(self.sin[0, 0]))


class Rotary:
    """How one model rotates the keys of its full-attention layers.

    Args:
        model: in evaluation mode; it reads two short texts.

    Attributes:
        layouts: of each full-attention layer, None where keys depend on the position in another way (learned
            positions), so that they cannot be moved.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = _modules(model)
        self._config = model.config.get_text_config(decoder=True)
        self._device = model.device
        self._tables: dict[tuple[int, int], Angles] = {}
        self._kinds = _kinds(self._config, full_attention_layers(model.config), len(self._modules))
        self.layouts: list[Layout | None] = self._probe(model)

    @property
    def movable(self) -> bool:
        """Whether the keys of all layers can be moved."""
        return None not in self.layouts

    @property
    def rotates(self) -> bool:
        """Whether any layer rotates its keys."""
        return any(layout not in (None, "still") for layout in self.layouts)

    def angles(self, layer: int, length: int) -> Angles:
        """Of all positions in a text of `length` tokens, for the full-attention layer `layer`."""
        key = self._kinds[layer], length
        if key not in self._tables:
            module, options = self._modules[key[0]]
            self._tables[key] = _angles(module, options, length, self._device)
        return self._tables[key]

    def lengths(self, longest: int) -> tuple[int, ...]:
        """Lengths of texts up to `longest` whose angles differ.

        One, unless the scaling depends on the length of the text (dynamic, longrope).
        """
        kinds = {str(p.get("rope_type")) for p in _parameters(self._config)}
        if not kinds & {"dynamic", "longrope"}:
            return (longest,)
        original = min(
            int(p.get("original_max_position_embeddings") or self._config.max_position_embeddings)
            for p in _parameters(self._config)
        )
        if original >= longest:
            return (longest,)
        if "longrope" in kinds:
            return original, longest
        steps = math.ceil(math.log2(longest / original))
        return (original, *(min(longest, original << step) for step in range(1, steps + 1)))

    def move(
        self, layer: int, keys: Tensor, source: Tensor, target: Tensor, lengths: tuple[int, int]
    ) -> Tensor:
        """Keys as they would be at other positions.

        Args:
            layer: position among the full-attention layers.
            keys: `[..., T, D]`, after RoPE, seen at the positions `source`; what follows a key linearly in
                the same basis, such as its gradient, moves alike where the scaling has no factor.
            source, target: int64 `[T]`, or broadcasting to the leading dimensions of `keys`.
            lengths: of the texts in which `source` and `target` are positions.

        Returns:
            Keys in their own dtype; the arithmetic is float32, or float64 for float64 keys.
        """
        layout = self.layouts[layer]
        assert layout is not None
        if layout == "still":
            return keys
        old, new = (self.angles(layer, length) for length in lengths)
        c0, s0 = old.cos[source], old.sin[source]
        c1, s1 = new.cos[target], new.sin[target]
        square = old.scale**2
        return _turn(keys, (c1 * c0 + s1 * s0) / square, (s1 * c0 - c1 * s0) / square, layout)

    @torch.no_grad()
    def _probe(self, model: PreTrainedModel) -> list[Layout | None]:
        """Read a text at two offsets; see the module's head."""
        context = int(getattr(self._config, "max_position_embeddings", 2048) or 2048)
        T = min(_PROBE_TOKENS, max(2, context // 2))
        shift = max(1, min(1021, context - T, self.lengths(context)[0] - T))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self._config.vocab_size, (1, T), generator=generator).to(model.device)
        here, there = (_keys(model, ids, offset) for offset in (0, shift))
        at = torch.arange(T, device=model.device)
        lengths = (T + shift, T + shift)
        found: list[Layout | None] = []
        for layer, (a, b) in enumerate(zip(here, there, strict=True)):
            errors: dict[Layout, float] = {"still": _distance(a, b)}
            if self._modules:
                for layout in ("halves", "neighbours"):
                    if 2 * self.angles(layer, lengths[1]).cos.shape[1] > a.shape[-1]:
                        continue
                    self.layouts = [layout] * len(here)
                    errors[layout] = _distance(self.move(layer, a, at, at + shift, lengths), b)
            best = min(errors, key=lambda layout: errors[layout])
            found.append(best if errors[best] < _tolerance(a.dtype) else None)
        self._tables.clear()
        return found


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Each pair of the first 2 n dimensions turned; the rest passes."""
    n = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., : 2 * n].to(dtype), x[..., 2 * n :]
    cos, sin = cos.to(x.device, dtype), sin.to(x.device, dtype)
    if layout == "halves":
        a, b = turned[..., :n], turned[..., n:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _modules(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The decoder's rotary modules with the layer type each is asked for; none if it has none of its own."""
    decoder = model.get_decoder()
    module = getattr(decoder, "rotary_emb", None)
    if not isinstance(module, nn.Module):
        return []
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):  # a set of frequencies for each type of layer
        return [(module, {"layer_type": kind}) for kind in rope_type]
    return [(module, {})]


def _kinds(config: Any, layers: Sequence[int], modules: int) -> list[int]:
    """For each full-attention layer, which of `_modules` serves it."""
    if modules < 2:
        return [0] * len(layers)
    types = list(dict.fromkeys(config.layer_types))
    order = [kind for kind in config.rope_parameters if kind in types]
    return [order.index(config.layer_types[index]) for index in layers]


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The configuration's rope parameters, a mapping for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return nested or [parameters]


@torch.no_grad()
def _angles(module: nn.Module, options: dict[str, Any], length: int, device: torch.device) -> Angles:
    probe = torch.zeros(1, 1, dtype=torch.float32, device=device)
    positions = torch.arange(length, device=device)[None]
    made = module(probe, positions, **options)
    if isinstance(made, Tensor) and made.is_complex():
        return Angles(made.real[0].float(), made.imag[0].float())
    cos, sin = (part[0].float() for part in made)
    half = cos.shape[1] // 2
    if 2 * half == cos.shape[1] and torch.equal(cos[:, :half], cos[:, half:]):
        return Angles(cos[:, :half].contiguous(), sin[:, :half].contiguous())
    if 2 * half == cos.shape[1] and torch.equal(cos[:, ::2], cos[:, 1::2]):
        return Angles(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())
    return Angles(cos, sin)


def _keys(model: PreTrainedModel, ids: Tensor, offset: int) -> list[Tensor]:
    """Keys `[1, Hkv, T, D]` of each full-attention layer for a text that begins at position `offset`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)[None]
    model.get_decoder()(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    return [layers[index].keys for index in full_attention_layers(model.config)]


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative error of a typical token: rounding may send a few to other experts."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, 0.1)
