"""Caches filled with random tokens instead of a prompt, to time decode steps without the prefill."""

from __future__ import annotations

import torch

from million_cli.cache.store import CodeStore
from million_cli.engine.dense import DenseCache, DenseLayer
from million_cli.engine.engine import Engine
from million_cli.hf.pq_cache import PQCache

CHUNK = 4096
"""Tokens that are appended at once to a cache without steps."""


@torch.no_grad()
def fill(engine: Engine, batch: int, length: int, new_tokens: int = 0) -> None:
    """Let an engine's empty cache hold `length` random tokens in each of `batch` sequences.

    Args:
        new_tokens: steps that will follow; memory is taken for them at once.

    Raises:
        UserError: the cache is too small for the tokens.
    """
    if engine.steps is None:
        _append_random(engine, batch, length)
        engine.begin(length, torch.zeros(batch, dtype=torch.int64, device=engine.device))
        return
    engine.steps.expect(length + new_tokens)
    if isinstance(engine.cache, DenseCache):
        _fill_dense(engine.cache, batch, length, engine.device)
    else:
        assert isinstance(engine.cache, PQCache)
        query = engine.cache.kv_shape
        D = query.specs[0].keys.head_dim
        two = torch.zeros(batch, query.num_kv_heads, 2, D, dtype=query.dtype, device=engine.device)
        for position in range(engine.cache.store.num_layers):
            engine.cache.append(position, two, two)  # the store learns batch, dtype and device
        fill_store(engine.cache.store, length)
    engine.begin(length, torch.zeros(batch, dtype=torch.int64, device=engine.device))


def fill_store(store: CodeStore, length: int) -> None:
    """Let a store that was appended to hold `length` random tokens a sequence: codes and windows."""
    store.reserve(length)
    for layer in range(store.num_layers):
        tensors = store.device_layer(layer)
        tensors.key_codes.random_(), tensors.value_codes.random_()
        tensors.key_window.normal_(), tensors.value_window.normal_()
    store.advance(length - store.length())


def _append_random(engine: Engine, batch: int, length: int) -> None:
    """Append random K and V to each layer of a cache without steps, in chunks of at most `CHUNK` tokens."""
    config = engine.model.config.get_text_config(decoder=True)
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        for start in range(0, length, CHUNK):
            shape = batch, config.num_key_value_heads, min(CHUNK, length - start), D
            keys, values = (torch.randn(shape, device=engine.device).to(engine.model.dtype) for _ in range(2))
            engine.cache.update(keys, values, layer)


def _fill_dense(cache: DenseCache, batch: int, length: int, device: torch.device) -> None:
    config = cache.config
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    one = torch.zeros(batch, config.num_key_value_heads, 1, D, dtype=cache.dtype, device=device)
    for layer in cache.layers:
        assert isinstance(layer, DenseLayer)
        layer.lazy_initialization(one, one)
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys.normal_(), layer.values.normal_()
        layer.length = length
