"""Optimised product quantization: the rotation that makes a product quantizer fit its samples.

After Ge, He, Ke and Sun, "Optimized Product Quantization" (TPAMI 2013), for many heads at once:

- Parametric (their section 3.2): for Gaussian data the distortion is least when subspaces are independent and
  of equal volume.  So the axes are the eigenvectors of the covariance, dealt to the subspaces such that the
  sums of log-variances balance.
- Non-parametric (section 3.1): alternate k-means under the rotation with the rotation that brings the samples
  nearest to their reconstructions, an orthogonal Procrustes problem.  Neither step can raise the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from million_cli.pq.kmeans import assign, kmeans
from million_cli.spec import CodeSpec

_FIRST_ITERATIONS = 4  # of k-means under the parametric rotation; each alternation adds one


def balanced_rotation(samples: Tensor, M: int) -> Tensor:
    """The parametric rotation of each head: samples [H, n, D], any float dtype -> float64 [H, D, D].

    The columns of subspace m are eigenvectors of the head's covariance, in order of falling variance.
    """
    H, _, D = samples.shape
    variances, vectors = torch.linalg.eigh(torch.stack([_covariance(head) for head in samples]))
    variances, vectors = variances.flip(-1), vectors.flip(-1)
    # eigh leaves the sign of an eigenvector open: fixed here, whatever the library.
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    order = torch.stack([deal(head, M) for head in variances.cpu()]).to(vectors.device)
    return vectors.gather(2, order[:, None, :].expand(H, D, D))


def deal(variances: Tensor, M: int) -> Tensor:
    """Deal axes to subspaces by the eigenvalue allocation of Ge et al.: falling variances [D] -> int64 [D].

    Each axis in turn goes to the subspace with the least sum of log-variances that has room; entry j of the
    result is the axis that becomes dimension j, subspace m being the dimensions m * D/M .. (m + 1) * D/M - 1.
    Logs are taken against the least variance, so that a larger subspace never counts as the emptier one, and
    variances below 1e-9 of the largest count as that.
    """
    D = len(variances)
    floor = variances[0].clamp(min=torch.finfo(variances.dtype).tiny) * 1e-9
    logs = (variances.clamp(min=floor) / variances[-1].clamp(min=floor)).log().tolist()
    sums, members = [0.0] * M, [[] for _ in range(M)]  # type: tuple[list[float], list[list[int]]]
    for axis in range(D):
        m = min((m for m in range(M) if len(members[m]) < D // M), key=lambda m: (sums[m], len(members[m])))
        sums[m] += logs[axis]
        members[m].append(axis)
    return torch.tensor([axis for subspace in members for axis in subspace])


def optimised_rotation(
    samples: Tensor, spec: CodeSpec, *, shared: bool, alternations: int, seed: int
) -> Tensor:
    """The rotation of each head: samples [H, n, D] on the device to work on -> float32 [H, D, D] there.

    shared: the heads share one set of centroids; otherwise each has its own.  With 0 alternations the
    rotation is the parametric one.  Reproducible as `kmeans` is.
    """
    rotation = balanced_rotation(samples, spec.M)
    if not alternations:
        return rotation.float()
    x = samples.float()
    centroids: Tensor | None = None
    for step in range(alternations):
        points = _points(x @ rotation.float(), spec, shared)
        centroids = kmeans(
            points,
            spec.C,
            iterations=_FIRST_ITERATIONS if step == 0 else 1,
            seed=seed,
            initial=centroids,
        )
        rotation = procrustes(x, _reconstruct(points, centroids, spec, len(samples)))
    return rotation.float()


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The orthogonal R that minimises |x R - y|^2: x and y [H, n, D] -> float64 [H, D, D].

    R = U V^T, where x^T y = U S V^T (Schoenemann 1966).
    """
    u, _, vt = torch.linalg.svd((x.mT @ y).double())
    return u @ vt


def _covariance(samples: Tensor) -> Tensor:
    """Covariance of one head's samples [n, D]: float64 [D, D]."""
    x = samples.double()
    x = x - x.mean(0)
    return x.T @ x / len(x)


def _points(rotated: Tensor, spec: CodeSpec, shared: bool) -> Tensor:
    """Rotated vectors [H, n, D] as k-means problems [H * M, n, dsub], or [M, H * n, dsub] if shared."""
    H, n, _ = rotated.shape
    points = rotated.view(H, n, spec.M, spec.dsub)
    if shared:
        return points.permute(2, 0, 1, 3).reshape(spec.M, H * n, spec.dsub)
    return points.permute(0, 2, 1, 3).reshape(H * spec.M, n, spec.dsub)


def _reconstruct(points: Tensor, centroids: Tensor, spec: CodeSpec, H: int) -> Tensor:
    """The nearest centroids of `_points`, as vectors [H, n, D]."""
    N, n, dsub = points.shape
    nearest = centroids.gather(1, assign(points, centroids)[..., None].expand(N, n, dsub))
    if N == spec.M:
        return nearest.view(spec.M, H, -1, dsub).permute(1, 2, 0, 3).flatten(2)
    return nearest.view(H, spec.M, n, dsub).transpose(1, 2).flatten(2)
