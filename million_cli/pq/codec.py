"""Vectors to codes and back, in torch: the definition for every other encoder.

A code is the lowest index among the centroids at the least squared Euclidean distance, the distance being the
direct sum of squared differences over the dimensions of the subspace, in float32 (float64 for float64 input).
The shorter form |c|^2/2 - x.c is not used: it cancels where vectors lie far from the origin, as keys do, and
a decoded vector would not always be encoded to its own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from million_cli.errors import check
from million_cli.pq.argmin import block_elements, first_argmin
from million_cli.pq.codebook import LayerPQ
from million_cli.pq.faiss_kmeans import import_faiss
from million_cli.pq.packing import code_dtype
from million_cli.recipe import ENCODERS

# Elements of input turned to float32 (or decoded through int32 indices) at a time.
_SLICE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}


def encode(x: Tensor, pq: LayerPQ, encoder: str = "torch", start: int = 0) -> Tensor:
    """Nearest centroids of x [B, Hkv, T, D] (any float dtype) -> codes [B, Hkv, T, M], uint8 or uint16.

    x are the tokens start, start + 1, ...  With a rebase they are first brought to the origin of their block;
    with a transform they are then mapped.  Working memory does not grow with T.

    Raises:
        UserError: an unknown encoder, or one that this machine lacks.
    """
    nearest = find_encoder(encoder)
    if pq.rebase is not None:
        x = pq.rebase.relative(x, start)
    B, H, T, D = x.shape
    spec, centroids = pq.spec, pq.centroids
    assert spec.head_dim == D, (x.shape, spec)
    assert centroids.shape[0] in (1, H), (x.shape, centroids.shape)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    centroids = centroids.to(dtype).flatten(0, 1)  # [Hc * M, C, dsub]
    codes = torch.empty(B, H, T, spec.M, dtype=code_dtype(spec.nbits), device=x.device)
    step = max(1, _slice_elements(x.device) // (B * H * D))
    for first in range(0, T, step):
        part = x[:, :, first : first + step].to(dtype)
        if pq.transform is not None:
            part = pq.transform.apply(part)
        t = part.shape[2]
        points = part.reshape(B, H, t, spec.M, spec.dsub)
        if pq.centroids.shape[0] == 1:  # every head shares the centroids: one long list of points a subspace
            found = nearest(points.permute(3, 0, 1, 2, 4).reshape(spec.M, B * H * t, spec.dsub), centroids)
            found = found.view(spec.M, B, H, t).permute(1, 2, 3, 0)
        else:
            found = nearest(points.permute(1, 3, 0, 2, 4).reshape(H * spec.M, B * t, spec.dsub), centroids)
            found = found.view(H, spec.M, B, t).permute(2, 0, 3, 1)
        codes[:, :, first : first + step] = found.to(codes.dtype)
    return codes


def decode(codes: Tensor, pq: LayerPQ, dtype: torch.dtype, mapped: bool = False, start: int = 0) -> Tensor:
    """Centroids of codes [B, Hkv, T, M] -> [B, Hkv, T, D] in `dtype`.

    With `mapped` the result stays in the coded space (see `Transform` and `Rebase`); otherwise transform and
    rebase are undone for the tokens start, start + 1, ... (in float32, or float64 if `dtype` is).
    """
    B, H, T, M = codes.shape
    spec, (Hc, _, C, dsub) = pq.spec, pq.centroids.shape
    assert spec.M == M, (codes.shape, spec)
    assert Hc in (1, H), (codes.shape, pq.centroids.shape)
    transform, rebase = (None, None) if mapped else (pq.transform, pq.rebase)
    table_dtype = torch.promote_types(dtype, torch.float32) if transform or rebase else dtype
    table = pq.centroids.to(table_dtype).reshape(Hc * M * C, dsub)
    first_row = (torch.arange(Hc * M, dtype=torch.int32, device=codes.device) * C).view(Hc, 1, M)
    out = torch.empty(B, H, T, spec.head_dim, dtype=dtype, device=codes.device)
    step = max(1, _slice_elements(codes.device) // (B * H * spec.head_dim))
    for first in range(0, T, step):
        part = F.embedding(codes[:, :, first : first + step].to(torch.int32) + first_row, table).flatten(-2)
        part = transform.undo(part) if transform else part
        out[:, :, first : first + step] = rebase.absolute(part, start + first) if rebase else part
    return out


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid: points [N, n, dsub], centroids [N, C, dsub] -> int64 [N, n].

    Distances are computed block by block in the dtype of the points; ties go to the lowest index.
    """
    N, n, dsub = points.shape
    C = centroids.shape[1]
    budget = block_elements(points.device)
    rows = max(1, min(n, budget // C))
    problems = max(1, budget // (C * rows))
    by_dim = centroids.permute(2, 0, 1).contiguous()  # [dsub, N, C]
    buffers = points.new_empty(2, min(N, problems) * rows * C)
    found = torch.empty(N, n, dtype=torch.int64, device=points.device)
    for i in range(0, N, problems):
        for r in range(0, n, rows):
            block = points[i : i + problems, r : r + rows]
            shape = (*block.shape[:2], C)
            distance, difference = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            for j in range(dsub):
                torch.sub(block[..., j, None], by_dim[j, i : i + problems, None], out=difference)
                if j == 0:
                    torch.mul(difference, difference, out=distance)
                else:
                    distance.addcmul_(difference, difference)
            found[i : i + problems, r : r + rows] = first_argmin(distance)
    return found


def find_encoder(encoder: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The `nearest_centroid` of an encoder; imported when chosen, because two of them are heavy.

    Raises:
        UserError: an unknown encoder, or one that this machine lacks.
    """
    check("encoder", encoder, ENCODERS)
    if encoder == "keops":
        from million_cli.pq import codec_keops

        return codec_keops.nearest_centroid
    if encoder == "faiss":
        from million_cli.pq import codec_faiss

        import_faiss("encoder")
        return codec_faiss.nearest_centroid
    return nearest_centroid


def _slice_elements(device: torch.device) -> int:
    return _SLICE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
