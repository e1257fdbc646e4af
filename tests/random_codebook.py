"""Codebooks of random centroids and transforms, for tests of caches."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from million_cli.integration.models import fingerprint
from million_cli.pq.codebook import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.transform import Transform
from million_cli.spec import CodeSpec


def random_codebook(
    model: PreTrainedModel, keys: tuple[int, int], values: tuple[int, int], mapped: bool = True
) -> Codebook:
    """Normal centroids, invertible transforms, a layer and head; `keys` and `values` are (M, nbits)."""
    print_ = fingerprint(model)
    generator = torch.Generator().manual_seed(1)
    L, Hkv, D = len(print_.layers), print_.num_kv_heads, print_.head_dim

    def side(M: int, nbits: int) -> ProductQuantizer:
        spec = CodeSpec(D, M, nbits)
        centroids = torch.randn(L, Hkv, M, spec.C, spec.dsub, generator=generator)
        maps = torch.linalg.qr(torch.randn(L, Hkv, D, D, generator=generator))[0]
        maps = maps * (0.5 + torch.rand(L, Hkv, 1, D, generator=generator))  # not a rotation: keys != queries
        transform = Transform.invertible(maps) if mapped else None
        return ProductQuantizer((spec,) * L, "head", tuple(centroids), transform)

    meta = CodebookMeta(
        fingerprint=print_,
        calibration="none",
        calibration_sha256="",
        tokens=0,
        samples=0,
        seed=1,
        trainer="random",
        seeding="none",
        iterations=0,
        key_rotation="random",
        value_rotation="random",
        key_metric="euclidean",
        value_metric="euclidean",
        key_error=[],
        value_error=[],
    )
    return Codebook(side(*keys), side(*values), meta)
