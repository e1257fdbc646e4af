"""Trials with a short text: whether a model works with a cache that is not transformers' own.

Some models with linear attention forget between passes: transformers' Jamba starts each pass of several
tokens with an empty recurrent state.  Some models do more with keys and values than attend to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from million_cli.errors import UserError
from million_cli.hf.attention import PQHandle
from million_cli.hf.models import full_attention_layers
from million_cli.hf.own_layers import is_linear
from million_cli.hf.switch import use_pq_attention

_KEY = "_million_parts"
_TOKENS, _READ_FIRST = 32, 24
_TOLERANCE = {torch.float16: 0.1, torch.bfloat16: 0.1}
_EXACT_TOLERANCE = 0.01


@dataclass(frozen=True)
class Parts:
    """in_two: a text may be read in passes of several tokens; in_steps: token by token after a first pass."""

    in_two: bool = True
    in_steps: bool = True


def parts_of(model: PreTrainedModel) -> Parts:
    """In which parts `model` can read a text.

    Raises:
        UserError: not even token by token, so no cache serves it.
    """
    known: Parts | None = model.__dict__.get(_KEY)
    if known is None:
        known = model.__dict__[_KEY] = _try_parts(model)
    if not known.in_steps:
        raise UserError(
            f"model_type={model.config.model_type}: token by token, with transformers' own cache, it gives "
            "other logits than for the whole text, so no cache serves it"
        )
    return known


def refuse_parts(parts: Parts, model_type: str, held: int, new: int) -> None:
    """Raise unless `new` tokens after `held` ones give the logits of the whole text.

    Raises:
        UserError: the model forgets its state before several tokens.
    """
    if held and new > 1 and not parts.in_two:
        raise UserError(
            f"model_type={model_type}: {new} tokens after {held}: its linear layers forget what they read "
            "before several tokens; accepted is a text in one piece, then token by token"
        )


@torch.no_grad()
def check_served(model: PreTrainedModel) -> None:
    """Check that a PQ cache serves `model`: with handles in place of K and V it gives its own logits.

    Raises:
        UserError: it uses K and V, or its attention function, for more than attention.
    """
    parts_of(model)
    use_pq_attention(model)
    ids = _random_ids(model)
    ours, own = _logits(model, [ids], _HandleCache(model)), _logits(model, [ids])
    if not _distance(ours, own) < _tolerance(model):
        raise UserError(
            f"model_type={model.config.model_type}: attention over codes gives other logits than its own "
            "attention; accepted are models with plain attention"
        )


class _HandleLayer(DynamicLayer):
    """Exact keys and values behind a handle."""

    device_layer = None
    coded = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states)
        handle = PQHandle(self, _attend)  # type: ignore[arg-type]  # it has what is read of a view
        return handle, handle

    @property
    def length(self) -> int:
        return self.get_seq_length()


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("nothing is coded")


class _HandleCache(Cache):
    needs_pq_attention = True  # read by `hf.switch`

    def __init__(self, model: PreTrainedModel) -> None:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        for index in full_attention_layers(model.config):
            layers[index] = _HandleLayer()
        super().__init__(layers=layers)


@torch.no_grad()
def _try_parts(model: PreTrainedModel) -> Parts:
    config = model.config.get_text_config(decoder=True)
    if not any(is_linear(layer) for layer in DynamicCache(config=config).layers):
        return Parts()
    ids = _random_ids(model)
    whole = _logits(model, [ids])
    first, rest = ids[:, :_READ_FIRST], ids[:, _READ_FIRST:]
    return Parts(
        _distance(_logits(model, [first, rest]), whole) < _tolerance(model),
        _distance(_logits(model, [first, *rest.split(1, 1)]), whole) < _tolerance(model),
    )


def _random_ids(model: PreTrainedModel) -> Tensor:
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, _TOKENS), generator=generator).to(model.device)


def _logits(model: PreTrainedModel, parts: list[Tensor], cache: Cache | None = None) -> Tensor:
    """Logits `[T, V]` of the tokens after the first part."""
    cache = cache or DynamicCache(config=model.config.get_text_config(decoder=True))
    outputs = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(outputs, 1)[0, _READ_FIRST:].double()


def _tolerance(model: PreTrainedModel) -> float:
    return _TOLERANCE.get(model.dtype, _EXACT_TOLERANCE)


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative error of a typical token: rounding may send a few to other experts."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())
