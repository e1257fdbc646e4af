"""The places where transformers 5.17 to 5.23 differ and a cache has to care."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicLayer


def tokens_to_remove(argument: int, length: int) -> int:
    """The number of tokens that `Cache.crop(argument)` removes from a cache of `length` tokens.

    A negative argument removes that many tokens, in every version.  A positive one is the length to keep:
    5.17 still accepts it as deprecated, 5.18 and later refuse it in their own layers.  Ours accept both,
    and pass on the negative form, which all versions understand.

    >>> tokens_to_remove(-3, 10), tokens_to_remove(8, 10), tokens_to_remove(12, 10)
    (3, 2, 0)
    """
    if argument > 0:
        return max(0, length - argument)
    return min(-argument, length)


def reset_cache(cache: Cache) -> None:
    """Empty a cache of any kind; see `reset_dense_layer`."""
    cache.reset()
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            reset_dense_layer(layer)


def reset_dense_layer(layer: Any) -> None:
    """Empty one of transformers' own dynamic layers.

    `reset` of 5.17 fills the tensors with zeros but keeps their length, so that a reused cache would attend
    to as many zeros; later versions drop the tensors as this does.
    """
    layer.keys = layer.values = None
    layer.is_initialized = False
    if hasattr(layer, "cumulative_length"):  # sliding windows, quantized layers
        layer.cumulative_length = 0
