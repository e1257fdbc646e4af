"""Which store and which code serve a run: one pure function, and the record of all that was not as asked.

The order of preference is paged kernel > contiguous kernel > torch.  What a kernel supports is not known
here: a `KernelSupport` function is asked, and answers with the reason it cannot serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch

from million_cli.cache.view import attend
from million_cli.errors import UserError
from million_cli.integration.attention import Attend
from million_cli.spec import PQSpec, WindowSpec

Store = Literal["paged", "contiguous"]
Compute = Literal["kernel", "torch"]

logger = logging.getLogger("million")


@dataclass(frozen=True)
class KernelQuery:
    """All that decides whether a compiled kernel can serve: where, over which codes, for which heads."""

    store: Store
    device: torch.device
    dtype: torch.dtype
    spec: PQSpec
    window: WindowSpec
    num_kv_heads: int
    group: int  # G = Hq / Hkv


KernelSupport = Callable[[KernelQuery], str | None]
"""Returns None if a compiled kernel serves the query, else the reason why none does."""


def no_kernels(query: KernelQuery) -> str | None:
    """The support of an installation without compiled kernels."""
    return f"no compiled kernels for device {query.device.type}"


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels of an installation: what they support, and attention by them.

    `attend` has the signature and the meaning of `cache.view.attend`, and is called only for what `support`
    accepts; a RuntimeError from it makes the cache go on with torch.
    """

    support: KernelSupport
    attend: Attend


NO_KERNELS = Kernels(no_kernels, attend)


@dataclass(frozen=True)
class Request:
    """What the user asked for.  `compute="auto"` takes the best that the device can have.

    Raises:
        UserError: an unknown store or compute.
    """

    store: Store = "contiguous"
    compute: Literal["auto", "kernel", "torch"] = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.store not in get_args(Store):
            raise UserError(f"store={self.store}: accepted are {', '.join(get_args(Store))}")
        if self.compute not in ("auto", "kernel", "torch"):
            raise UserError(f"compute={self.compute}: accepted are auto, kernel, torch")


@dataclass(frozen=True)
class Fallback:
    """Something wanted that the run did not get, and why."""

    wanted: str
    got: str
    reason: str

    def __str__(self) -> str:
        return f"{self.wanted} -> {self.got}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """What serves the run, and what had to be given up for it, in order."""

    store: Store
    compute: Compute
    fallbacks: tuple[Fallback, ...] = ()

    def __str__(self) -> str:
        return f"{self.store} {self.compute}"

    def fall_back(self, store: Store, compute: Compute, reason: str) -> Choice:
        """The choice after a failure at run time, e.g. a page pool that ran out."""
        fallback = Fallback(wanted=str(self), got=f"{store} {compute}", reason=reason)
        return Choice(store, compute, (*self.fallbacks, fallback))


def choose(request: Request, query: KernelQuery, support: KernelSupport = no_kernels) -> Choice:
    """Choose store and compute for `request` in the situation that `query` describes.

    On a CPU, torch is what "auto" means and no fallback; everywhere else each kernel that was passed over
    is one.

    Example: paged, auto, on a GPU whose kernels lack the paged form -> ("contiguous", "kernel", one
    fallback).

    Raises:
        UserError: `request.strict` and something else than the request would serve; the line names each
            reason.
    """
    if request.compute == "torch" or (request.compute == "auto" and query.device.type == "cpu"):
        return Choice(request.store, "torch")
    stores: tuple[Store, ...] = ("paged", "contiguous") if request.store == "paged" else ("contiguous",)
    choice = Choice(request.store, "torch")
    passed_over: list[tuple[Store, str]] = []
    for store in stores:
        reason = support(replace(query, store=store))
        if reason is None:
            choice = Choice(store, "kernel")
            break
        passed_over.append((store, reason))
    fallbacks = tuple(Fallback(f"{store} kernel", str(choice), reason) for store, reason in passed_over)
    choice = replace(choice, fallbacks=fallbacks)
    if request.strict:
        refuse(choice)
    return choice


def refuse(choice: Choice) -> None:
    """Raise for the fallbacks of a strict run.

    Raises:
        UserError: `choice` has a fallback.
    """
    if choice.fallbacks:
        raise UserError("strict run: " + "; ".join(str(fallback) for fallback in choice.fallbacks))


@cache
def log_once(fallback: Fallback) -> None:
    """Log a fallback once in the life of the process, however many caches meet it."""
    logger.warning("fallback: %s", fallback)
