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

_SCORE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # scores alive at once


@dataclass(frozen=True)
class SimulatedView:
    """What the N newest tokens of a layer attend to; the counterpart of `cache.view.KVView`.

    stored_keys, stored_values: `[B, Hkv, coded, D]`, from storage; keys, values: `[B, Hkv, _, D]`, the exact
    ones of the tokens boundaries[0] .. length - 1; boundaries: [N], query i sees stored tokens below its own.
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

    Arguments as in `cache.view.attend`; arithmetic in float32, float64 if the query is.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    B, Hq, N, _ = query.shape
    keys = torch.cat([view.stored_keys, view.keys], 2).to(dtype)
    values = torch.cat([view.stored_values, view.values], 2).to(dtype)
    first = int(view.boundaries[0])
    tokens = torch.arange(view.length, device=query.device)
    tokens = torch.cat([tokens[: view.coded], tokens[first:]])  # position of each column
    is_stored = torch.arange(len(tokens), device=query.device) < view.coded
    positions = torch.arange(view.length - N, view.length, device=query.device)
    grouped = query.to(dtype).unflatten(1, (keys.shape[1], -1)) * scale  # [B, Hkv, G, N, D]

    def attend_rows(grouped: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        scores = torch.einsum("bhgnd,bhtd->bhgnt", grouped[..., rows, :], keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = is_stored == (tokens < view.boundaries[rows, None])
        if mask is None:
            seen = seen & (tokens <= positions[rows, None])
        else:
            part = mask[:, :, rows][..., tokens]
            part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, scores.shape[1:3])
            if part.dtype == torch.bool:
                seen = seen & part
            else:
                scores = scores + part
        weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1)
        return torch.einsum("bhgnt,bhtd->bhgnd", weights, values)

    most = _SCORE_ELEMENTS.get(query.device.type, 1 << 22)
    blocks = torch.arange(N, device=query.device).split(max(1, most // (B * Hq * len(tokens))))
    if torch.is_grad_enabled():  # scores are computed again for the backward pass, not kept
        outputs = [checkpoint(attend_rows, grouped, keys, values, b, use_reentrant=False) for b in blocks]
    else:
        outputs = [attend_rows(grouped, keys, values, rows) for rows in blocks]
    return torch.cat(outputs, 3).flatten(1, 2).to(query.dtype)


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
            torch.tensor(boundaries, device=k.device),
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
