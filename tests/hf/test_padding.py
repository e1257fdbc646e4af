"""Masks of decode steps: transformers' masks in a cheaper form, and the padding read from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from million_cli.hf.padding import LeftPadding, padding_mask, unless_all_seen

rows = st.integers(1, 12).flatmap(
    lambda T: st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=3)
)


def step_mask(seen: torch.Tensor) -> torch.Tensor | None:
    B, T = seen.shape
    return padding_mask(B, 1, T, T - 1, attention_mask=seen)


@given(rows=rows, q_length=st.integers(1, 12), function=st.booleans(), tensor_offset=st.booleans())
def test_masks_are_those_of_transformers(
    rows: list[list[bool]], q_length: int, function: bool, tensor_offset: bool
) -> None:
    seen = torch.tensor(rows)
    B, T = seen.shape
    q_length = min(q_length, T)
    offset = torch.tensor(T - q_length) if tensor_offset else T - q_length
    options = {
        "mask_function": sliding_window_causal_mask_function(3) if function else causal_mask_function,
        "local_size": 3 if function else None,
        "attention_mask": seen,
    }
    ours, theirs = (
        padding_mask(B, q_length, T, offset, **options),
        sdpa_mask(B, q_length, T, offset, **options),
    )
    # A window as long as the text hides nothing of a step, though transformers makes a mask for it.
    at_window = function and (q_length, T) == (1, 3) and not tensor_offset
    assert (ours is None) == (theirs is None or (at_window and bool(seen.all())))
    assert ours is None or torch.equal(ours, theirs)


def test_a_decode_step_gets_a_view() -> None:
    seen = torch.tensor([[False, True, True], [True, True, True]])
    mask = step_mask(seen)
    assert mask is not None
    assert mask.shape == (2, 1, 1, 3)
    assert mask.data_ptr() == seen.data_ptr()


@given(rows=rows)
def test_first_positions_or_the_reason(rows: list[list[bool]]) -> None:
    seen = torch.tensor(rows)
    first_valid, reason = LeftPadding().read(step_mask(seen))
    padding = [row.index(True) if any(row) else len(row) for row in rows]
    holes = any(not all(row[n:]) for row, n in zip(rows, padding, strict=True))
    assert reason == ("an attention mask with holes" if holes else None)
    if holes or not any(padding):
        assert first_valid is None
    else:
        assert first_valid is not None
        assert first_valid.dtype == torch.int32
        assert first_valid.tolist() == padding


def test_looks_once_until_told_to_forget() -> None:
    padding, T = LeftPadding(), 4
    first, _ = padding.read(step_mask(torch.arange(T) >= torch.tensor([[0], [2]])))
    other = torch.arange(T + 1) >= torch.tensor([[0], [3]])
    assert padding.read(step_mask(other))[0] is first
    padding.forget()
    again, _ = padding.read(step_mask(other))
    assert again is not None
    assert again.tolist() == [0, 3]


def test_other_masks_are_not_padding() -> None:
    assert LeftPadding().read(None) == (None, None)
    first_valid, reason = LeftPadding().read(torch.ones(1, 1, 1, 4, dtype=torch.bool))
    assert first_valid is None
    assert reason == "an attention mask that is not made from padding alone"


@pytest.mark.parametrize("hidden", [True, False])
def test_dense_attention_drops_marked_masks_that_hide_nothing(hidden: bool) -> None:
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[0, 0] = False
    mask = step_mask(seen)
    assert mask is not None
    if not hidden:
        seen[0, 0] = True  # the mask is a view
    for _ in range(2):
        assert unless_all_seen(mask) is (mask if hidden else None)
    plain = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert unless_all_seen(plain) is plain
