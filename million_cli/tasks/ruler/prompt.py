"""Prompts, their writers and their token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """A question, the prefix of the answer, and the references that the answer must contain."""

    text: str
    prefix: str
    answers: tuple[str, ...]


class Writer(Protocol):
    """Writes prompts of one task.

    Attributes:
        least: the smallest haystack.
        most: the largest one that the material allows; None where it repeats without end.
    """

    @property
    def least(self) -> int: ...
    @property
    def most(self) -> int | None: ...

    def __call__(self, rng: random.Random, size: int, number: int) -> Prompt:
        """The `number`-th prompt with a haystack of `size` units (words, lines or documents).

        The same state of `rng` and the same size give the same prompt.
        """


def encode(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids: with `chat` the text is the user's turn and the prefix begins the assistant's.

    RULER's own runner puts them together so, with templates of its own list instead of the tokenizer's.
    """
    text = prompt.text
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    # A chat template writes its own special tokens.
    ids: list[int] = tokenizer(text + prompt.prefix, add_special_tokens=not chat, verbose=False)["input_ids"]
    return ids
