"""The baseline: a static dense cache under the same engine, with torch's fastest attention.

Quantized caches are compared with it, so it must be the strongest baseline we can build: memory is taken
once, K and V of grouped heads are not repeated, a step reads only the tokens that are there, and the
attention is the fastest of torch's for the shape, found by timing them.

torch's attention takes the number of keys from the host.  So a captured step serves one length, and without
padding each length has its own graph (`bucket=1`).  With padding, or larger buckets, the keys of a bucket are
masked, which excludes flash attention.

Letters: B batch, Hq/Hkv query and KV heads, G = Hq / Hkv, T tokens, D head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from million_cli.cache.modes import plain_no_grad
from million_cli.errors import UserError
from million_cli.hf.models import full_attention_layers
from million_cli.hf.step import new_marker


class DenseLayer(CacheLayerMixin):
    """K and V `[B, Hkv, capacity, D]`; the host knows how many tokens they hold."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    @plain_no_grad
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, Hkv, _, D = key_states.shape
        self.keys = key_states.new_zeros(B, Hkv, self.capacity, D)
        self.values = value_states.new_zeros(B, Hkv, self.capacity, D)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, N, D]`; returns the keys and values that the N queries attend to.

        Raises:
            UserError: the cache is full, or holds another batch.
        """
        held = self.keys.shape[0] if self.is_initialized and self.keys is not None else None
        if held is None or (held != key_states.shape[0] and not self.length):
            self.lazy_initialization(key_states, value_states)
        elif held != key_states.shape[0]:
            raise UserError(f"batch={key_states.shape[0]}: this cache holds a batch of {held}")
        assert self.keys is not None
        assert self.values is not None
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.capacity:
            raise UserError(f"{end} tokens: this cache was made for {self.capacity}")
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        if start == 0:
            return key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    def crop(self, tokens_to_remove: int) -> None:
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.length = 0


class DenseCache(Cache):
    """A static dense cache of `max_length` tokens a sequence, exactly.

    Raises:
        UserError: the model has layers without full attention.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        text_config = model.config.get_text_config(decoder=True)
        count = text_config.num_hidden_layers
        if len(full_attention_layers(model.config)) != count:
            raise UserError(
                f"model_type={text_config.model_type}: layers with sliding windows; accepted for the dense "
                "engine is full attention in every layer"
            )
        self.config, self.dtype = text_config, model.dtype
        super().__init__(layers=[DenseLayer(max_length) for _ in range(count)])

    @property
    def held(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer that holds any."""
        return [
            (layer.keys, layer.values)
            for layer in self.layers
            if isinstance(layer, DenseLayer) and layer.keys is not None and layer.values is not None
        ]

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors held: `total`."""
        return {"total": sum(keys.nbytes + values.nbytes for keys, values in self.held)}


def engine_cache(model: PreTrainedModel, max_length: int) -> Cache:
    """The dense cache that serves a model best under the engine.

    Returns:
        A `DenseCache` of `max_length` tokens, or transformers' own where some layers have sliding windows.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(full_attention_layers(model.config)) == layers:
        return DenseCache(model, max_length)
    return DynamicCache(config=model.config)


@dataclass(frozen=True)
class Attention:
    """One way for torch to attend with one query token a sequence.

    Attributes:
        backend: backend of torch's scaled dot product attention; None lets torch choose.
        packed: pass the G query heads of a KV head as G tokens of one head, instead of `enable_gqa`.
    """

    backend: SDPBackend | None = None
    packed: bool = True

    def __str__(self) -> str:
        name = "default" if self.backend is None else self.backend.name.removesuffix("_ATTENTION").lower()
        return name if self.packed else f"{name} gqa"

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """query `[B, Hq, D]`; keys, values `[B, Hkv, T, D]`; mask bool `[B, 1, 1, T]` -> `[B, Hq, D]`."""
        B, Hq, D = query.shape
        G = Hq // keys.shape[1]
        q = query.view(B, -1, G, D) if self.packed else query[:, :, None]
        options: dict[str, Any] = {"attn_mask": mask, "scale": scale, "enable_gqa": not self.packed and G > 1}
        if self.backend is None:
            output = F.scaled_dot_product_attention(q, keys, values, **options)
        else:
            with sdpa_kernel(self.backend):
                output = F.scaled_dot_product_attention(q, keys, values, **options)
        return output.reshape(B, Hq, D)


_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class DenseSteps:
    """`Steps` of a `DenseCache`.

    Args:
        cache: empty.
        query_heads: Hq.
        device: where all its layers are.
        bucket: the number of keys that a step reads is a multiple of so many tokens.

    Attributes:
        attention: the attention in use; chosen when the first step is prepared, on a GPU by timing.
    """

    def __init__(self, cache: DenseCache, query_heads: int, device: torch.device, bucket: int = 1) -> None:
        self.cache, self.bucket = cache, bucket
        self.marker = new_marker(self, device)
        self.attention: Attention | None = None
        self._query_heads = query_heads
        self._length = torch.zeros(1, dtype=torch.int64, device=device)  # before a step: where its token goes
        self._extent = 0  # keys that the step being launched reads
        self._first_valid: Tensor | None = None
        self._mask: Tensor | None = None  # of the step being launched

    @property
    def _layers(self) -> list[DenseLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, DenseLayer)]

    def expect(self, length: int) -> None:
        if length > self._layers[0].capacity:
            raise UserError(f"{length} tokens: this cache was made for {self._layers[0].capacity}")

    def begin(self, first_valid: Tensor | None) -> None:
        self._first_valid = first_valid
        self._length.fill_(self._layers[0].length)

    def rewind(self, length: int) -> None:
        """Forget all but the oldest `length` tokens."""
        for layer in self._layers:
            layer.length = length
        self._length.fill_(length)

    def ready(self) -> Hashable | None:
        layer = self._layers[0]
        if layer.length >= layer.capacity:
            raise UserError(f"{layer.length + 1} tokens: this cache was made for {layer.capacity}")
        extent = min(layer.capacity, -(-(layer.length + 1) // self.bucket) * self.bucket)
        self._extent = extent
        return (extent, *(keys.data_ptr() for keys, _ in self.cache.held))

    def prepare(self, key: Hashable) -> None:
        """Choose the attention, and let its library plan for this number of keys."""
        keys, values = self.cache.held[0]
        B, _, _, D = keys.shape
        query = keys.new_zeros(B, self._query_heads, D)
        mask = self._make_mask(self._first_valid)
        if self.attention is None:
            self.attention = self._fastest(query, mask) if keys.device.type == "cuda" else Attention()
        self.attention(query, *self._seen(keys, values), mask, 1.0)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, first_valid: Tensor | None, scale: float
    ) -> Tensor:
        keys, values = self.cache.held[layer]
        if layer == 0:
            self._mask = self._make_mask(first_valid)
        keys.index_copy_(2, self._length, key[:, :, None])
        values.index_copy_(2, self._length, value[:, :, None])
        attention = self.attention or Attention()
        output = attention(query, *self._seen(keys, values), self._mask, scale)
        if layer == len(self._layers) - 1:
            self._length.add_(1)
        return output

    def advance(self) -> None:
        for layer in self._layers:
            layer.length += 1

    def _seen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys[:, :, : self._extent], values[:, :, : self._extent]

    def _make_mask(self, first_valid: Tensor | None) -> Tensor | None:
        """Which of the keys read are tokens of the text: bool `[B or 1, 1, 1, extent]`, None for all."""
        if self.bucket == 1 and first_valid is None:
            return None
        positions = torch.arange(self._extent, device=self._length.device)
        mask = (positions <= self._length)[None]
        if first_valid is not None:
            mask = mask & (positions >= first_valid[:, None])
        return mask[:, None, None]

    def _fastest(self, query: Tensor, mask: Tensor | None) -> Attention:
        """Time every way on all layers, so that the GPU's caches favour none."""
        G = query.shape[1] // self.cache.held[0][0].shape[1]
        ways = [
            Attention(backend, packed)
            for backend in _BACKENDS
            for packed in ((True, False) if G > 1 else (True,))
        ]
        times: dict[Attention, float] = {}
        for way in ways:

            def launch(way: Attention = way) -> None:
                for keys, values in self.cache.held:
                    way(query, *self._seen(keys, values), mask, 1.0)

            try:
                with warnings.catch_warnings():  # of why a backend does not serve the shape
                    warnings.simplefilter("ignore")
                    times[way] = _time(launch)
            except RuntimeError:
                continue
        return min(times, key=times.__getitem__) if times else Attention()


def _time(launch: Callable[[], None]) -> float:
    """Milliseconds of one replay of `launch`, the better of three."""
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch()
    best = float("inf")
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best
