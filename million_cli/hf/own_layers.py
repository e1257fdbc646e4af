"""transformers' own cache layers beside the coded ones: sliding windows, and states of linear attention.

A linear-attention layer keeps states of a fixed size: the inputs of a short convolution, and mostly
also a recurrent state, which no crop can take back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from million_cli.errors import UserError

ACCEPTED = (DynamicSlidingWindowLayer, LinearAttentionLayer)
"""Types of layers that stay as they are beside coded ones."""
_STATES = ("conv_states", "recurrent_states")


def is_linear(layer: Any) -> bool:
    """Whether a layer keeps states of linear attention, alone or with K and V."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """The tensors of a layer that the next token depends on, by name.

    `keys` and `values`, or `conv_states.<i>` and `recurrent_states.<i>`.
    """
    held = {side: getattr(layer, side, None) for side in ("keys", "values")}
    if is_linear(layer):
        for name in _STATES:
            held.update({f"{name}.{i}": state for i, state in getattr(layer, name).items()})
        for i, size in layer.conv_kernel_size.items():
            if size is not None:  # more are kept for a crop, after `activate_past_recording`
                held[f"conv_states.{i}"] = layer.conv_states[i][..., -size:]
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def reset_cache(cache: Cache) -> None:
    """Empty a cache of any kind; see `reset_layer`."""
    cache.reset()
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) or is_linear(layer):
            reset_layer(layer)


def reset_layer(layer: Any) -> None:
    """Empty one of transformers' own layers, so that the next text may come in another batch.

    `reset` of 5.17 fills keys and values with zeros but keeps their length, so that a reused cache would
    attend to as many zeros; later versions drop the tensors as this does.  States of linear attention keep
    their batch in all versions; here they are dropped too.
    """
    if is_linear(layer):
        for i in range(layer.number_of_states):
            layer.conv_states[i] = layer.recurrent_states[i] = layer.conv_kernel_size[i] = None
            layer.is_conv_states_initialized[i] = layer.is_recurrent_states_initialized[i] = False
            layer.has_previous_state[i] = False
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False
    if hasattr(layer, "cumulative_length"):  # sliding windows, quantized layers
        layer.cumulative_length = 0


def crop_layers(layers: list[Any], length: int, removed: int) -> None:
    """Remove the newest `removed` of `length` tokens from each of the layers, or from none.

    Raises:
        UserError: a layer that no longer holds the state before them.
    """
    if 0 < removed < length and not all(_goes_back(layer, length, removed) for layer in layers):
        raise UserError(
            f"a crop by {removed} tokens: linear attention and sliding windows keep no earlier states; "
            "accepted are 0, the whole text, and with windows and convolutions alone what was read since "
            "activate_past_recording()"
        )
    for layer in layers:
        if removed >= length:
            reset_layer(layer)
        elif removed or layer.record_past:  # a crop by 0 ends a recording
            layer.crop(-removed)


def _goes_back(layer: Any, length: int, removed: int) -> bool:
    """Whether what a layer held before the newest `removed` of `length` tokens is all there."""
    if not is_linear(layer):
        window = layer.sliding_window - 1
        held = layer.get_seq_length() < layer.sliding_window or layer.record_past
        return held and layer.keys.shape[-2] >= min(length, window + removed)
    return (
        layer.record_past
        and layer.is_croppable
        and all(
            layer.conv_states[i].shape[-1] >= layer.conv_kernel_size[i] + removed
            for i in range(layer.number_of_states)
        )
    )


def take_sequences(layer: Any, indices: Tensor) -> None:
    """Keep the sequences `indices` of a layer, in that order, repeats allowed."""
    if is_linear(layer):  # it has no `batch_select_indices`, and `reorder_cache` takes any indices
        if layer.device is None:
            layer.device = indices.device
        layer.reorder_cache(indices)
    else:
        layer.batch_select_indices(indices)


def repeat_sequences(layer: Any, repeats: int) -> None:
    """Each sequence of a layer becomes `repeats` neighbouring copies."""
    if not is_linear(layer):
        layer.batch_repeat_interleave(repeats)
    elif states := tensors_of(layer):
        batch = next(iter(states.values())).shape[0]
        take_sequences(layer, torch.arange(batch).repeat_interleave(repeats))


def restore_layer(layer: Any, tensors: dict[str, Tensor], length: int) -> None:
    """Fill an empty layer with the result of `tensors_of` after a text of `length` tokens."""
    if not is_linear(layer):
        keys, values = tensors["keys"], tensors["values"]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
        return
    for name, tensor in tensors.items():
        kind, _, i = name.partition(".")
        index = range(layer.number_of_states)[int(i)]
        layer.lazy_initialization(**{kind: tensor}, state_idx=index)
        getattr(layer, kind)[index] = tensor
        layer.has_previous_state[index] = True
