"""The compiled ops: their schemas, fake implementations and the functions that call them.

The ops exist (`torch.ops.million.*`) once this module is imported, so that `torch.compile` and `opcheck`
know them; they run once `load()` has brought the library in.  All write into tensors they are given, allocate
nothing and never synchronise: lengths are read on the device, so a CUDA graph can hold them.

Letters: B batch, Hq/Hkv heads, T tokens, D head_dim, M subspaces, P page size, R residual window.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from million_cli.ops import heuristics
from million_cli.ops.build import KernelsUnavailable, Target, build, device_architectures

_LIBRARY = torch.library.Library("million", "DEF")

_LIBRARY.define(
    "pq_encode(Tensor x, Tensor centroids, Tensor? rotation, Tensor(a!) codes, Tensor? block_table, "
    "Tensor(b!)? workspace, int start, int page_size, int layout) -> ()"
)
_LIBRARY.define(
    "append(Tensor keys, Tensor values, Tensor lengths, Tensor(a!) key_window, Tensor(b!) value_window, "
    "Tensor(c!) key_codes, Tensor(d!) value_codes, Tensor? block_table, Tensor key_centroids, "
    "Tensor value_centroids, Tensor? key_rotation, Tensor? value_rotation, int page_size, int key_layout, "
    "int value_layout) -> ()"
)
_LIBRARY.define(
    "paged_decode(Tensor q, Tensor key_pool, Tensor value_pool, Tensor block_table, Tensor lengths, "
    "Tensor? first_valid, Tensor key_table, Tensor value_table, Tensor? key_rotation, "
    "Tensor? value_rotation, Tensor key_window, Tensor value_window, Tensor(a!) workspace, Tensor(b!) out, "
    "float scale, int page_size, int heads, int blocks) -> ()"
)

_LIBRARY.define(
    "contiguous_decode(Tensor q, Tensor key_codes, Tensor value_codes, Tensor lengths, Tensor? first_valid, "
    "Tensor key_table, Tensor value_table, Tensor? key_rotation, Tensor? value_rotation, Tensor key_window, "
    "Tensor value_window, Tensor(a!) workspace, Tensor(b!) out, float scale, int page_size, "
    "int value_layout, int splits) -> ()"
)


def _writes_only(*arguments: object) -> None:
    """The fake implementation of all: results go into tensors that the caller made."""


for _name in ("pq_encode", "append", "paged_decode", "contiguous_decode"):
    torch.library.register_fake(f"million::{_name}", _writes_only, lib=_LIBRARY)


class CodeLayout(IntEnum):
    """Order of the codes in a page; the numbers are those of kernels/common.cuh."""

    ROW = 0
    TRANSPOSED = 1
    FRAGMENT_KEYS = 2
    FRAGMENT_VALUES = 3


@cache
def load() -> None:
    """Bring the compiled ops into this process, building the library if it is not in the cache.

    Raises:
        KernelsUnavailable: no GPU, no nvcc, or a build or load that failed.
    """
    target = Target(device_architectures())
    (library,) = build()
    try:
        torch.ops.load_library(str(library))
    except OSError:  # the entry is intact but does not load, e.g. after a change of system libraries
        target.library.unlink(missing_ok=True)
        (library,) = build()
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise KernelsUnavailable(f"{library} does not load: {error}") from error


def pq_encode(
    x: Tensor,
    centroids: Tensor,
    rotation: Tensor | None,
    codes: Tensor,
    block_table: Tensor | None,
    *,
    start: int,
    page_size: int,
    layout: CodeLayout,
) -> None:
    """Encode x [B, Hkv, T, D] (float16 or bfloat16) as the tokens start .. start + T - 1 of `codes`.

    Args:
        centroids: float32 [Hc, M, 256, dsub], Hc 1 or Hkv.
        rotation: float32 [Hr, D, D] or None; x_rot = x @ R comes first, in float32.
        codes: uint8, written: a pool [pages, Hkv, ...] with `block_table`, else pages [B, Hkv, n, ...].
        block_table: int32 [B, max_pages] or None.
        start: first position; it and T are multiples of 16.

    Long inputs in subspaces of one dim are searched in sorted centroids, of two dims through grids, in a
    transient workspace of `heuristics.encode_workspace_bytes` (16.8 MB for 32 heads of 64 subspaces); the
    codes are the same.

    Raises:
        RuntimeError: a shape or dtype that does not fit; the line names it.
    """
    load()
    workspace = None
    if x.dim() == centroids.dim() == 4:  # the op names what is wrong with others
        (B, H, T, _), (Hc, M, _, dsub) = x.shape, centroids.shape
        size = heuristics.encode_workspace_bytes(B * H * T // max(Hc, 1), Hc * M, dsub)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
    torch.ops.million.pq_encode(
        x, centroids, rotation, codes, block_table, workspace, start, page_size, int(layout)
    )


def append(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    block_table: Tensor | None,
    key_centroids: Tensor,
    value_centroids: Tensor,
    key_rotation: Tensor | None,
    value_rotation: Tensor | None,
    *,
    page_size: int,
    key_layout: CodeLayout = CodeLayout.FRAGMENT_KEYS,
    value_layout: CodeLayout = CodeLayout.FRAGMENT_VALUES,
) -> None:
    """Store one new token a sequence in the window; encode the window's oldest page where that is due.

    Args:
        keys, values: [B, Hkv, D], the newest token.
        lengths: int32 [B] on the device, tokens of each sequence with the new one.
        key_window, value_window: [B, Hkv, R, D], position p in slot p mod R; written.
        key_codes, value_codes, block_table, centroids, rotation: as in `pq_encode`; codes are written.

    Raises:
        RuntimeError: a shape or dtype that does not fit; the line names it.
    """
    load()
    torch.ops.million.append(
        keys, values, lengths, key_window, value_window, key_codes, value_codes, block_table,
        key_centroids, value_centroids, key_rotation, value_rotation,
        page_size, int(key_layout), int(value_layout),
    )  # fmt: skip


@dataclass(frozen=True)
class DecodePlan:
    """Launch of a paged decode for one shape on one device, with the memory it works in.

    Launches that may overlap need a workspace each.
    """

    heads: int
    blocks: int
    workspace: Tensor

    @classmethod
    def make(cls, batch: int, q_heads: int, kv_heads: int, head_dim: int, device: torch.device) -> DecodePlan:
        group = q_heads // kv_heads
        heads = heuristics.heads_per_block(group)
        sets = batch * kv_heads * heuristics.head_sets(group, heads)
        blocks = heuristics.decode_blocks(
            sets, torch.cuda.get_device_properties(device).multi_processor_count
        )
        size = heuristics.workspace_bytes(sets, heads, head_dim, blocks)
        return cls(heads, blocks, torch.empty(size, dtype=torch.uint8, device=device))


def code_major(centroids: Tensor) -> Tensor:
    """Table of the decode kernel: centroids [Hc, M, 256, dsub] -> float16 [Hc, 256, D]."""
    Hc, M, C, dsub = centroids.shape
    return centroids.transpose(1, 2).reshape(Hc, C, M * dsub).to(torch.float16).contiguous()


def paged_decode(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    first_valid: Tensor | None,
    key_table: Tensor,
    value_table: Tensor,
    key_rotation: Tensor | None,
    value_rotation: Tensor | None,
    key_window: Tensor,
    value_window: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    page_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query token a sequence to codes in pages and to the window; one launch.

    Args:
        q: [B, Hq, D] float16 or bfloat16, not rotated by the quantizer.
        key_pool, value_pool: uint8 [pages, Hkv, P / 16, 16 * M], fragment order.
        block_table: int32 [B, max_pages].
        lengths: int32 [B], all tokens of a sequence; WindowSpec.coded_length(length) of them are codes.
        first_valid: int32 [B] or None, tokens before it are padding.
        key_table, value_table: float16 [Hc, 256, D] of `code_major`.
        key_rotation, value_rotation: float32 [Hr, D, D] or None: scores are q R . k_rot, results o_rot R^T.
        key_window, value_window: [B, Hkv, R, D] in q's dtype, position p in slot p mod R.
        scale: factor of the scores, positive.

    Returns:
        [B, Hq, D] in q's dtype (`out`, if given); zeros where a sequence has no valid token.

    Raises:
        RuntimeError: a shape or dtype that does not fit; the line names it.
    """
    load()
    out = torch.empty_like(q) if out is None else out
    torch.ops.million.paged_decode(
        q, key_pool, value_pool, block_table, lengths, first_valid, key_table, value_table,
        key_rotation, value_rotation, key_window, value_window, plan.workspace, out,
        scale, page_size, plan.heads, plan.blocks,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class LookupPlan:
    """Launch of a contiguous decode for one shape on one device.

    The workspace is zero before and after every launch; launches that may overlap need one each.
    """

    splits: int
    workspace: Tensor

    @classmethod
    def make(cls, batch: int, q_heads: int, head_dim: int, device: torch.device) -> LookupPlan:
        rows = batch * q_heads
        splits = heuristics.lookup_splits(
            rows, torch.cuda.get_device_properties(device).multi_processor_count
        )
        size = heuristics.lookup_workspace_bytes(rows, head_dim, splits)
        return cls(splits, torch.zeros(size, dtype=torch.uint8, device=device))


def contiguous_decode(
    q: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    lengths: Tensor,
    first_valid: Tensor | None,
    key_table: Tensor,
    value_table: Tensor,
    key_rotation: Tensor | None,
    value_rotation: Tensor | None,
    key_window: Tensor,
    value_window: Tensor,
    plan: LookupPlan,
    *,
    scale: float,
    page_size: int,
    value_layout: CodeLayout = CodeLayout.ROW,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_decode` over contiguous codes, scores by a table of fp16 entries, in less shared memory.

    Args:
        key_codes: uint8 [B, Hkv, capacity, M] rows; capacity is a multiple of P.
        value_codes: the same, or with TRANSPOSED pages [B, Hkv, capacity / P, M, P].
        page_size: P, the number of tokens that become codes at a time.
        All else as in `paged_decode`.

    Raises:
        RuntimeError: a shape or dtype that does not fit; the line names it.
    """
    load()
    out = torch.empty_like(q) if out is None else out
    torch.ops.million.contiguous_decode(
        q, key_codes, value_codes, lengths, first_valid, key_table, value_table, key_rotation, value_rotation,
        key_window, value_window, plan.workspace, out, scale, page_size, int(value_layout), plan.splits,
    )  # fmt: skip
    return out
