"""What the compiled ops support, as data, and functions that answer with the reason they do not.

The table below is what kernels/instances/ compiles; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from million_cli.errors import UserError
from million_cli.ops.build import SHARED_KIB
from million_cli.ops.fragment import DSUBS
from million_cli.spec import CodeSpec, PQSpec, WindowSpec

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
NBITS = 8
MAX_GROUP = 16

Store = Literal["paged", "contiguous"]
"""The paged decode kernel reads pages in fragment order, the lookup-table kernel contiguous rows."""


@dataclass(frozen=True)
class DecodeQuery:
    """All that decides whether the decode kernel of `store` serves; `arch` is the compute capability."""

    arch: int
    dtype: torch.dtype
    spec: PQSpec
    window: WindowSpec
    group: int
    store: Store = "paged"


def codes_reason(spec: CodeSpec) -> str | None:
    """None if the kernels know codes of `spec`, else why not."""
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim={spec.head_dim}, supported are {_list(HEAD_DIMS)}"
    if spec.nbits != NBITS:
        return f"nbits={spec.nbits}, supported is {NBITS}"
    if spec.dsub not in DSUBS:
        accepted = _list(spec.head_dim // d for d in DSUBS)
        return f"M={spec.M}, supported for head_dim={spec.head_dim} are {accepted}"
    return None


def min_shared_kib(store: Store, spec: PQSpec) -> int:
    """KiB of shared memory that a block of the decode kernel needs at least.

    Paged: both centroid tables of a head (fp16) beside a ring of codes, which takes what there is.
    Contiguous: the values' table and the scores of every key code.

    Example: paged, head_dim 128 -> 163; contiguous, 128 key codes a token -> 131.
    """
    D, MK = spec.keys.head_dim, spec.keys.M
    if store == "paged":
        return 163 if D > 64 else 99
    return 131 if MK > 64 else 99


def decode_reason(query: DecodeQuery) -> str | None:
    """None if the decode kernel serves `query`, else why not."""
    if query.dtype not in DTYPES:
        return f"dtype={_name(query.dtype)}, supported are {_list(map(_name, DTYPES))}"
    for side in (query.spec.keys, query.spec.values):
        reason = codes_reason(side)
        if reason is not None:
            return reason
    if not 1 <= query.group <= MAX_GROUP:
        return f"{query.group} query heads for each key/value head, supported are 1 to {MAX_GROUP}"
    if query.arch not in SHARED_KIB:
        return f"compute capability {query.arch}, supported are {_list(SHARED_KIB)}"
    needed = min_shared_kib(query.store, query.spec)
    if SHARED_KIB[query.arch] < needed:
        keys = query.spec.keys
        codes = f" with M={keys.M} of keys" if query.store == "contiguous" else ""
        return (
            f"compute capability {query.arch} gives a block {SHARED_KIB[query.arch]} KiB of shared memory, "
            f"the tables of head_dim={keys.head_dim}{codes} need {needed}"
        )
    return None


def require(query: DecodeQuery) -> None:
    """Raise unless the decode kernel serves `query`.

    Raises:
        UserError: the one line says what is supported.
    """
    reason = decode_reason(query)
    if reason is not None:
        raise UserError(f"no compiled decode: {reason}")


def _list(values: object) -> str:
    return ", ".join(map(str, values))  # type: ignore[call-overload]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
