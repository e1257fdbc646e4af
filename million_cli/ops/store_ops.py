"""One layer of a cache as device tensors, and the operations over it that have a compiled form.

Letters: B batch, Hq/Hkv query and KV heads, T tokens, D head_dim, P page size, R residual window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from million_cli.ops.layouts import Layout
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import PQSpec


@dataclass(frozen=True)
class DeviceLayer:
    """The tensors that a launch over one layer reads and writes; see `WindowSpec` for which tokens are where.

    Attributes:
        pq_keys, pq_values: what codes mean, on the device.
        key_codes, value_codes: uint8.  Paged: pools `[num_pages, Hkv, *page_shape]`; contiguous: rows
            `[B, Hkv, capacity, row_bytes]`, capacity a multiple of P.
        block_table: int32 `[B, width]`, the pages of each sequence in order; None if contiguous.
        key_window, value_window: `[B, Hkv, R, D]` in the model's dtype, position p in slot p mod R.
        lengths: int32 `[B]` on the device, tokens of each sequence, the newest included.
        page_size: P.
        key_map: float32 `[Ht, D, D]`, the map of keys that `append` encodes out of the window: they belong to
            one block of positions, see `pq.rebase`.  None: keys are not rebased.
    """

    pq_keys: LayerPQ
    pq_values: LayerPQ
    key_codes: Tensor
    value_codes: Tensor
    block_table: Tensor | None
    key_window: Tensor
    value_window: Tensor
    lengths: Tensor
    page_size: int
    key_map: Tensor | None = None


class StoreOps(Protocol):
    """The operations of a store that need not be torch's.  All raise RuntimeError where they fail."""

    def layouts(self, spec: PQSpec, page_size: int) -> tuple[Layout, Layout]:
        """The layouts of key and value pages that these operations read and write."""
        ...

    def encode(self, layer: DeviceLayer, keys: Tensor, values: Tensor, start: int) -> None:
        """Encode `[B, Hkv, T, D]`, whole pages, as the tokens start .. start + T - 1."""
        ...

    def append(self, layer: DeviceLayer, keys: Tensor, values: Tensor) -> None:
        """Store the newest token of each sequence, `[B, Hkv, D]`, in the window; `lengths` counts it already.

        Where a page became due, it is encoded out of the window.
        """
        ...

    def attend(
        self, query: Tensor, layer: DeviceLayer, *, scale: float, first_valid: Tensor | None
    ) -> Tensor:
        """Attention of the newest token, `query [B, Hq, D]`, over codes and window: `[B, Hq, D]`.

        first_valid: int32 `[B]` on the device or None; tokens before it (left padding) are not seen.
        """
        ...


class KernelFailed(RuntimeError):  # noqa: N818 (a state, as PagePoolExhausted)
    """A compiled operation failed; the cache can continue in torch."""


def run_operation(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a compiled operation; what fails in it, short of memory, is a `KernelFailed` of one line."""
    try:
        return operation(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise KernelFailed(str(error).splitlines()[0]) from error
