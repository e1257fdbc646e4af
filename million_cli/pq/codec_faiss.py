"""The nearest centroid by FAISS, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.faiss_kmeans import import_faiss


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid: points [N, n, dsub], centroids [N, C, dsub] -> int64 [N, n].

    The same definition as `codec.nearest_centroid`, up to the rounding of float32: of two centroids whose
    distances differ in the last bit, either may be found.  Vectors on a GPU are copied to the host and back.

    Raises:
        UserError: FAISS is not installed, or the points are float64.
    """
    faiss = import_faiss("encoder")
    if points.dtype == torch.float64:
        raise UserError("encoder=faiss computes in float32; for float64 use encoder=torch or encoder=keops")
    found = torch.empty(points.shape[:2], dtype=torch.int64)
    with _direct_sums(faiss):
        for i in range(len(points)):
            x, c = (part[i].cpu().contiguous().numpy() for part in (points, centroids))
            found[i] = torch.from_numpy(faiss.knn(x, c, 1)[1][:, 0])
    return found.to(points.device)


@contextmanager
def _direct_sums(faiss: ModuleType) -> Iterator[None]:
    """Let FAISS sum squared differences for any number of points.

    From 20 points FAISS expands |x - c|^2 into products, which cancel far from the origin, where keys lie.
    """
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 2**31 - 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
