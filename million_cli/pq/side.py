"""One side of a model, keys or values, as training takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from million_cli.pq.metric import Metric
from million_cli.pq.samples import LayerSamples, SomeLayers, Thinned, layers


@dataclass(frozen=True)
class Side:
    """What is known of one side, and how it is mapped.

    samples: [L, Hkv, n, D]; information: [L, Hkv, D, D] or None; squares: [L, Hkv, n] or None.
    """

    samples: LayerSamples
    information: Tensor | None
    squares: LayerSamples | None
    rotation: str
    metric: Metric

    def part(self, positions: Sequence[int]) -> Side:
        """Some of its layers."""
        return replace(
            self,
            samples=SomeLayers(self.samples, positions),
            information=None if self.information is None else self.information[list(positions)],
            squares=None if self.squares is None else SomeLayers(self.squares, positions),
        )

    def thinned(self, most: int, seed: int) -> Side:
        """With at most that many samples, in memory."""
        samples, squares = (
            None if part is None else list(layers(Thinned(part, most, seed)))
            for part in (self.samples, self.squares)
        )
        assert samples is not None
        return replace(self, samples=samples, squares=squares)
