"""The metric of errors of stored vectors: their effect on the model's predictions.

An error d of a stored key or value changes the next-token distribution by a KL divergence of d F d^T / 2, to
second order.  F = E[g g^T] is the Fisher information of the vector (a row here), g the gradient of the
log-likelihood of a token drawn from the model's own distribution.  So codebooks minimise the squared error of
x F^(1/2), not of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

REGULARISATION = 0.03  # of the mean eigenvalue: directions that the calibration text left out still count


def metric_root(information: Tensor, regularisation: float = REGULARISATION) -> tuple[Tensor, Tensor]:
    """F^(1/2) and F^(-1/2), symmetric, of positive semidefinite F [..., D, D]: float64.

    `regularisation` times its mean eigenvalue is added to F, which is then scaled to a determinant of 1.  If
    F is zero, both roots are the identity.
    """
    values, vectors = torch.linalg.eigh(information.double())
    mean = values.clamp(min=0).mean(-1, keepdim=True)
    values = values.clamp(min=0) + regularisation * mean
    values = torch.where(mean > 0, values, 1.0)
    values = values / values.log().mean(-1, keepdim=True).exp()
    roots = values.sqrt()[..., None, :]
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
