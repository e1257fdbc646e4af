"""A cache whose old pages have been through a codec: what it costs in quality, not in memory or time.

The rules are those of `cache.store.CodeStore`: after every append the oldest `coded_length(length)` tokens
are as storage gives them back, the rest is exact, and a query sees its own boundary between the two.  All of
it is differentiable, for a codec that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from million_cli.codecs.codec import Codec
from million_cli.errors import UserError
from million_cli.hf.attention import PQHandle
from million_cli.hf.compat import reset_dense_layer
from million_cli.hf.models import full_attention_layers
from million_cli.hf.switch import use_pq_attention
from million_cli.spec import WindowSpec

_ROWS = {"cpu": 256, "cuda": 1024}
"""Queries of a block: all of it is masked alike, and columns that no query of a block sees are left out."""


@dataclass(frozen=True)
class SimulatedView:
    """What the N newest tokens of a layer attend to; the counterpart of `cache.view.KVView`.

    stored_keys, stored_values: `[B, Hkv, coded, D]`, from storage; keys, values: `[B, Hkv, _, D]`, the exact
    ones of the tokens boundaries[0] .. length - 1; boundaries: [N] on the CPU, query i sees stored
    tokens below its own.
    """

    stored_keys: Tensor
    stored_values: Tensor
    keys: Tensor
    values: Tensor
    boundaries: Tensor
    length: int
    device_layer: None = None  # no kernel reads it

    @property
    def coded(self) -> int:
        return self.stored_keys.shape[2]


def attend(query: Tensor, view: Any, *, scale: float, mask: Tensor | None, softcap: float | None) -> Tensor:
    """Attention `[B, Hq, N, D]` of the newest tokens over a `SimulatedView`: one softmax over both parts.

    Arguments as in `cache.view.attend`.  The arithmetic is that of torch's scaled dot product attention.
    """
    N, Hkv = query.shape[2], view.keys.shape[1]
    first, start = int(view.boundaries[0]), view.length - N

    def attend_rows(
        q: Tensor, stored_k: Tensor, stored_v: Tensor, k: Tensor, v: Tensor, rows: slice
    ) -> Tensor:
        boundaries = view.boundaries[rows, None]
        stored, exact = int(boundaries[-1]), int(boundaries[0])
        boundaries = boundaries.to(q.device)
        end = view.length if mask is not None else start + rows.stop
        keys = torch.cat([stored_k[:, :, :stored], k[:, :, exact - first : end - first]], 2)
        values = torch.cat([stored_v[:, :, :stored], v[:, :, exact - first : end - first]], 2)
        tokens = torch.cat([torch.arange(stored), torch.arange(exact, end)]).to(q.device)
        is_stored = torch.arange(len(tokens), device=q.device) < stored
        seen = (is_stored == (tokens < boundaries))[None, None]  # [1, 1, n, columns]
        if mask is None:
            seen = seen & (tokens <= torch.arange(start + rows.start, end, device=q.device)[:, None])
        # A group's heads are rows of one head, so K and V are not repeated.
        grouped = q.unflatten(1, (Hkv, -1))  # [B, Hkv, G, n, D]
        bias: Tensor = seen[:, :, None]
        if mask is not None:
            part = mask[:, :, rows][..., tokens]
            part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, (Hkv, -1))
            if part.dtype == torch.bool:
                bias = bias & part
            else:
                bias = part.masked_fill(~bias, torch.finfo(part.dtype).min)
        if bias.dtype == torch.bool:
            bias = bias | ~bias.any(-1, keepdim=True)  # what sees nothing (padding) stays finite
        bias = bias.expand(*bias.shape[:2], *grouped.shape[2:4], -1).flatten(2, 3)
        if softcap is None:
            output = F.scaled_dot_product_attention(grouped.flatten(2, 3), keys, values, bias, scale=scale)
        else:
            output = _softcapped(grouped.flatten(2, 3), keys, values, bias, scale, softcap)
        return output.view_as(grouped).flatten(1, 2)

    outputs = []
    size = _ROWS.get(query.device.type, 256)
    for rows in (slice(i, min(i + size, N)) for i in range(0, N, size)):
        parts = (query[:, :, rows], view.stored_keys, view.stored_values, view.keys, view.values, rows)
        if torch.is_grad_enabled():  # scores are computed again for the backward pass, not kept
            outputs.append(checkpoint(attend_rows, *parts, use_reentrant=False))
        else:
            outputs.append(attend_rows(*parts))
    return torch.cat(outputs, 2)


def _softcapped(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention with scores softcap * tanh(scores / softcap), which torch's has not: `[B, Hkv, G n, D]`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = softcap * torch.tanh(q.to(dtype) @ keys.to(dtype).mT * (scale / softcap))
    seen = bias.dtype == torch.bool
    scores = scores.masked_fill(~bias, torch.finfo(dtype).min) if seen else scores + bias
    return (scores.softmax(-1) @ values.to(dtype)).to(q.dtype)


class SimulatedLayer(CacheLayerMixin):
    """One full-attention layer: stored tokens, then exact ones."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, codec: Codec, window: WindowSpec, exact_prefill: bool) -> None:
        super().__init__()
        self._codec, self._window, self._exact_prefill = codec, window, exact_prefill
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
        stored_k, stored_v, k, v = self._parts
        coded, start = stored_k.shape[2], self.get_seq_length()
        k, v = torch.cat([k, key_states], 2), torch.cat([v, value_states], 2)
        end = start + key_states.shape[2]
        new = self._window.coded_length(end) - coded
        if new:
            stored_k = torch.cat([stored_k, self._through(self._codec.keys, k[:, :, :new])], 2)
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
            torch.tensor(boundaries),
            end,
        )
        self._parts = [stored_k, stored_v, k[:, :, new:], v[:, :, new:]]
        handle = PQHandle(view, attend)  # type: ignore[arg-type]  # it reads what both views have
        return handle, handle

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
        """Sequence i becomes what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self._parts = [part.index_select(0, indices.to(part.device)) for part in self._parts]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` neighbouring copies."""
        self._parts = [part.repeat_interleave(repeats, 0) for part in self._parts]


class SimulatedCache(Cache):
    """A cache for a codec; sliding-window layers are transformers' own, dense.

    Args:
        model: to serve; while this cache goes through it, it uses our attention function.
        codec: what becomes of pages; one for all full-attention layers, or one for each.
        window: page size and residual window.
        prefill: as for `DynamicPQCache`.

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
    ) -> None:
        use_pq_attention(model)
        layers = DynamicCache(config=model.config).layers
        full = full_attention_layers(model.config)
        codecs = codec if isinstance(codec, Sequence) else [codec] * len(full)
        self.bits = fmean(codec.bits for codec in codecs)
        for index, one in zip(full, codecs, strict=True):
            layers[index] = SimulatedLayer(one, window or WindowSpec(), prefill == "exact")
        super().__init__(layers=layers)

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            if isinstance(layer, SimulatedLayer):
                layer.reset()
            else:
                reset_dense_layer(layer)
