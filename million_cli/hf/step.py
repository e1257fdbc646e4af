"""A decode step as transformers' models see it: a cache layer that `torch.compile` and CUDA graphs can hold.

For one new token the layer hands K and V on to the attention function, which passes them, with the query, to
one opaque operation.  That operation finds its cache, appends and attends.  So a compiled step does not
depend on the kind of cache, and one compilation serves all.

Letters: B batch, Hq/Hkv query and KV heads, D head_dim, N new tokens.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from million_cli.errors import UserError

_LIBRARY = torch.library.Library("million", "FRAGMENT")
_LIBRARY.define(
    "step(Tensor query, Tensor key, Tensor value, Tensor marker, Tensor? first_valid, int layer, float scale)"
    " -> Tensor"
)


class Steps(Protocol):
    """The interface of a cache to a loop over decode steps.  All sequences hold the same number of tokens."""

    @property
    def marker(self) -> Tensor:
        """A tensor that belongs to this cache alone: the operation finds the cache by its address."""
        ...

    def expect(self, length: int) -> None:
        """Before the first token: the text will have `length` tokens."""
        ...

    def begin(self, first_valid: Tensor | None) -> None:
        """The prefill is done; all steps that follow have this `first_valid` (see `attend`)."""
        ...

    def ready(self) -> Hashable | None:
        """Make room for one more token, without waiting for the device.

        Returns:
            A key: a captured step can be launched again while the key stays equal.  None if there are no
            more steps, and the cache must be used through its layers.
        """
        ...

    def prepare(self, key: Hashable) -> None:
        """Prepare a step for `key`: work that cannot run during its capture."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, first_valid: Tensor | None, scale: float
    ) -> Tensor:
        """Append `key`, `value [B, Hkv, D]` and attend with `query [B, Hq, D]`: launches only.

        Layers come in order; the first one counts the token.  first_valid: int32 `[B]`
        on the device, or None without padding.
        """
        ...

    def advance(self) -> None:
        """One whole step has been launched."""
        ...


_ALL: WeakValueDictionary[int, Steps] = WeakValueDictionary()


def new_marker(steps: Steps, device: torch.device) -> Tensor:
    """A marker by which the operation finds `steps`."""
    marker = torch.zeros(1, dtype=torch.int32, device=device)
    torch._dynamo.mark_static_address(marker)
    _ALL[marker.data_ptr()] = steps
    return marker


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    marker: Tensor,
    first_valid: Tensor | None,
    layer: int,
    scale: float,
) -> Tensor:
    return _ALL[marker.data_ptr()].attend(layer, query, key, value, first_valid, scale)


def _shape_of_step(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_LIBRARY.impl("step", _step, "CPU")
_LIBRARY.impl("step", _step, "CUDA")
torch.library.register_fake("million::step", _shape_of_step, lib=_LIBRARY)


class StepHandle(NamedTuple):
    """Stands for K and for V of one new token on their way from the cache layer to the attention function."""

    key: Tensor
    value: Tensor
    marker: Tensor
    layer: int


class StepLayer(CacheLayerMixin):
    """One layer of a cache, for one new token at a time."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, marker: Tensor, position: int) -> None:
        super().__init__()
        self.marker, self.position = marker, position
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A handle on `[B, Hkv, 1, D]`, twice, in place of K and V."""
        assert key_states.shape[2] == 1
        handle = StepHandle(key_states, value_states, self.marker, self.position)
        return handle, handle

    def get_seq_length(self) -> int:
        return 0  # positions are given with each step

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0, 0  # there is nothing dense to mask

    def get_max_length(self) -> int:
        return -1


def step_cache(steps: Steps, num_layers: int) -> Cache:
    """The cache that a model gets for one step of `steps`; every layer has full attention."""
    return Cache(layers=[StepLayer(steps.marker, position) for position in range(num_layers)])


def padding_of_step(first_valid: Tensor | None, device: torch.device) -> Tensor:
    """The attention mask of a step: int32 `[B, 1, 1, 1]`, the first valid position of each sequence.

    Models pass a mask of four dimensions on unchanged.  Without padding it has no elements.
    """
    if first_valid is None:
        return torch.zeros(1, 1, 1, 0, dtype=torch.int32, device=device)
    return first_valid[:, None, None, None]


def step_attention(query: Tensor, handle: StepHandle, mask: Any, scale: float) -> tuple[Tensor, None]:
    """Attention of one new token, `query [B, Hq, 1, D]`.

    Args:
        mask: the result of `padding_of_step`, or the mask that the model makes itself: None, bool `[B, T]` or
            `[B, 1, 1, T]`, or additive floats; T is at least the length.

    Returns:
        `[B, 1, Hq, D]` and no attention weights, as transformers wants it.

    Raises:
        UserError: a mask of another kind.
    """
    arguments = (
        query.squeeze(2),
        handle.key.squeeze(2),
        handle.value.squeeze(2),
        handle.marker,
        _first_valid(mask, query.shape[0]),
        handle.layer,
        scale,
    )
    output = torch.ops.million.step(*arguments)
    return output.unsqueeze(1), None


def _first_valid(mask: Any, batch: int) -> Tensor | None:
    """int32 `[B]`: the first position that a step's mask shows, or None if all are."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UserError(f"attention_mask: a {type(mask).__name__}; accepted is padding on the left")
    if mask.dtype == torch.int32 and mask.ndim == 4:
        return mask.flatten() if mask.numel() else None
    seen = mask.flatten(1)
    seen = seen >= 0 if seen.is_floating_point() else seen.bool()
    return seen.int().argmax(-1).int().expand(batch)
