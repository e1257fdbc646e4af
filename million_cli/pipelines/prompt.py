"""The prompt of `million generate`: where it is read from, and the chat template of an instruct model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from million_cli.errors import UserError
from million_cli.text import read_path


def read_prompt(argument: str | None, file: str | None) -> str:
    """The prompt: the argument itself, standard input if it is `-`, or the text of `file`.

    One line end at the end of a file or of standard input is dropped.

    Raises:
        UserError: neither is given or both are, the file cannot be read, the text is not UTF-8 or empty.
    """
    if (argument is None) == (file is None):
        raise UserError("accepted are either a prompt (- reads standard input) or --prompt-file FILE")
    try:
        if file is not None:
            prompt = read_path(Path(file)).removesuffix("\n")
        elif argument == "-":
            prompt = sys.stdin.read().removesuffix("\n")
        else:
            assert argument is not None
            prompt = argument
        prompt.encode("utf-8")
    except UnicodeError as error:
        raise UserError("the prompt is not UTF-8") from error
    if not prompt:
        raise UserError("the prompt is empty")
    return prompt


def encode_prompt(tokenizer: Any, prompt: str, chat: bool | None) -> tuple[torch.Tensor, bool]:
    """Token ids `[1, T]` of a prompt, and whether the tokenizer's chat template was applied.

    Args:
        chat: True applies the template, False continues the prompt as it is.  None applies it if the
            tokenizer has one and the prompt is plain text, without the template's own marks.

    Raises:
        UserError: `chat` without a template, or a template that fails.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UserError("--chat: the tokenizer has no chat template; accepted is --no-chat")
    if chat is None:
        chat = has_template and not _has_marks(tokenizer, prompt)
    if chat:
        # The template writes the special tokens itself; the tokenizer must not add them again.
        return tokenizer(_templated(tokenizer, prompt), add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ], True
    return tokenizer(prompt, return_tensors="pt")["input_ids"], False


def _has_marks(tokenizer: Any, prompt: str) -> bool:
    """Whether a prompt holds special tokens, or the mark that ends the user's turn (`[/INST]`)."""
    marker = "What is a codebook?"
    after = _templated(tokenizer, marker).partition(marker)[2].split()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return any(mark in prompt for mark in [*special, *after[:1]])


def _templated(tokenizer: Any, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"the tokenizer's chat template fails: {lines[0]}; accepted is --no-chat") from error
    return text
