"""Which store and compute serve a run: one pure function, and the record of all fallbacks.

The order of preference is paged kernel > contiguous kernel > torch.  `ops.support.support` returns the reason
why a kernel cannot serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.paged import PagedStore
from million_cli.cache.store import CodeStore
from million_cli.errors import UserError
from million_cli.ops.store_ops import StoreOps
from million_cli.ops.support import KernelQuery, Store, support

Compute = Literal["kernel", "torch"]
KernelSupport = Callable[[KernelQuery], str | None]
"""Returns None if a compiled kernel serves the query, else the reason why none does."""

logger = logging.getLogger("million")


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels of an installation: what they support, and the operations of one store.

    `make_ops` is called only for what `support` accepts; when an operation fails, the cache goes
    on with torch.
    """

    support: KernelSupport
    make_ops: Callable[[Store], StoreOps]


STORES: dict[Store, type[CodeStore]] = {store.name: store for store in (PagedStore, ContiguousStore)}
"""In the order in which kernels are preferred; a store falls back to those after it."""


def _compiled_ops(store: Store) -> StoreOps:
    return STORES[store].compiled_ops()


COMPILED = Kernels(support, _compiled_ops)


@dataclass(frozen=True)
class Request:
    """The user's request.  `compute="auto"` takes the best for the device.

    Raises:
        UserError: an unknown store or compute.
    """

    store: Store = ContiguousStore.name
    compute: Literal["auto", "kernel", "torch"] = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise UserError(f"store={self.store}: accepted are {', '.join(STORES)}")
        if self.compute not in ("auto", "kernel", "torch"):
            raise UserError(f"compute={self.compute}: accepted are auto, kernel, torch")


@dataclass(frozen=True)
class Fallback:
    """One fallback: what was wanted, what is used instead, and the reason."""

    wanted: str
    got: str
    reason: str

    def __str__(self) -> str:
        return f"{self.wanted} -> {self.got}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """Store and compute of a run, and the fallbacks that led there, in order."""

    store: Store
    compute: Compute
    fallbacks: tuple[Fallback, ...] = ()

    def __str__(self) -> str:
        return f"{self.store} {self.compute}"

    def fall_back(self, store: Store, compute: Compute, reason: str) -> Choice:
        """The choice after a failure at run time, e.g. a page pool that ran out."""
        fallback = Fallback(wanted=str(self), got=f"{store} {compute}", reason=reason)
        return Choice(store, compute, (*self.fallbacks, fallback))


def choose(request: Request, query: KernelQuery, support: KernelSupport = support) -> Choice:
    """Choose store and compute for `request` in the situation that `query` describes.

    On a CPU "auto" means torch, which is no fallback.  On other devices each kernel that was passed over is
    a fallback.

    Example: paged, auto, on a GPU whose kernels lack the paged form -> ("contiguous", "kernel", one
    fallback).

    Raises:
        UserError: `request.strict` and the choice would be a fallback; the line names each reason.
    """
    if request.compute == "torch" or (request.compute == "auto" and query.device.type == "cpu"):
        return Choice(request.store, "torch")
    stores = list(STORES)
    choice = Choice(request.store, "torch")
    passed_over: list[tuple[Store, str]] = []
    for store in stores[stores.index(request.store) :]:
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


def beyond_positions(positions: int | None, length: int) -> Fallback | None:
    """What a text of `length` tokens lacks with codes for `positions` (see `CodebookMeta`), or None."""
    if positions is None or length <= positions:
        return None
    return Fallback(
        "codes for every position",
        f"codes for the first {positions}",
        "the text goes on beyond those that the codebook was calibrated for, where its errors are larger",
    )


def refuse(choice: Choice) -> None:
    """Raise for the fallbacks of a strict run.

    Raises:
        UserError: `choice` has a fallback.
    """
    if choice.fallbacks:
        raise UserError("strict run: " + "; ".join(str(fallback) for fallback in choice.fallbacks))


@cache
def log_once(fallback: Fallback) -> None:
    """Log a fallback once in a process, however many caches have it."""
    logger.warning("fallback: %s", fallback)
