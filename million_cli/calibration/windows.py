"""The windows of tokens that a model is calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from million_cli.errors import UserError
from million_cli.recipe import Sampling
from million_cli.tasks.base import check_context, longest_context
from million_cli.text import Text, TextConfig, load_text

CODE = TextConfig("python-excerpt")
"""The code that is spread among the calibration text."""
DEFAULT_CONTEXT = 2048


def calibration_windows(
    model: PreTrainedModel, tokenizer: Any, text: Text, sampling: Sampling, seed: int, repeats: bool = True
) -> list[Tensor]:
    """Token ids int64 `[T]` of each window: the text, with code and random repetitions spread among it.

    A share of the text comes in long windows, as far as it fills them.  A text shorter than a window is one
    window.  Without `repeats` the rest is the same.

    Raises:
        UserError: the text is too short, or the context longer than the model's.
    """
    context = sampling.context or min(longest_context(model), DEFAULT_CONTEXT)
    check_context("sample.context", context, model)
    ids = tokenizer(text.content, verbose=False)["input_ids"][: sampling.tokens]
    if len(ids) < 2:
        raise UserError(f"the calibration text {text.source} has {len(ids)} tokens; accepted are at least 2")
    long = min(sampling.long, longest_context(model))
    long_windows = round(sampling.long_share * len(ids) / long) if long > context else 0
    long_ids, ids = ids[: long_windows * long], ids[long_windows * long :]
    context = min(context, len(ids))
    whole = len(ids) // context
    code_ids = tokenizer(load_text(CODE).content, verbose=False)["input_ids"]
    shares = {"code": sampling.code, "repeats": sampling.repeats}
    wanted = {name: round(whole * share / (1 - sum(shares.values()))) for name, share in shares.items()}
    code = torch.tensor(code_ids[: wanted["code"] * context], dtype=torch.int64)
    vocabulary = min(len(tokenizer), model.config.get_text_config(decoder=True).vocab_size)
    windows = _interleave(
        torch.tensor(ids[: whole * context], dtype=torch.int64).view(whole, context),
        code[: len(code) // context * context].view(-1, context),
        _repeating(wanted["repeats"] if repeats else 0, context, vocabulary, seed),
    )
    for i, window in enumerate(torch.tensor(long_ids, dtype=torch.int64).view(-1, long)):
        windows.insert((2 * i + 1) * len(windows) // (2 * long_windows), window)
    return windows


def measuring_windows(
    model: PreTrainedModel, tokenizer: Any, text: Text, sampling: Sampling, seed: int, tokens: int
) -> list[Tensor]:
    """Windows to measure a budget of bits on: half of `tokens` as they are read, half with far copies.

    A window with far copies is as long as the text, the model and `sampling.long` allow, and its last quarter
    repeats passages of its first half, so that layers which fetch from thousands of tokens away show their
    cost.  Random repetitions are left out: they ask for another mix, which is worse on all else.

    Raises:
        UserError: as `calibration_windows`.
    """
    read = calibration_windows(model, tokenizer, text, sampling, seed, repeats=False)
    usual = min(len(window) for window in read)
    ordinary = [window for window in read if len(window) == usual]
    wanted = max(1, min(len(ordinary), tokens // 2 // usual))
    chosen = [ordinary[(2 * i + 1) * len(ordinary) // (2 * wanted)] for i in range(wanted)]
    ids = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.int64)
    long = min(sampling.long, longest_context(model), len(ids))
    if long <= usual:
        return chosen
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max(1, tokens // 2 // long)):
        start = int(torch.randint(len(ids) - long + 1, (), generator=generator))
        chosen.append(_with_far_copies(ids[start : start + long], generator))
    return chosen


def _with_far_copies(window: Tensor, generator: torch.Generator) -> Tensor:
    """The window `[T]` with its last quarter made of passages of 32 to 256 tokens from its first half."""
    window, T = window.clone(), len(window)
    at = 3 * T // 4
    while at < T:
        n = min(T - at, T // 4, int(torch.randint(32, 257, (), generator=generator)))
        start = int(torch.randint(T // 2 - n + 1, (), generator=generator))
        window[at : at + n] = window[start : start + n]
        at += n
    return window


def batches(windows: Sequence[Tensor], most: int) -> Iterator[Tensor]:
    """Windows in order as `[B, T]`, B at most `most`: those of one length that follow each other."""
    group: list[Tensor] = []
    for window in windows:
        if group and (len(group) == most or len(window) != len(group[0])):
            yield torch.stack(group)
            group = []
        group.append(window)
    if group:
        yield torch.stack(group)


def _repeating(n: int, context: int, vocabulary: int, seed: int) -> Tensor:
    """Windows `[n, context]` of random tokens, each with a period of its own, 1/16 to 1/2 of the context."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.empty(n, context, dtype=torch.int64)
    for window in windows:
        period = int(torch.randint(max(1, context // 16), context // 2 + 1, (), generator=generator))
        tokens = torch.randint(vocabulary, (period,), generator=generator)
        window.copy_(tokens.repeat(-(-context // period))[:context])
    return windows


def _interleave(*parts: Tensor) -> list[Tensor]:
    """The rows of all, in order and evenly spread, so that a part from the start has all in proportion."""
    at = torch.cat([(torch.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return list(torch.cat(parts)[at.argsort(stable=True)])
