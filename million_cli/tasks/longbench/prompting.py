"""A sample as the token ids that the model continues, as LongBench's own runner makes them."""

from __future__ import annotations

from typing import Any

from million_cli.errors import UserError


def truncate_middle(tokenizer: Any, prompt: str, limit: int) -> str:
    """`prompt` if it has at most `limit` tokens, else its first and its last `limit // 2` tokens, as text.

    The beginning and the end of a prompt hold its instructions; the middle is context.  Special tokens (a
    beginning-of-text) count, and are not in the text.
    """
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return prompt
    half = limit // 2
    parts: list[str] = [
        tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[len(ids) - half :])
    ]
    return "".join(parts)


def encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, as the user's turn of the tokenizer's chat template if `chat`."""
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    # A chat template writes its own special tokens.
    ids: list[int] = tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]
    return ids


def fit(tokenizer: Any, prompt: str, chat: bool, room: int, limit: int | None = None) -> list[int]:
    """Token ids of a prompt whose middle is cut so that it has at most `limit` tokens and fits into `room`.

    `limit` counts the prompt alone, as published; `room` also what the chat template adds, and what a cut
    text grows by when it is tokenized again.

    Raises:
        UserError: the room is too small for any of the prompt.
    """
    limit = room if limit is None else min(limit, room)
    while limit >= 2:
        ids = encode(tokenizer, truncate_middle(tokenizer, prompt, limit), chat)
        if len(ids) <= room:
            return ids
        # By the excess, which is all it takes beside a template; where cut characters were replaced by longer
        # ones that may be far too much, hence not below the half.
        limit = max(limit - (len(ids) - room), limit // 2)
    raise no_room(room)


def no_room(room: int) -> UserError:
    """The error for a context that the answer fills."""
    return UserError(
        f"beside its answer the model has room for {room} prompt tokens; a lower task.new_tokens leaves more"
    )
