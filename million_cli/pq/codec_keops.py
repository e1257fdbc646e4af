"""The nearest centroid by PyKeOps: compiled at first use, never holding a block of distances.

Imported only when chosen, because PyKeOps looks for compilers when it is imported.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor

from million_cli.errors import UserError

if not os.environ.get("CXX") and shutil.which("g++") is None:  # without it PyKeOps fails later and obscurely
    raise UserError("encoder=keops needs the compiler g++, which is not installed; use encoder=torch")
for _variable in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE"):  # it prints to stdout otherwise
    os.environ.setdefault(_variable, "0")
try:
    from pykeops.torch import LazyTensor
except ImportError as error:
    raise UserError(
        f"encoder=keops needs PyKeOps, which cannot be imported ({error}); use encoder=torch"
    ) from error


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid: points [N, n, dsub], centroids [N, C, dsub] -> int64 [N, n].

    The same definition as `codec.nearest_centroid`.
    """
    x = LazyTensor(points.contiguous()[:, :, None])
    c = LazyTensor(centroids.contiguous()[:, None])
    return ((x - c) ** 2).sum(-1).argmin(dim=2).squeeze(-1).to(torch.int64)
