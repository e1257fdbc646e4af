"""The contiguous store: one row buffer of codes a layer and side, grown geometrically."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from million_cli.cache.store import CodeStore, Prefill
from million_cli.ops.codes import CodeReader, ContiguousCodes
from million_cli.ops.layouts import RowLayout
from million_cli.ops.store_ops import StoreOps
from million_cli.pq.codebook import LayerPQ
from million_cli.spec import WindowSpec


class ContiguousStore(CodeStore):
    """Codes in buffers `[B, Hkv, capacity, row_bytes]` uint8, keys and values in rows.

    Args:
        max_length: tokens to reserve room for at the first append; a longer text still grows the buffers.
            None: room for the tokens that are there, then a quarter more each time it is full.
    """

    name = "contiguous"

    def __init__(
        self,
        layers: Sequence[tuple[LayerPQ, LayerPQ]],
        window: WindowSpec | None = None,
        *,
        prefill: Prefill = "exact",
        encoder: str = "torch",
        max_length: int | None = None,
        ops: StoreOps | None = None,
    ) -> None:
        super().__init__(layers, window, prefill=prefill, encoder=encoder, ops=ops)
        self._reserved_tokens = self.window.coded_length(max_length or 0)
        P = self.window.page_size
        self._layouts = [(RowLayout(spec.keys, P), RowLayout(spec.values, P)) for spec in self.specs]
        assert ops is None or [ops.layouts(spec, P) for spec in self.specs] == self._layouts
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * self.num_layers

    @staticmethod
    def compiled_ops() -> StoreOps:
        from million_cli.ops.compiled_store import CompiledContiguous

        return CompiledContiguous()

    def _reserve(self, layer: int, coded: int, like: Tensor) -> None:
        B, Hkv = like.shape[:2]
        old = self._buffers[layer]
        capacity = 0 if old is None else old[0].shape[2]
        if old is not None and coded <= capacity:
            return
        P = self.window.page_size
        capacity = max(coded, self._reserved_tokens, self._expected, -(-capacity * 5 // 4 // P) * P)
        if self.ops is not None:
            capacity = max(capacity, P)  # a launch wants memory to point at
        new = [
            like.new_empty(B, Hkv, capacity, lay.spec.row_bytes, dtype=torch.uint8)
            for lay in self._layouts[layer]
        ]
        if old is not None:
            used = self.coded(layer)
            for source, target in zip(old, new, strict=True):
                target[:, :, :used] = source[:, :, :used]
        self._buffers[layer] = (new[0], new[1])

    def _is_reserved(self, layer: int, coded: int) -> bool:
        buffers = self._buffers[layer]
        return buffers is not None and coded <= buffers[0].shape[2]

    def _write(self, layer: int, start: int, key_codes: Tensor, value_codes: Tensor) -> None:
        buffers = self._buffers[layer]
        assert buffers is not None
        for buffer, layout, codes in zip(
            buffers, self._layouts[layer], (key_codes, value_codes), strict=True
        ):
            buffer[:, :, start : start + codes.shape[2]] = layout.pack(codes)

    def _readers(self, layer: int, coded: int) -> tuple[CodeReader, CodeReader]:
        buffers = self._buffers[layer]
        assert buffers is not None
        return (
            ContiguousCodes(buffers[0], self._layouts[layer][0], coded),
            ContiguousCodes(buffers[1], self._layouts[layer][1], coded),
        )

    def _code_tensors(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        buffers = self._buffers[layer]
        assert buffers is not None
        return (*buffers, None)

    def _truncate(self) -> None:
        pass  # rows past the length are overwritten

    def _take_codes(self, indices: Tensor) -> None:
        for layer, buffers in enumerate(self._buffers):
            if buffers is not None:
                keys, values = (buffer.index_select(0, indices.to(buffer.device)) for buffer in buffers)
                self._buffers[layer] = (keys, values)

    def _release(self) -> None:
        self._buffers = [None] * self.num_layers

    def _code_bytes(self) -> dict[str, int]:
        used, reserved = [0, 0], 0
        for layer, buffers in enumerate(self._buffers):
            for side, buffer in enumerate(buffers or ()):
                B, Hkv, _, row_bytes = buffer.shape
                filled = B * Hkv * self.coded(layer) * row_bytes
                used[side] += filled
                reserved += buffer.nbytes - filled
        return {"key_codes": used[0], "value_codes": used[1], "block_table": 0, "pool_reserved": reserved}
