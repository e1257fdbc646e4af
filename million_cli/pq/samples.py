"""Samples of one side of a model, a layer at a time, so that one layer alone need be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LayerSamples(Protocol):
    """Vectors [Hkv, n, D] of each layer, any float dtype; a tensor [L, Hkv, n, D] is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Thinned:
    """At most `most` of each layer's vectors, the same random choice for all layers and heads."""

    samples: LayerSamples
    most: int
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Tensor:
        layer = self.samples[i]
        n = layer.shape[1]
        if n <= self.most:
            return layer
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: self.most]
        return layer[:, rows.to(layer.device)]


@dataclass(frozen=True)
class Rows:
    """The vectors of each layer at the given indices, int64 [n']."""

    samples: LayerSamples
    rows: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Tensor:
        layer = self.samples[i]
        return layer[:, self.rows.to(layer.device)]


@dataclass(frozen=True)
class SomeLayers:
    """The layers at the given positions."""

    samples: LayerSamples
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Tensor:
        return self.samples[self.positions[i]]


@dataclass(frozen=True)
class Mapped:
    """Each layer's vectors times maps [L, Hkv, D, D], on the device and in the dtype of the maps."""

    samples: LayerSamples
    maps: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Tensor:
        return self.samples[i].to(self.maps) @ self.maps[i]


def layers(samples: LayerSamples) -> Iterator[Tensor]:
    """The layers in turn."""
    return (samples[i] for i in range(len(samples)))
