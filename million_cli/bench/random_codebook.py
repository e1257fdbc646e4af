"""Codebooks with random centroids, for measurements of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from million_cli.hf.models import fingerprint
from million_cli.pq.codebook import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.transform import Transform
from million_cli.recipe import Quantizer, Recipe
from million_cli.spec import CodeSpec, PQSpec


def random_codebook(model: PreTrainedModel, specs: Sequence[PQSpec], seed: int) -> Codebook:
    """Random centroids and rotations for each layer and KV head.

    Like trained codebooks, keys and values have a rotation each: queries and outputs pass through a matrix.

    Args:
        specs: the codes of each full-attention layer.
    """
    of_model = fingerprint(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    L, Hkv, D = len(of_model.layers), of_model.num_kv_heads, of_model.head_dim

    def side(codes: tuple[CodeSpec, ...]) -> ProductQuantizer:
        options: dict[str, Any] = {"generator": generator, "device": model.device}
        centroids = tuple(torch.randn(Hkv, spec.M, spec.C, spec.dsub, **options) for spec in codes)
        rotation = torch.linalg.qr(torch.randn(L * Hkv, D, D, **options))[0].view(L, Hkv, D, D)
        return ProductQuantizer(codes, "head", centroids, Transform.rotation(rotation.contiguous()))

    meta = CodebookMeta(
        fingerprint=of_model,
        calibration="none: random",
        calibration_sha256="",
        tokens=0,
        samples=0,
        held_out=0,
        seed=seed,
        recipe=Recipe(Quantizer(name="random")),
        key_error=[],
        value_error=[],
    )
    keys, values = (tuple(codes) for codes in zip(*((spec.keys, spec.values) for spec in specs), strict=True))
    return Codebook(side(keys), side(values), meta)
