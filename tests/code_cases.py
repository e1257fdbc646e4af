"""Quantizers and vectors to encode, and the distances that decide their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from million_cli.pq.codebook import LayerPQ
from million_cli.pq.rotation import random_hadamard
from million_cli.pq.transform import Transform
from million_cli.spec import CodeSpec

B, H, T = 2, 3, 17


def make(D: int, M: int, nbits: int, Hc: int = 1, Hr: int = 0, seed: int = 0) -> tuple[LayerPQ, Tensor]:
    """A quantizer with random tables, and vectors that lie far from the origin, as keys do."""
    torch.manual_seed(seed)
    spec = CodeSpec(D, M, nbits)
    offset = torch.randn(D) * 10
    centroids = torch.randn(Hc, M, spec.C, spec.dsub) + offset.view(M, 1, spec.dsub)
    transform = (
        Transform.rotation(torch.stack([random_hadamard(D, h).float() for h in range(Hr)])) if Hr else None
    )
    return LayerPQ(spec, centroids, transform), torch.randn(B, H, T, D, dtype=torch.float64) + offset


def distances(x: Tensor, pq: LayerPQ) -> Tensor:
    """float64 [B, H, T, M, C] by the definition."""
    x = x.double() if pq.transform is None else x.double() @ pq.transform.encode.double()
    x = x.view(*x.shape[:3], pq.spec.M, 1, pq.spec.dsub)
    return (x - pq.centroids.double()[:, None]).square().sum(-1)
