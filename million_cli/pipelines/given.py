"""Overrides that the user gave: each is obeyed, or refused in one line with the choice that contradicts it.

Defaults and files under `conf/` are no overrides: a dense job may carry settings of pages, unless the user
wrote them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from operator import attrgetter

from million_cli.errors import UserError
from million_cli.pipelines.config import JobConfig, QuantizerConfig
from million_cli.recipe import Quantizer
from million_cli.registry import CACHES, CODECS

logger = logging.getLogger("million")

CODES = tuple(field.name for field in fields(Quantizer) if field.name != "name")
"""Keys of `quantizer` that say how codebooks are trained."""
TRAINING = ("sample", "train", "data")
"""Keys that only calibrating jobs read."""


def parse(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides as key -> value, without `+`, `++` and the packages of groups; deletions (`~key`) aside.

    Raises:
        UserError: two values for one key.
    """
    given: dict[str, str] = {}
    for override in overrides:
        match = re.fullmatch(r"\+{0,2}([^=~@+]+)(@[^=]+)?=(.*)", override, re.DOTALL)
        if match is None or match[2]:
            continue
        key, value = match[1], match[3]
        if given.setdefault(key, value) != value:
            raise UserError(f"{key}={value}: {key}={given[key]} is given too; accepted is one of them")
    return given


def refuse_unread(config: JobConfig, overrides: Sequence[str], sweep: bool = False) -> None:
    """Refuse the overrides that the job would not read.

    Args:
        sweep: the overrides are those of all jobs of a sweep, some of which read less: say so instead.

    Raises:
        UserError: see above, or two values for one key.
    """
    given = parse(overrides)
    for key, value in given.items():
        for unread, reason in _unread(config, given):
            if key == unread or key.startswith(f"{unread}."):
                message = f"{key}={value}: {reason}"
                if not sweep:
                    raise UserError(message)
                logger.warning("not read: %s", message)
                break


def take_from_codebook(config: JobConfig, overrides: Sequence[str]) -> None:
    """Let the configuration of a job with `codebook` say how that codebook was trained.

    Raises:
        UserError: an override says something else about it, or the file is not a codebook.
    """
    if config.codebook is None or config.quantizer.kind != "pq":
        return
    from million_cli.pq import Codebook  # torch

    codebook = Codebook.load(config.codebook)
    card, head_dim = codebook.meta.recipe, codebook.specs[0].keys.head_dim
    trained = QuantizerConfig(
        kind="pq", **{f.name: getattr(card.quantizer, f.name) for f in fields(Quantizer)}
    )
    asked = config.quantizer
    same_codes = asked.bits == trained.bits and asked.spec(head_dim) == trained.spec(head_dim)
    for key, value in parse(overrides).items():
        group, _, below = key.partition(".")
        if group != "quantizer":
            continue
        if below:
            found = attrgetter(below)(trained)
            agrees = attrgetter(below)(asked) == found or (same_codes and below.endswith((".M", ".dsub")))
        else:
            found = trained.name
            agrees = asked.name == found or replace(asked, name=found) == trained
        if not agrees:
            found = "null" if found is None else found
            raise UserError(f"{key}={value}: codebook={config.codebook} was trained with {key}={found}")
    config.quantizer, config.sample = trained, card.sample
    config.train = replace(card.train, encoder=config.train.encoder)


def _unread(config: JobConfig, given: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(key that the job does not read, why)."""
    kind, name = config.quantizer.kind, config.quantizer.name
    if kind == "dense":
        by_cache = given.get("cache", given.get("cache.kind")) == "dense"
        reason = f"{'cache' if by_cache else 'quantizer'}=dense quantizes nothing"
        other = ("quantizer",) if by_cache else ("cache",)
        own = [f"cache.{key}" for key in ("page_size", "extended_residual", "max_pages")]
        own += [f"quantizer.{key}" for key in (*CODES, "codec")]
        for key in (*(other if given.get(other[0]) != "dense" else ()), *own, *TRAINING, "codebook", "fold"):
            yield key, reason
    elif kind in CODECS.names:
        for key in CODES:
            yield f"quantizer.{key}", f"quantizer={name} is of kind {kind}; accepted are quantizer.codec.*"
        for key in ("cache", "cache.kind", "cache.max_pages"):
            if key in given and given[key] != "contiguous":
                yield key, f"the cache of quantizer={name} is simulated and has no store"
        yield "codebook", f"quantizer={name} has no codebook"
        yield "fold", f"quantizer={name} has no rotation to fold"
        if not hasattr(CODECS.load(kind), "calibrate"):
            for key in TRAINING:
                yield key, f"quantizer={name} is not calibrated"
    elif config.codebook:
        for key in TRAINING:
            if key != "train" or set(_below(given, key)) != {"train.encoder"}:
                yield key, f"codebook={config.codebook} is trained already"
    if kind != "dense" and "max_pages" not in getattr(CACHES.load(config.cache.kind), "settings", ()):
        yield "cache.max_pages", f"cache={config.cache.kind} has no pool of pages"


def _below(given: dict[str, str], node: str) -> Iterator[str]:
    return (key for key in given if key == node or key.startswith(f"{node}."))
