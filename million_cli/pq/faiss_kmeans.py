"""k-means by FAISS, one problem after the other: slower than `kmeans`, and a check of it.

Both start from the same seeds, so a comparison is one of the iterations.  For an empty cluster FAISS splits a
large one, where `kmeans` reseeds the empty one.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.kmeans import Progress, seed_centroids


def faiss_kmeans(
    samples: Tensor,
    C: int,
    *,
    iterations: int = 25,
    seed: int = 0,
    seeding: str = "kmeans++",
    weights: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Centroids of N independent problems: samples [N, n, dsub] (n >= 1, finite) -> float32 [N, C, dsub].

    Runs on a GPU if the samples are there and FAISS was built for GPUs.  With at most C distinct samples, the
    centroids are the samples, some repeated.  `weights` [N, n] of the samples are positive.

    Raises:
        UserError: FAISS is not installed.
    """
    faiss = import_faiss()
    N, n, dsub = samples.shape
    centroids = torch.empty(N, C, dsub)
    gpu = samples.device.type == "cuda" and faiss.get_num_gpus() > 0
    for i in range(N):
        x = samples[i : i + 1].float()
        distinct = x[0].unique(dim=0)
        if len(distinct) <= C:  # FAISS would refuse too few samples and split equal ones
            centroids[i] = distinct[torch.arange(C) % len(distinct)]
        else:
            w = None if weights is None else weights[i : i + 1].float()
            seeds = seed_centroids(x, C, seed, seeding, w)
            clustering = faiss.Kmeans(
                dsub,
                C,
                niter=iterations,
                seed=seed % 2**31,
                min_points_per_centroid=1,
                max_points_per_centroid=n,
                gpu=gpu,
            )
            clustering.train(
                x[0].cpu().numpy(),
                weights=None if w is None else w[0].cpu().numpy(),
                init_centroids=seeds[0].cpu().numpy(),
            )
            centroids[i] = torch.from_numpy(clustering.centroids)
        if progress:
            progress(1)
    return centroids.to(samples.device)


def import_faiss(role: str = "trainer") -> ModuleType:
    """The module `faiss`, for what `role` names: `trainer` or `encoder`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"{role}=faiss needs FAISS: pip install 'million[cpu]' or 'million[gpu]', or use {role}=torch"
        ) from error
    return faiss
