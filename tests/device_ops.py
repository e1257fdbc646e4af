"""`StoreOps` in torch that read lengths on the device only, as kernels do: no launch depends on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_ops import TorchOps

from million_cli.ops.layouts import Layout
from million_cli.ops.store_ops import DeviceLayer
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.codec import decode, encode


class DeviceOps(TorchOps):
    """`append` and `attend` over all there is room for, masked by lengths; `encode` is that of `TorchOps`."""

    def append(self, layer: DeviceLayer, keys: Tensor, values: Tensor) -> None:
        self._count("append")
        P, R = layer.page_size, layer.key_window.shape[2]
        B = keys.shape[0]
        sequences, lengths = torch.arange(B), layer.lengths.long()
        layer.key_window[sequences, :, (lengths - 1) % R] = keys
        layer.value_window[sequences, :, (lengths - 1) % R] = values
        coded = _coded(lengths, P, R)
        due = coded > _coded(lengths - 1, P, R)
        page = (coded // P - 1).clamp(min=0)
        slots = (page[:, None] * P + torch.arange(P)) % R
        for window, pq, mapped, stored, layout in zip(
            (layer.key_window, layer.value_window),
            (layer.pq_keys, layer.pq_values),
            (layer.key_map, None),
            self._codes(layer),
            self._layouts_of(layer),
            strict=True,
        ):
            tokens = window.gather(
                2, slots[:, None, :, None].expand(-1, window.shape[1], -1, window.shape[3])
            )
            if mapped is not None:  # as a kernel does: one map, whatever the position
                tokens, pq = tokens @ mapped.to(tokens.dtype), LayerPQ(pq.spec, pq.centroids)
            new = layout.pack(encode(tokens, pq))  # [B, Hkv, *page_shape]
            if layer.block_table is not None:
                at = layer.block_table.long().gather(1, page[:, None])[:, 0]
                keep = due.view(-1, *[1] * (new.ndim - 1))
                stored[at] = torch.where(keep, new, stored[at])
            else:
                rows = page[:, None] * P + torch.arange(P)
                old = stored[sequences[:, None], :, rows].transpose(1, 2)
                new = torch.where(due[:, None, None, None], new, old)
                stored[sequences[:, None], :, rows] = new.transpose(1, 2)

    def attend(
        self, query: Tensor, layer: DeviceLayer, *, scale: float, first_valid: Tensor | None
    ) -> Tensor:
        self._count("attend")
        self.first_valid.append(first_valid)
        P, R = layer.page_size, layer.key_window.shape[2]
        lengths = layer.lengths.long()[:, None]
        coded = _coded(lengths, P, R)
        quantizers = (layer.pq_keys, layer.pq_values)
        dense = [
            _dense(layer, *side, query.dtype)
            for side in zip(self._codes(layer), self._layouts_of(layer), quantizers, strict=True)
        ]
        positions = torch.arange(dense[0].shape[2])[None]
        slots = torch.arange(R)[None]
        in_window = lengths - 1 - (lengths - 1 - slots) % R  # the newest position in each slot
        seen = torch.cat([positions < coded, (in_window >= coded) & (in_window >= 0)], 1)
        if first_valid is not None:
            seen = seen & (
                torch.cat([positions.expand(len(lengths), -1), in_window], 1) >= first_valid[:, None]
            )
        keys = torch.cat([dense[0], layer.key_window], 2)
        values = torch.cat([dense[1], layer.value_window], 2)
        grouped = query.unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, D]
        scores = grouped @ keys.mT * scale
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ values).flatten(1, 2)


def _coded(lengths: Tensor, P: int, R: int) -> Tensor:
    return (lengths - (R - P)).clamp(min=0) // P * P


def _dense(layer: DeviceLayer, codes: Tensor, layout: Layout, pq: LayerPQ, dtype: torch.dtype) -> Tensor:
    """All places of one side, used or not, decoded: `[B, Hkv, places, D]`."""
    if layer.block_table is None:
        return decode(layout.unpack(codes), pq, dtype)
    pages = layout.unpack(codes[layer.block_table.long()])  # [B, width, Hkv, P, M]
    return decode(pages.transpose(1, 2).flatten(2, 3), pq, dtype)
