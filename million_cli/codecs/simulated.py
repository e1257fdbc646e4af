"""A cache whose old pages went through a codec: it shows the cost in quality, not in memory or time.

The rules are those of `cache.store.CodeStore`: after every append the oldest `coded_length(length)` tokens
are as storage returns them, the others are exact, and each query has its own boundary between the two.  All
of it is differentiable if the codec is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from million_cli.codecs.codec import Codec
from million_cli.errors import UserError
from million_cli.hf.attention import PQHandle
from million_cli.hf.models import full_attention_layers
from million_cli.hf.own_layers import reset_layer
from million_cli.hf.switch import use_pq_attention
from million_cli.hf.trial import parts_of, refuse_parts
from million_cli.ops.masked import masked_attention
from million_cli.pq.rebase import Rebase
from million_cli.spec import WindowSpec

Observe = Callable[[Tensor, Tensor, int], None]
"""Called with the new K and V of a layer, and how many tokens it held before."""


@dataclass(frozen=True)
class SimulatedView:
    """Keys and values for the N newest tokens of a layer; the counterpart of `cache.view.KVView`.

    stored_keys, stored_values: `[B, Hkv, coded, D]`, from storage; keys, values: `[B, Hkv, _, D]`, the exact
    ones of the tokens boundaries[0] .. length - 1; boundaries: N counts, query i sees stored tokens
    below its own.
    """

    stored_keys: Tensor
    stored_values: Tensor
    keys: Tensor
    values: Tensor
    boundaries: Sequence[int]
    length: int
    device_layer: None = None  # no kernel reads it

    @property
    def coded(self) -> int:
        return self.stored_keys.shape[2]


def attend(
    query: Tensor,
    view: Any,
    *,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention `[B, Hq, N, D]` of the newest tokens over a `SimulatedView`."""
    return masked_attention(
        query,
        (view.stored_keys, view.stored_values),
        (view.keys, view.values),
        boundaries=view.boundaries,
        scale=scale,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
    )


class SimulatedLayer(CacheLayerMixin):
    """One full-attention layer: stored tokens, then exact ones."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        codec: Codec,
        window: WindowSpec,
        exact_prefill: bool,
        check: Callable[[int, int], None],
        observe: Observe | None = None,
    ) -> None:
        """check: is called before an append, with the tokens held and the new ones."""
        super().__init__()
        self._check = check
        self._codec, self._window, self._exact_prefill = codec, window, exact_prefill
        self._observe = observe
        self._parts: list[Tensor] = []  # stored keys and values, exact keys and values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        empty = key_states[:, :, :0]
        self._parts, self.is_initialized = [empty] * 4, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:  # a pair of handles; transformers' annotation says tensors
        """Append `[B, Hkv, N, D]`; the handle stands for K and for V in the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(self.get_seq_length(), key_states.shape[2])
        if self._observe is not None:
            self._observe(key_states, value_states, self.get_seq_length())
        stored_k, stored_v, k, v = self._parts
        coded, start = stored_k.shape[2], self.get_seq_length()
        k, v = torch.cat([k, key_states], 2), torch.cat([v, value_states], 2)
        end = start + key_states.shape[2]
        new = self._window.coded_length(end) - coded
        if new:
            stored_k = torch.cat([stored_k, self._coded_keys(k[:, :, :new], coded)], 2)
            stored_v = torch.cat([stored_v, self._through(self._codec.values, v[:, :, :new])], 2)
        if self._exact_prefill and end - start > 1:
            boundaries = [coded] * (end - start)
        else:
            boundaries = [self._window.coded_length(t + 1) for t in range(start, end)]
        skipped, seen = boundaries[0] - coded, boundaries[-1]
        view = SimulatedView(
            stored_k[:, :, :seen],
            stored_v[:, :, :seen],
            k[:, :, skipped:],
            v[:, :, skipped:],
            boundaries,
            end,
        )
        self._parts = [stored_k, stored_v, k[:, :, new:], v[:, :, new:]]
        handle = PQHandle(view, attend)  # type: ignore[arg-type]  # it reads what both views have
        return handle, handle

    def _coded_keys(self, keys: Tensor, start: int) -> Tensor:
        rebase: Rebase | None = getattr(self._codec, "rebase", None)
        if rebase is None:
            return self._through(self._codec.keys, keys)
        return rebase.absolute(self._through(self._codec.keys, rebase.relative(keys, start)), start)

    def _through(self, codec: Any, x: Tensor) -> Tensor:
        stored: Tensor = codec(x.unflatten(2, (-1, self._window.page_size)))
        return stored.flatten(2, 3)

    def get_seq_length(self) -> int:
        return self._parts[0].shape[2] + self._parts[2].shape[2] if self._parts else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._parts, self.is_initialized = [], False

    def crop(self, max_length: int) -> None:
        raise UserError("a simulated cache cannot be cropped; accepted are PQ and dense caches")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes a copy of sequence beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self._parts = [part.index_select(0, indices.to(part.device)) for part in self._parts]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` neighbouring copies."""
        self._parts = [part.repeat_interleave(repeats, 0) for part in self._parts]


class SimulatedCache(Cache):
    """A cache for a codec; layers of sliding windows and of linear attention are transformers' own.

    Args:
        model: to serve; while this cache goes through it, it uses our attention function.
        codec: the codec of all full-attention layers, or one for each.
        window: page size and residual window.
        prefill: as for `DynamicPQCache`.
        observe: called with the position of a full-attention layer, its new K and V, and how many tokens it
            held before.

    Attributes:
        bits: of a stored element, scales and zero points included.

    Raises:
        UserError: an unsupported architecture.
    """

    needs_pq_attention = True  # read by `hf.switch`

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec | Sequence[Codec],
        window: WindowSpec | None = None,
        *,
        prefill: Literal["exact", "quantized"] = "exact",
        observe: Callable[[int, Tensor, Tensor, int], None] | None = None,
    ) -> None:
        use_pq_attention(model)
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        check = partial(refuse_parts, parts_of(model), model.config.model_type)
        full = full_attention_layers(model.config)
        codecs = codec if isinstance(codec, Sequence) else [codec] * len(full)
        self.bits = fmean(codec.bits for codec in codecs)
        for position, (index, one) in enumerate(zip(full, codecs, strict=True)):
            told = None if observe is None else partial(observe, position)
            layers[index] = SimulatedLayer(one, window or WindowSpec(), prefill == "exact", check, told)
        super().__init__(layers=layers)

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            if isinstance(layer, SimulatedLayer):
                layer.reset()
            else:
                reset_layer(layer)
