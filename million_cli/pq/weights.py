"""How much each sampled vector counts in k-means: by what an error of it would change.

The metric F = E[g g^T] weighs the directions of an error, the same for all vectors of a head.  Their own
gradients differ as well: most vectors hardly matter, and a few are attended to by many queries.  So vector t,
with the gradient g_t, counts

    w_t = (min(max(|g_t|^2 / mean |g|^2, LEAST), MOST))^POWER,

scaled to a mean of 1.  g_t is one draw of what is needed, E[|g|^2 | x]: the power and the bounds keep a few
draws from deciding over all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.pq.samples import LayerSamples

LEAST, MOST, POWER = 1e-3, 20.0, 0.5


def weights_of(squares: Tensor) -> Tensor:
    """Weights with a mean of 1 of squared gradients |g|^2 [..., n], over the last dimension: float32.

    Negative squares are not known: such vectors count as the mean of the others.  Where none is known, or all
    are zero, the weights are 1.
    """
    squares = squares.double()
    known = squares >= 0
    relative = (squares / _mean(squares, known)).clamp(LEAST, MOST).pow(POWER)
    weights = torch.where(known, relative / _mean(relative, known), 1.0)
    return torch.where(weights.isfinite().all(-1, keepdim=True), weights, 1.0).float()


@dataclass(frozen=True)
class Weights:
    """`weights_of` each layer's squares [Hkv, n]."""

    squares: LayerSamples

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, i: int) -> Tensor:
        return weights_of(self.squares[i])


def _mean(x: Tensor, known: Tensor) -> Tensor:
    """Of those known, [..., n] -> [..., 1]; NaN where there are none."""
    return torch.where(known, x, 0.0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
