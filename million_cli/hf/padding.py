"""Masks of decode steps: the left padding of a batch, for kernels, without waiting for the device.

For one new token the causal mask is the padding mask itself.  transformers would read it back every step to
see whether it can be left out; here a step gets a view of it, and a cache reads it back once a text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_MARK = "_million_padding_of_one_token"


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' `sdpa_mask`, except that a plain causal decode step gets a view of its padding mask.

    The view, bool `[B, 1, 1, T]`, is marked for `LeftPadding`.  On a CPU, where reading it costs nothing, a
    mask without padding is left out.
    """
    padding_only = (
        q_length == 1
        and (mask_function is causal_mask_function or (kwargs.get("local_size") or 0) >= kv_length)
        and isinstance(q_offset, int)
        and (kv_offset, q_offset + 1) == (0, kv_length)  # all keys are of the past, none is preallocated
        and attention_mask is not None
        and attention_mask.shape == (batch_size, kv_length)
    )
    if not padding_only:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # a tensor for static caches
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    assert attention_mask is not None
    if attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()[:, None, None]
    setattr(mask, _MARK, None)  # whether it hides anything: not known yet
    return mask


def unless_all_seen(mask: Tensor | None) -> Tensor | None:
    """The mask, or None if it is marked and hides nothing.  It is read once for all layers.

    Dense attention is faster without a mask.
    """
    if mask is None or not hasattr(mask, _MARK):
        return mask
    all_seen = getattr(mask, _MARK)
    if all_seen is None:
        all_seen = bool(mask.all())
        setattr(mask, _MARK, all_seen)
    return None if all_seen else mask


class LeftPadding:
    """The first valid position of each sequence of a batch, read once for all decode steps of a text.

    A decode step's mask is assumed to be the previous step's with one more visible token, as `generate` makes
    it.  Call `forget` when that no longer holds.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Read the next mask again: several tokens were appended, or the batch was changed."""
        self._known = False
        self._first_valid: Tensor | None = None
        self._reason: str | None = None

    def read(self, mask: Tensor | None) -> tuple[Tensor | None, str | None]:
        """From a step's mask `[B, 1, 1, T]`: (first_valid int32 `[B]`, None) or (None, why there is none).

        (None, None) means a batch without padding.
        """
        if mask is None:
            return None, None
        if not hasattr(mask, _MARK):
            return None, "an attention mask that is not made from padding alone"
        if not self._known:
            self._look(mask[:, 0, 0])
        return self._first_valid, self._reason

    def _look(self, seen: Tensor) -> None:
        """Read `seen [B, T]` back to the host: the one synchronisation."""
        T = seen.shape[1]
        first_valid = torch.where(seen.any(1), seen.int().argmax(1), T).int()
        expected = torch.arange(T, device=seen.device) >= first_valid[:, None]
        facts = torch.stack([(seen == expected).all(), seen.all(), seen.any(1).all()])
        is_left, is_all, is_settled = facts.tolist()
        self._reason = None if is_left else "an attention mask with holes"
        self._first_valid = None if is_all or not is_left else first_valid
        self._known = is_settled  # a sequence of padding alone may get more of it
