"""One side of a model, keys or values, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from million_cli.pq.samples import LayerSamples, SomeLayers, Thinned, layers


@dataclass(frozen=True)
class Side:
    """Samples and information of one side.

    samples: [L, Hkv, n, D], for training; held: [L, Hkv, n', D], on which errors are measured;
    information: [L, Hkv, D, D] or None; squares: [L, Hkv, n] of the samples, or None.
    """

    samples: LayerSamples
    held: LayerSamples
    information: Tensor | None
    squares: LayerSamples | None
    rotation: str
    metric: str

    def part(self, positions: Sequence[int]) -> Side:
        """The layers at `positions`."""
        return replace(
            self,
            samples=SomeLayers(self.samples, positions),
            held=SomeLayers(self.held, positions),
            information=None if self.information is None else self.information[list(positions)],
            squares=None if self.squares is None else SomeLayers(self.squares, positions),
        )

    def thinned(self, most: int, seed: int) -> Side:
        """A copy in memory with at most `most` samples of each kind."""

        def few(part: LayerSamples) -> list[Tensor]:
            return list(layers(Thinned(part, most, seed)))

        samples = few(self.samples)
        return replace(
            self,
            samples=samples,
            held=samples if self.held is self.samples else few(self.held),
            squares=None if self.squares is None else few(self.squares),
        )
