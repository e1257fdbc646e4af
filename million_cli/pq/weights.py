"""Weights of sampled vectors in k-means: the effect of their errors on the predictions.

The metric F = E[g g^T] weighs the directions of an error, alike for all vectors of a head.  The gradients of
single vectors differ as well: most vectors hardly matter, and many queries attend to a few.  So vector t,
with the gradient g_t, has the weight

    w_t = (min(max(|g_t|^2 / mean |g|^2, LEAST), MOST))^POWER,

scaled to a mean of 1.  |g_t|^2 is one draw, and E[|g|^2 | x] is needed: the power and the bounds keep a few
draws from outweighing all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.pq.samples import LayerSamples

LEAST, MOST, POWER = 1e-3, 20.0, 0.5


def weights_of(squares: Tensor) -> Tensor:
    """Weights with a mean of 1 of squared gradients |g|^2 [..., n], over the last dimension: float32.

    Negative squares mean unknown: such vectors get the mean of the others.  If none is known, or all are
    zero, the weights are 1.
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
    """Mean of the known ones: [..., n] -> [..., 1]; NaN if there are none."""
    return torch.where(known, x, 0.0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
