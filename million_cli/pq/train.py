"""Samples of keys and values to a codebook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from million_cli.pq.codebook import Codebook, ProductQuantizer
from million_cli.spec import CodeSpec, ModelFingerprint, PQSpec, Scope

Trainer = Literal["torch", "faiss"]
TRAINERS: tuple[Trainer, ...] = ("torch", "faiss")

Progress = Callable[[int, int], None]
"""Called with (k-means problems done, problems in all)."""


@dataclass(frozen=True)
class TrainSpec:
    """How a codebook is trained.

    scope: which layers and heads share centroids; rotation: a method of `rotation.ROTATIONS`, a side each;
    iterations: Lloyd's iterations; max_samples_per_centroid: more samples than this times C are thinned at
    random (256 is FAISS's limit too); device: where k-means runs.

    Raises:
        UserError: a value outside of what is accepted.
    """

    scope: Scope = "head"
    trainer: Trainer = "torch"
    key_rotation: str = "none"
    value_rotation: str = "none"
    iterations: int = 25
    seed: int = 0
    max_samples_per_centroid: int = 256
    device: str = "cpu"


def train_codebook(
    keys: Tensor,
    values: Tensor,
    spec: PQSpec,
    fingerprint: ModelFingerprint,
    train: TrainSpec,
    *,
    calibration: str,
    calibration_sha256: str,
    tokens: int,
    progress: Progress | None = None,
) -> Codebook:
    """Train both sides from samples [L, Hkv, n, D] (any float dtype; keys after RoPE) and fill in the card.

    Raises:
        UserError: samples that do not fit the fingerprint, no samples, NaN or infinity among them, or a
            trainer that is not installed.
    """
    raise AssertionError("written next")


def train_quantizer(
    samples: Tensor,
    spec: CodeSpec,
    train: TrainSpec,
    *,
    rotation: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[ProductQuantizer, list[list[float]]]:
    """Train one side from samples [L, Hkv, n, D]; also gives the relative error of each layer and head.

    rotation: [Lr, Hr, D, D] or None, as `rotation.fit_rotation` returns it.
    """
    raise AssertionError("written next")
