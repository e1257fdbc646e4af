"""Whether the compiled operations can serve a cache here and now, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from million_cli.ops.build import SHARED_KIB, KernelsUnavailable, device_architectures
from million_cli.ops.dispatch import DecodeQuery, Store, decode_reason
from million_cli.spec import PQSpec, WindowSpec

__all__ = ["KernelQuery", "Store", "support"]


@dataclass(frozen=True)
class KernelQuery:
    """All that decides whether compiled kernels can serve: where, over which codes, for which heads."""

    store: Store
    device: torch.device
    dtype: torch.dtype
    specs: tuple[PQSpec, ...]  # of each layer
    window: WindowSpec
    num_kv_heads: int
    group: int  # G = Hq / Hkv
    softcap: bool = False  # scores are capped by a tanh
    sinks: bool = False  # a logit a head takes its share of the softmax
    rebase_every: int = 0  # tokens of a block whose keys share an origin (see `pq.rebase`), 0 without


def support(query: KernelQuery) -> str | None:
    """Why the compiled kernels cannot serve `query`, or None.

    The first query that they can serve brings the library into the process, compiled first if it is not in
    the cache of builds.  Other window sizes need no check: `WindowSpec` accepts those that the kernels do.
    """
    if query.device.type != "cuda":
        return f"no compiled kernels for device {query.device.type}"
    if query.rebase_every:
        return f"no compiled kernels for keys relative to blocks of {query.rebase_every} positions"
    if query.softcap:
        return "no compiled kernels for softcapped scores"
    if query.sinks:
        return "no compiled kernels for attention sinks"
    try:
        # One library serves all visible GPUs, built for the one with the least shared memory.
        arch = min(device_architectures(), key=SHARED_KIB.__getitem__)
        reasons = (
            decode_reason(DecodeQuery(arch, query.dtype, spec, query.window, query.group, query.store))
            for spec in query.specs
        )
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            from million_cli.ops import compiled  # registers the ops with torch: only where they can run

            compiled.load()
    except KernelsUnavailable as error:
        return str(error).splitlines()[0].rstrip(":")
    return reason
