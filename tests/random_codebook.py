"""Codebooks of random centroids and transforms, for tests of caches."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from million_cli.hf.models import fingerprint
from million_cli.hf.rotary import Rotary
from million_cli.pq.codebook import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.transform import Transform
from million_cli.recipe import Recipe
from million_cli.spec import CodeSpec


def random_codebook(
    model: PreTrainedModel,
    keys: tuple[int, int],
    values: tuple[int, int],
    mapped: bool = True,
    mixed: bool = False,
    rebase: int = 0,
) -> Codebook:
    """Normal centroids, invertible transforms, a layer and head; `keys` and `values` are (M, nbits).

    mixed: the other way around in every other layer.
    rebase: tokens of the blocks that keys are relative to; 0: they are coded as they lie.
    """
    model_print = fingerprint(model)
    generator = torch.Generator().manual_seed(4)
    L, Hkv, D = len(model_print.layers), model_print.num_kv_heads, model_print.head_dim

    def side(*shapes: tuple[int, int]) -> ProductQuantizer:
        specs = tuple(CodeSpec(D, *shapes[i % 2 if mixed else 0]) for i in range(L))
        centroids = [torch.randn(Hkv, s.M, s.C, s.dsub, generator=generator) for s in specs]
        maps = torch.linalg.qr(torch.randn(L, Hkv, D, D, generator=generator))[0]
        maps = maps * (
            0.8 + 0.4 * torch.rand(L, Hkv, 1, D, generator=generator)
        )  # not a rotation: keys != queries
        transform = Transform.invertible(maps) if mapped else None
        return ProductQuantizer(specs, "head", tuple(centroids), transform)

    meta = CodebookMeta(
        fingerprint=model_print,
        calibration="none",
        calibration_sha256="",
        tokens=0,
        samples=0,
        held_out=0,
        seed=1,
        recipe=Recipe(),
        key_error=[],
        value_error=[],
    )
    of_keys = side(keys, values)
    if rebase:
        of_keys = replace(of_keys, rebases=Rotary(model).rebases(rebase))
    return Codebook(of_keys, side(values, keys), meta)
