"""The map from a key's position to its direction: how a model rotates keys, layer by layer.

A rotary embedding turns each pair of a key's dimensions by an angle that depends on the position alone
(Su et al., RoFormer, arXiv:2104.09864).  So a key can be moved: turned back from the position where it was
seen and on to any other.  Angles come from the model's own rotary module, with whatever scaling it applies
(linear, dynamic, yarn, llama3, longrope).  Which dimensions form the pairs is found by trying: the same text
is read at two offsets, and in each layer the keys of one reading must be the moved keys of the other.

Letters: T tokens, D head_dim, n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from million_cli.hf.models import full_attention_layers
from million_cli.pq.codebook import Codebook
from million_cli.pq.rebase import LAYOUTS, Rebase, turn

KeyLayout = Literal["still", "halves", "neighbours"]

_LONGEST = 2048  # positions of a model whose configuration names no limit
_PROBE_TOKENS = 48
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Relative error below which a layer's keys count as moved; 0.1 for dtypes that round more."""


class Rotary:
    """How one model rotates the keys of its full-attention layers.

    Args:
        model: in evaluation mode.
        layouts: one for each layer, if known; otherwise the model reads two short texts to find them.

    Attributes:
        layouts: one for each full-attention layer: `halves` or `neighbours` (see `pq.rebase`); `still` where
            keys do not depend on the position; None where they depend on it in another way (learned
            positions) and cannot be moved.
    """

    def __init__(self, model: PreTrainedModel, layouts: Sequence[KeyLayout | None] | None = None) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._device = model.device
        self._modules = _modules(model)
        self._kinds = _kinds(self._config, full_attention_layers(model.config), self._modules)
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.context = int(getattr(self._config, "max_position_embeddings", None) or _LONGEST)
        self.layouts = list(layouts) if layouts is not None else self._probe(model)

    @property
    def movable(self) -> bool:
        """Whether the keys of all layers can be moved."""
        return None not in self.layouts

    def lengths(self, longest: int) -> tuple[int, ...]:
        """Lengths of texts up to `longest` whose angles differ.

        A single length, unless the scaling depends on the length of the text (dynamic, longrope).
        """
        parameters = _parameters(self._config)
        original = min(int(p.get("original_max_position_embeddings") or self.context) for p in parameters)
        if not self._by_length or original >= longest:
            return (longest,)
        if any(p.get("rope_type") == "longrope" for p in parameters):
            return original, longest
        steps = math.ceil(math.log2(longest / original))
        return (original, *(min(longest, original << step) for step in range(1, steps + 1)))

    @property
    def limit(self) -> int | None:
        """Positions for which `rebases` hold; None: all.  Dynamic scaling goes on changing with the text."""
        dynamic = any(p.get("rope_type") == "dynamic" for p in _parameters(self._config))
        return self.context if dynamic else None

    def covered(self, layer: int, rebase: Rebase) -> int | None:
        """Positions of this model that codes made for `rebase`, of another scaling, have seen; None: all.

        A pair of dimensions that turns faster here leaves the angles of the calibrated blocks, unless those
        went all the way round.
        """
        if rebase.same_angles(rebase.served(self.frequencies(layer), rebase.scale)):
            return None
        lengths = self.lengths(self.context)
        one = torch.tensor(1)
        fastest = torch.stack([self.angles(layer, one, length).cpu() for length in lengths]).amax(0)
        seen = rebase.frequencies * (rebase.every - 1)
        farther = (seen < 2 * torch.pi) & (fastest * (rebase.every - 1) > 1.01 * seen)
        if bool(farther.any()):
            return 1 + int((seen / fastest)[farther].min())
        return rebase.every if len(lengths) > 1 else None  # one set of origins, angles by length

    def angles(self, layer: int, positions: Tensor, length: int) -> Tensor:
        """Radians, float64 `[..., n]`, by which a layer turns keys at `positions [...]` of a text.

        Args:
            layer: counted among the full-attention layers; its keys must be turned.
            length: tokens of the text.
        """
        if not self._by_length:
            return positions.double()[..., None] * self._of_static(layer).to(positions.device)
        cos, sin = self._table(layer, length)
        at = positions.to(cos.device)
        return torch.atan2(sin[at], cos[at]).double().to(positions.device)

    def scale(self, layer: int) -> float:
        """The factor that a layer puts on the rotated dimensions of its keys."""
        cos, sin = self._table(layer, 2)
        return math.hypot(float(cos[0, 0]), float(sin[0, 0]))

    def frequencies(self, layer: int) -> Tensor:
        """Radians a token, float64 `[n]` on the CPU, in texts of the model's whole context."""
        if not self._by_length:
            return self._of_static(layer)
        return self.angles(layer, torch.tensor(1), self.context)

    def rebases(self, every: int) -> tuple[Rebase | None, ...]:
        """Blocks of `every` tokens for each full-attention layer; None for layers without rotation."""
        assert self.movable
        return tuple(
            None
            if layout is None or layout == "still"
            else Rebase(every, self.frequencies(layer), layout, self.scale(layer))
            for layer, layout in enumerate(self.layouts)
        )

    def to_origin(self, layer: int, keys: Tensor, positions: Tensor, length: int) -> Tensor:
        """Keys `[..., T, D]`, or their gradients, at `positions [T]` as they would be at position 0.

        The factor of the scaling stays on them.  length: of the text, as for `angles`.
        """
        layout = self.layouts[layer]
        assert layout is not None
        if layout == "still":
            return keys
        angles = self.angles(layer, positions, length)
        return turn(keys, angles.cos(), -angles.sin(), layout)

    @property
    def _by_length(self) -> bool:
        """Whether angles depend on the length of the text."""
        return any(p.get("rope_type") in ("dynamic", "longrope") for p in _parameters(self._config))

    def _of_static(self, layer: int) -> Tensor:
        cos, sin = self._table(layer, 2)
        return torch.atan2(sin[1].double(), cos[1].double()).cpu()

    def _table(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of a text, float32 `[positions, n]`."""
        key = self._kinds[layer], length
        if key not in self._tables:
            module, options = self._modules[key[0]]
            self._tables[key] = _cos_sin(module, options, length, self._device)
        return self._tables[key]

    @torch.no_grad()
    def _probe(self, model: PreTrainedModel) -> list[KeyLayout | None]:
        """Read a text at two offsets; see the module's head."""
        T = min(_PROBE_TOKENS, max(2, self.context // 2))
        shift = max(1, min(1021, self.context - T, self.lengths(self.context)[0] - T))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self._config.vocab_size, (1, T), generator=generator).to(model.device)
        here, there = (_keys(model, ids, offset) for offset in (0, shift))
        at = torch.arange(T, device=model.device)
        found: list[KeyLayout | None] = []
        for layer, (a, b) in enumerate(zip(here, there, strict=True)):
            errors: dict[KeyLayout, float] = {"still": _distance(a, b)}
            for layout in LAYOUTS if self._modules else ():
                old, new = (self.angles(layer, at + offset, T + shift) for offset in (0, shift))
                if 2 * old.shape[-1] <= a.shape[-1]:
                    moved = turn(a.double(), (new - old).cos(), (new - old).sin(), layout)
                    errors[layout] = _distance(moved, b)
            best = min(errors, key=lambda layout: errors[layout])
            found.append(best if errors[best] < _TOLERANCE.get(a.dtype, 0.1) else None)
        return found


def _modules(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The decoder's rotary modules with the layer type each is asked for; none if it has none of its own."""
    decoder: Any = model.get_decoder()
    owner = decoder if hasattr(decoder, "rotary_emb") else getattr(decoder, "model", None)  # Llama 4
    module = getattr(owner, "rotary_emb", None)
    if not isinstance(module, nn.Module):
        return []
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):  # a set of frequencies for each type of layer
        return [(module, {"layer_type": kind}) for kind in rope_type]
    return [(module, {})]


def _kinds(config: Any, layers: Sequence[int], modules: list[tuple[nn.Module, dict[str, Any]]]) -> list[int]:
    """For each full-attention layer, which of `_modules` serves it."""
    if len(modules) < 2:
        return [0] * len(layers)
    order = [options["layer_type"] for _, options in modules]
    return [order.index(config.layer_types[index]) for index in layers]


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The configuration's rope parameters, a mapping for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return nested or [parameters]


@torch.no_grad()
def _cos_sin(
    module: nn.Module, options: dict[str, Any], length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    probe = torch.zeros(1, 1, dtype=torch.float32, device=device)
    positions = torch.arange(length, device=device)[None]
    made = module(probe, positions, **options)
    if isinstance(made, Tensor) and made.is_complex():
        return made.real[0].float(), made.imag[0].float()
    cos, sin = (part[0].float() for part in made)
    half = cos.shape[1] // 2
    for first, second in ((slice(half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))):
        if 2 * half == cos.shape[1] and torch.equal(cos[:, first], cos[:, second]):  # each angle twice
            return cos[:, first].contiguous(), sin[:, first].contiguous()
    return cos, sin


def _keys(model: PreTrainedModel, ids: Tensor, offset: int) -> list[Tensor]:
    """Keys `[1, Hkv, T, D]` of each full-attention layer for a text that begins at position `offset`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)[None]
    model.get_decoder()(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    return [layers[index].keys for index in full_attention_layers(model.config)]


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative error of the median token: rounding may send a few tokens to other experts.

    Padding tokens are zero vectors in the first layer; they count as equal.
    """
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(torch.finfo(b.dtype).tiny)).median())


def served(codebook: Codebook, model: PreTrainedModel) -> Codebook:
    """The codebook for `model`, whose positions may be scaled in another way than the calibrated model's.

    Its card tells which positions of `model` the codes were made for.
    """
    rebases = codebook.keys.rebases
    if not any(rebases) or len(rebases) != len(full_attention_layers(model.config)):
        return codebook  # `Codebook.check` refuses it
    rotary = Rotary(model, ["still" if rebase is None else rebase.layout for rebase in rebases])
    ours = tuple(
        rebase and rebase.served(rotary.frequencies(layer), rotary.scale(layer))
        for layer, rebase in enumerate(rebases)
    )
    limits = [rotary.covered(layer, rebase) for layer, rebase in enumerate(rebases) if rebase]
    limits.append(rotary.limit)
    if all(a.same_angles(b) for a, b in zip(ours, rebases, strict=True) if a and b):
        limits.append(codebook.meta.positions)  # it may be of an earlier call
    positions = min((n for n in limits if n is not None), default=None)
    keys = replace(codebook.keys, rebases=ours)
    return replace(codebook, keys=keys, meta=replace(codebook.meta, positions=positions))
