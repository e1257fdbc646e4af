"""Greedy answers to a batch of prompts, decoded with any cache.

transformers takes every setting that a caller leaves open from the model's own `generation_config.json`: a
`no_repeat_ngram_size` or `repetition_penalty` there would change answers silently.  Here no setting is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.errors import UserError
from million_cli.hf.compat import check_held
from million_cli.tasks.base import longest_context


@contextmanager
def plain_generation(model: PreTrainedModel, stops: Sequence[int]) -> Iterator[None]:
    """Within it, `model.generate` takes nothing from the model's own generation configuration.

    transformers' defaults then hold for settings that a caller leaves open: greedy, no penalties, no beams.

    Args:
        stops: tokens that end a text (see `stop_tokens`); empty leaves none.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=list(stops) or None)
    try:
        yield
    finally:
        model.generation_config = own


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation configuration."""
    theirs = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = theirs if isinstance(theirs, list) else [theirs]
    return [stop for stop in dict.fromkeys([tokenizer.eos_token_id, *several]) if stop is not None]


def greedy(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    *,
    new_tokens: int,
    stops: Sequence[int],
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """The greedy continuation of each prompt of one left-padded batch.

    Args:
        prompts: token ids, none empty.
        cache: empty; it holds the batch afterwards.
        new_tokens: an answer has at most so many tokens.
        stops: tokens that end an answer; empty lets each run to `new_tokens`.
        min_new_tokens: no stop is chosen before.

    Returns:
        Token ids of each answer, with its first stop as the last one.

    Raises:
        UserError: a prompt does not fit beside its answer, or the model did not use the cache throughout.
    """
    width, room = max(map(len, prompts)), longest_context(model)
    if width + new_tokens > room:
        raise UserError(
            f"a prompt of {width} tokens and {new_tokens} new ones: the model takes {room}; "
            "accepted are fewer"
        )
    padding = [width - len(ids) for ids in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * n + list(ids) for n, ids in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=min_new_tokens or None,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        eos_token_id=list(stops) or None,
    )
    with plain_generation(model, stops):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            generation_config=settings,
        )
    check_held(cache, output.shape[1] - 1)  # the newest token is not read
    return [_until_stop(answer, stops) for answer in output[:, width:].tolist()]


def _until_stop(answer: list[int], stops: Sequence[int]) -> list[int]:
    return answer[: next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))]
