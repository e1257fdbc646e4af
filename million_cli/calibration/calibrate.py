"""From a model and a text to a codebook, in one call."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from million_cli.calibration.information import Information, NoGradients
from million_cli.calibration.sampling import SamplingCache, read_text
from million_cli.errors import UserError
from million_cli.pq import train
from million_cli.pq.codebook import Codebook
from million_cli.spec import CodeSpec, PQSpec


def train_codebook(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    M: int | tuple[int, int],
    nbits: int | tuple[int, int] = 8,
    *,
    samples: int = 16384,
    context_tokens: int = 2048,
    information_tokens: int = 32768,
    settings: train.TrainSpec | None = None,
) -> Codebook:
    """Let `model` read `text`, sample its K and V, and train a codebook on them.

    Args:
        tokenizer: of the model.
        text: like the one the cache will serve, but not the one it is judged on.
        M: subspaces of a head's vector, for keys and values alike or as (keys, values).
        nbits: bits of a code, likewise; bits an element are M * nbits / head_dim.
        samples: tokens kept a layer for training.
        context_tokens: the text is read in contexts of that many tokens.
        information_tokens: the Fisher information is gathered from about that many.
        settings: scope, rotation, metric, trainer and seed; the default is a codebook and a transform a layer
            and head, fitted in the metric of the Fisher information and weighted by gradients.

    Raises:
        UserError: a text that is empty, or an argument out of range.
    """
    settings = settings or train.TrainSpec(
        key_rotation="opq",
        value_rotation="opq",
        key_metric="fisher",
        value_metric="fisher",
        weighting="gradient",
    )
    if context_tokens < 1:
        raise UserError(f"context_tokens={context_tokens}: accepted are 1 and more")
    cache = SamplingCache(model, samples, settings.seed)
    head_dim = cache.fingerprint.head_dim
    (M_keys, M_values), (bits_keys, bits_values) = _pair(M), _pair(nbits)
    spec = PQSpec(CodeSpec(head_dim, M_keys, bits_keys), CodeSpec(head_dim, M_values, bits_values))
    token_ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
    if not len(token_ids):
        raise UserError("the calibration text is empty")
    information = Information(model, seed=settings.seed)
    differentiable = "fisher" in (settings.key_metric, settings.value_metric)
    for context in token_ids.split(context_tokens):
        first = cache.seen
        read_text(model, cache, context[None])
        if differentiable and information.read_tokens < information_tokens:
            try:
                cache.weigh(information.read(context[None]), first)
            except NoGradients:  # the card says that the metric is the plain one
                differentiable = False
                information.forget()
    keys, values = cache.samples()
    return train.train_codebook(
        keys,
        values,
        spec,
        cache.fingerprint,
        settings,
        information=information.mean(),
        squares=cache.squares(),
        calibration=f"{len(text)} characters given by the caller",
        calibration_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        tokens=len(token_ids),
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
