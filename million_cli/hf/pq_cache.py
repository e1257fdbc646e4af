"""The common base of the PQ caches, and their layers.

Long because a fallback may replace store and compute at any call: all calls share that state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.graph_steps import GraphSteps
from million_cli.cache.modes import refuse_gradients
from million_cli.cache.page_manager import PagePoolExhausted
from million_cli.cache.paged import PagedStore
from million_cli.cache.store import CodeStore
from million_cli.cache.view import KVView, attend
from million_cli.errors import UserError
from million_cli.hf.attention import PQHandle
from million_cli.hf.compat import tokens_to_remove
from million_cli.hf.models import fingerprint, full_attention_layers, has_sinks
from million_cli.hf.own_layers import (
    crop_layers,
    is_linear,
    repeat_sequences,
    reset_layer,
    take_sequences,
    tensors_of,
)
from million_cli.hf.padding import LeftPadding
from million_cli.hf.portable import PortableCache
from million_cli.hf.select import (
    Choice,
    Compute,
    Fallback,
    Kernels,
    Request,
    beyond_positions,
    choose,
    log_once,
    refuse,
)
from million_cli.hf.switch import use_pq_attention
from million_cli.hf.trial import Parts, parts_of, refuse_parts
from million_cli.ops.store_ops import KernelFailed
from million_cli.ops.support import KernelQuery, Store
from million_cli.pq.codebook import Codebook
from million_cli.spec import WindowSpec

Prefill = Literal["exact", "quantized"]


class PQLayer(CacheLayerMixin):
    """A full-attention layer of a PQ cache: appends to the cache's store, returns handles instead of tensors.

    Operations on all layers at once (reset, crop, reorder, ...) belong to the cache.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # cropping into the coded part brings decoded vectors back, not the original ones
    supports_early_init = False

    def __init__(self, cache: PQCache, position: int) -> None:
        super().__init__()
        self._cache = cache
        self._position = position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True  # the store allocates for itself

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:  # a pair of handles; transformers' annotation says tensors
        """Append `[B, Hkv, N, D]`; the handle stands for K and for V in the attention function."""
        self.is_initialized = True
        handle = self._cache.append(self._position, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int:
        return self._cache.store.length(self._position)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a mask for `query_length` new tokens covers."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class PQCache(PortableCache):
    """The common base of the PQ caches.  Sliding windows and linear attention are transformers' own layers.

    Attributes:
        codebook: codes K and V.
        store: the codes and windows of the full-attention layers.
        backend: store and compute in use, with every fallback so far.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Arguments of a class beyond those that all PQ caches take; a configuration has them under `cache`."""
    needs_pq_attention = True  # read by `hf.switch`
    _layer_class = PQLayer

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        codebook: Codebook,
        window: WindowSpec | None,
        request: Request,
        make_store: dict[Store, Callable[..., CodeStore]],
        kernels: Kernels,
    ) -> None:
        config = model if isinstance(model, PreTrainedConfig) else model.config
        text_config = config.get_text_config(decoder=True)
        if isinstance(model, PreTrainedConfig):
            # The rest only weights can tell: the codebook gives it, `append` checks shapes.
            ours = replace(
                codebook.meta.fingerprint,
                model_type=text_config.model_type,
                num_layers=text_config.num_hidden_layers,
                layers=full_attention_layers(config),
            )
            device, dtype = torch.device("cpu"), torch.float32
        else:
            ours = fingerprint(model)
            device, dtype = model.device, model.dtype
        codebook.check(ours)
        self.codebook = codebook
        self._request, self._make_store, self._kernels = request, make_store, kernels
        self._query = KernelQuery(
            request.store,
            device,
            dtype,
            codebook.specs,
            window or WindowSpec(),
            ours.num_kv_heads,
            text_config.num_attention_heads // ours.num_kv_heads,
            softcap=getattr(text_config, "attn_logit_softcapping", None) is not None,
            sinks=isinstance(model, PreTrainedModel) and has_sinks(model),
            rebase_every=max((rebase.every for rebase in codebook.keys.rebases if rebase), default=0),
        )
        self._model_type = text_config.model_type
        self._parts = Parts() if isinstance(model, PreTrainedConfig) else parts_of(model)
        self._padding = LeftPadding()
        self._fallbacks: tuple[Fallback, ...] = ()
        self._decide(device, dtype)
        if not isinstance(model, PreTrainedConfig):
            use_pq_attention(model)
        layers = DynamicCache(config=text_config).layers
        for position, index in enumerate(ours.layers):
            layers[index] = self._layer_class(self, position)
        super().__init__(layers=layers)

    # -- store and compute -----------------------------------------------------------------------------------

    @property
    def backend(self) -> Choice:
        """Store and compute in use, with all fallbacks since construction."""
        return replace(self._choice, fallbacks=self._fallbacks)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every fallback since construction, in order, each once."""
        return self._fallbacks

    @property
    def steps(self) -> GraphSteps:
        """Steps of one token over the store in use, for CUDA graphs."""
        return GraphSteps(self.store)

    @property
    def bits(self) -> float:
        """Nominal code bits per element; window and codebooks are not in it."""
        return self.store.bits

    @property
    def has_own_layers(self) -> bool:
        """Whether some layers are transformers' own: sliding windows, linear attention."""
        return bool(self._own_layers())

    @property
    def kv_shape(self) -> KernelQuery:
        """Heads, head_dim, dtype and device of the keys and values it takes, among others."""
        return self._query

    def memory(self) -> dict[str, int]:
        """Bytes of the tensors held, by use; see `CodeStore.memory`.

        `dense` are the sliding-window layers and `linear` the states of linear attention; `total` is all but
        `linear` and `codebooks`, which no text makes grow.
        """
        parts = self.store.memory()
        own = {True: 0, False: 0}
        for layer in self._own_layers():
            own[is_linear(layer)] += sum(tensor.nbytes for tensor in tensors_of(layer).values())
        parts["dense"], parts["linear"] = own[False], own[True]
        parts["total"] += own[False]
        parts["codebooks"] = self.codebook.size_bytes(torch.float32)
        return parts

    def _decide(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose store and compute for a device and dtype, and start with an empty store."""
        self._query = replace(self._query, device=device, dtype=dtype)
        self._decided = self._choice = choose(self._request, self._query, self._kernels.support)
        self._record(self._choice.fallbacks)
        ops = self._kernels.make_ops(self._choice.store) if self._choice.compute == "kernel" else None
        self.store = self._make_store[self._choice.store](ops=ops)
        self._padding.forget()

    def _fall_back(self, store: Store, compute: Compute, reason: str) -> None:
        """Replace store and compute; the caller moves the contents.

        Raises:
            UserError: the run is strict.
        """
        choice = replace(self._choice, fallbacks=()).fall_back(store, compute, reason)
        if self._request.strict:
            refuse(choice)
        self._choice = choice
        self._record(choice.fallbacks)

    def kernel_failed(self, error: KernelFailed) -> None:
        """Continue in torch over the same codes.

        Raises:
            UserError: the run is strict.
        """
        self._fall_back(self._choice.store, "torch", f"the kernel failed: {error}")
        self.store.ops = None

    def check_positions(self, length: int) -> None:
        """Record that a text of `length` tokens needs codes for more positions than the codebook's, if so.

        Raises:
            UserError: it does, and the run is strict.
        """
        beyond = beyond_positions(self.codebook.meta.positions, length)
        if beyond is None or beyond in self._fallbacks:
            return
        if self._request.strict:
            refuse(replace(self._choice, fallbacks=(beyond,)))
        self._record((beyond,))

    def _record(self, fallbacks: tuple[Fallback, ...]) -> None:
        self._fallbacks += tuple(f for f in fallbacks if f not in self._fallbacks)
        for fallback in fallbacks:
            log_once(fallback)

    # -- reading and appending -------------------------------------------------------------------------------

    def append(self, position: int, keys: Tensor, values: Tensor) -> PQHandle:
        """Append `[B, Hkv, N, D]` to the full-attention layer `position` (counted among those).

        Raises:
            UserError: another batch than before, a shape that the codebook is not for, gradients are wanted,
                several tokens for a model that forgets (see `hf.trial`), or a strict cache would have to
                fall back.
        """
        refuse_gradients(keys, values)
        expected = (self._query.num_kv_heads, self._query.specs[0].keys.head_dim)
        for shape in (keys.shape, values.shape):
            if (shape[1], shape[3]) != expected:
                raise UserError(
                    f"(KV heads, head_dim)={(shape[1], shape[3])}: the codebook is for {expected}"
                )
        if not keys.shape[2]:
            raise UserError("a forward pass over no tokens: accepted is at least one")
        self.check_positions(self.store.length(position) + keys.shape[2])
        refuse_parts(self._parts, self._model_type, self.store.length(position), keys.shape[2])
        if self.store.batch is None and (keys.device, keys.dtype) != (self._query.device, self._query.dtype):
            self._decide(keys.device, keys.dtype)
        if keys.shape[2] > 1:
            self._padding.forget()
        try:
            view = self.store.append(position, keys, values)
        except KernelFailed as error:
            self.kernel_failed(error)
            view = self.store.append(position, keys, values)
        except PagePoolExhausted as error:
            view = self._without_pages(str(error)).append(position, keys, values)
        except RuntimeError as error:
            if not (isinstance(self.store, PagedStore) and _is_out_of_memory(error)):
                raise
            size = "that grows" if self.store.max_pages is None else f"of {self.store.max_pages} pages"
            view = self._without_pages(f"no memory for a pool {size}").append(position, keys, values)
        return PQHandle(view, self._attend)

    def reserve(self, length: int) -> bool:
        """Make room for steps up to `length` tokens; False if kernels no longer serve the cache then.

        Raises:
            UserError: a strict cache would have to fall back.
        """
        try:
            self.store.reserve(length)
        except PagePoolExhausted as error:
            self._without_pages(str(error))
            if self._choice.compute == "kernel":
                self.steps.begin()
                self.store.reserve(length)
        return self._choice.compute == "kernel"

    def _without_pages(self, reason: str) -> CodeStore:
        """Continue in a contiguous store with the same tokens."""
        assert isinstance(self.store, PagedStore)
        kernel = self._choice.compute == "kernel" and (
            self._kernels.support(replace(self._query, store=ContiguousStore.name)) is None
        )
        self._fall_back(ContiguousStore.name, "kernel" if kernel else "torch", reason)
        ops = self._kernels.make_ops(ContiguousStore.name) if kernel else None
        self.store = self.store.to_contiguous(ops)
        return self.store

    def _attend(
        self,
        query: Tensor,
        view: KVView,
        *,
        scale: float,
        mask: Tensor | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if view.device_layer is not None and self._choice.compute == "kernel":
            assert softcap is None, "refused when the choice was made"
            first_valid, reason = self._padding.read(mask)
            if sinks is not None:  # of a model that was known by its configuration alone
                reason = "no compiled kernels for attention sinks"
            if reason is None:
                try:
                    return self.store.attend(query, view, scale=scale, first_valid=first_valid)
                except KernelFailed as error:
                    self.kernel_failed(error)
            else:  # this text only
                passed_over = Fallback(str(self._choice), f"{self._choice.store} torch", reason)
                if self._request.strict:
                    refuse(replace(self._choice, fallbacks=(passed_over,)))
                self._record((passed_over,))
        return attend(query, view, scale=scale, mask=mask, softcap=softcap, sinks=sinks)

    # -- the interface of transformers' caches ---------------------------------------------------------------

    def reset(self, release: bool = True) -> None:
        """Forget all tokens and free the memory; a paged cache that fell back starts with a pool again.

        Without `release` the memory is kept for the next text of the same batch size, see `CodeStore.reset`.
        """
        self._padding.forget()
        if self._choice == self._decided:
            self.store.reset(release)
        else:
            self._decide(self._query.device, self._query.dtype)
        for layer in self._own_layers():
            reset_layer(layer)

    def crop(self, argument: int) -> None:
        """Remove tokens from the end: -n removes n, a positive argument is the length to keep (see `compat`).

        Where this cuts into the coded part, tokens that become exact again are decoded vectors.

        Raises:
            UserError: linear attention or sliding windows that cannot go back (see `crop_layers`).
        """
        length = self.store.length()
        removed = tokens_to_remove(argument, length)
        crop_layers(self._own_layers(), length, removed)
        self.store.crop(length - removed)
        self._padding.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes a copy of sequence beam_idx[i].

        Raises:
            UserError: as `CodeStore.reorder`.
        """
        self._reindex(lambda store: store.reorder(beam_idx))
        for layer in self._own_layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` neighbouring copies."""
        self._reindex(lambda store: store.repeat_interleave(repeats))
        for layer in self._own_layers():
            repeat_sequences(layer, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order."""
        self._reindex(lambda store: store.select(indices))
        for layer in self._own_layers():
            take_sequences(layer, indices)

    def _reindex(self, change: Callable[[CodeStore], None]) -> None:
        """Change the batch of the store; without pages for the copies the cache continues contiguously."""
        self._padding.forget()
        try:
            change(self.store)
        except PagePoolExhausted as error:
            change(self._without_pages(str(error)))

    def _own_layers(self) -> list[Any]:
        """transformers' own; not those that keep nothing."""
        return [
            layer
            for layer in self.layers
            if is_linear(layer) or (isinstance(layer, CacheLayerMixin) and not isinstance(layer, PQLayer))
        ]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a type for it; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
