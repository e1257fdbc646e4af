"""Samples of keys and values to a codebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, get_args

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.codebook import Codebook, CodebookMeta, LayerPQ, ProductQuantizer
from million_cli.pq.codec import decode, encode
from million_cli.pq.faiss_kmeans import faiss_kmeans, import_faiss
from million_cli.pq.kmeans import SEEDINGS, Seeding, kmeans
from million_cli.pq.rotation import ROTATIONS, Fit, fit_rotation, rotate
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint, PQSpec, Scope

Trainer = Literal["torch", "faiss"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
_KMEANS = {"torch": kmeans, "faiss": faiss_kmeans}  # by trainer: the same interface

Progress = Callable[[int, int], None]
"""Called with (k-means problems done, problems in all)."""


@dataclass(frozen=True)
class TrainSpec:
    """How a codebook is trained.

    scope: which layers and heads share centroids; trainer: which k-means; seeding: its seeds (random and 25
    iterations are FAISS's defaults); rotations: a method of `rotation.ROTATIONS` for each side;
    alternations: of k-means (torch's) and rotation, for opq; 0 leaves it at its parametric form;
    max_samples_per_centroid: a problem uses at most about this times C samples, chosen at random (256 is
    FAISS's limit too); device: where k-means runs.

    Raises:
        UserError: a value outside of what is accepted, or trainer=faiss without FAISS.
    """

    scope: Scope = "head"
    trainer: Trainer = "torch"
    seeding: Seeding = "kmeans++"
    key_rotation: str = "none"
    value_rotation: str = "none"
    alternations: int = 0
    iterations: int = 25
    max_samples_per_centroid: int = 256
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, accepted in (
            ("scope", SCOPES),
            ("trainer", TRAINERS),
            ("seeding", SEEDINGS),
            ("key_rotation", tuple(ROTATIONS)),
            ("value_rotation", tuple(ROTATIONS)),
        ):
            if getattr(self, name) not in accepted:
                raise UserError(f"{name}={getattr(self, name)}: accepted are {', '.join(accepted)}")
        for name in ("iterations", "max_samples_per_centroid"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: accepted are numbers from 1")
        if self.alternations < 0:
            raise UserError(f"alternations={self.alternations}: accepted are numbers from 0")
        if self.trainer == "faiss":
            import_faiss()

    def fit(self, spec: CodeSpec) -> Fit:
        """What a rotation of codes of `spec` is fitted for."""
        most = self.max_samples_per_centroid * spec.C
        return Fit(self.scope, self.alternations, most, self.seed, self.device)


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
        UserError: samples that do not fit the fingerprint, no samples, or NaN or infinity among them.
    """
    sides = {
        "keys": (keys, spec.keys, train.key_rotation),
        "values": (values, spec.values, train.value_rotation),
    }
    expected = (len(fingerprint.layers), fingerprint.num_kv_heads, spec.keys.head_dim)
    for name, (samples, _, _) in sides.items():
        L, Hkv, n, D = samples.shape
        if (L, Hkv, D) != expected:
            raise UserError(
                f"{name} were sampled from {L} layers, {Hkv} heads, head_dim={D}; "
                f"accepted are {expected[0]}, {expected[1]}, {expected[2]}"
            )
        if n == 0:
            raise UserError(f"no samples of {name}: the text is too short")
        for layer, part in zip(fingerprint.layers, samples, strict=True):
            if not bool(part.isfinite().all()):
                raise UserError(f"samples of {name} of layer {layer} hold NaN or infinity")
    problems = {name: _problems(train.scope, samples, side) for name, (samples, side, _) in sides.items()}
    quantizers, errors, before = {}, {}, 0
    for name, (samples, side, rotation) in sides.items():
        quantizers[name], errors[name] = train_quantizer(
            samples,
            side,
            train,
            rotation=fit_rotation(rotation, samples, side, train.fit(side)),
            progress=_shifted(progress, before, sum(problems.values())),
        )
        before += problems[name]
    meta = CodebookMeta(
        fingerprint=fingerprint,
        calibration=calibration,
        calibration_sha256=calibration_sha256,
        tokens=tokens,
        samples=keys.shape[2],
        seed=train.seed,
        trainer=train.trainer,
        seeding=train.seeding,
        iterations=train.iterations,
        alternations=train.alternations,
        key_rotation=train.key_rotation,
        value_rotation=train.value_rotation,
        key_error=errors["keys"],
        value_error=errors["values"],
        versions=_versions(train.trainer),
    )
    return Codebook(quantizers["keys"], quantizers["values"], meta)


def train_quantizer(
    samples: Tensor,
    spec: CodeSpec,
    train: TrainSpec,
    *,
    rotation: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[ProductQuantizer, list[list[float]]]:
    """Train one side from finite samples [L, Hkv, n, D], layer by layer on `train.device`.

    rotation: [Lr, Hr, D, D] or None, as `rotation.fit_rotation` gives it (the rotations in `train` are not
    read).  Also returns the relative error [L][Hkv] over all the samples: mean squared error / variance.
    """
    total, done = _problems(train.scope, samples, spec), 0

    def advance(problems: int) -> None:
        nonlocal done
        done += problems
        if progress:
            progress(done, total)

    trained = []
    for points in _training_sets(samples, spec, train, rotation):  # [Hc, n', D] each
        Hc, n, _ = points.shape
        points = points.view(Hc, n, spec.M, spec.dsub).transpose(1, 2).reshape(Hc * spec.M, n, spec.dsub)
        centroids = _KMEANS[train.trainer](
            points,
            spec.C,
            iterations=train.iterations,
            seed=train.seed,
            seeding=train.seeding,
            progress=advance,
        )
        trained.append(centroids.view(Hc, spec.M, spec.C, spec.dsub).cpu())
    quantizer = ProductQuantizer(spec, train.scope, torch.stack(trained), rotation)
    errors = [
        relative_error(layer.to(train.device), quantizer.layer(i).to(train.device))
        for i, layer in enumerate(samples)
    ]
    return quantizer, errors


def relative_error(samples: Tensor, pq: LayerPQ) -> list[float]:
    """Mean squared error over variance (around the mean vector) of each head: samples [Hkv, n, D] -> [Hkv].

    Where the variance is zero the mean squared error itself.
    """
    x = samples.float()[None]
    error = (x - decode(encode(x, pq), pq, x.dtype)).square().mean((0, 2, 3), dtype=torch.float64)
    variance = (x - x.mean(2, keepdim=True)).square().mean((0, 2, 3), dtype=torch.float64)
    return (error / torch.where(variance > 0, variance, 1.0)).tolist()


def _training_sets(
    samples: Tensor, spec: CodeSpec, train: TrainSpec, rotation: Tensor | None
) -> Iterator[Tensor]:
    """Rotated float32 vectors [Hc, n', D] for each set of centroids' layers: L times, or once if merged."""
    L, Hkv, n, _ = samples.shape
    pooled = {"merged": L * Hkv, "layer": Hkv, "head": 1}[train.scope]
    take = min(n, -(-train.max_samples_per_centroid * spec.C // pooled))
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(train.seed))[:take]

    def layer(i: int) -> Tensor:
        part = samples[i] if take == n else samples[i][:, rows.to(samples.device)]
        one = None if rotation is None else rotation[i % rotation.shape[0]].to(train.device)
        return rotate(part.to(train.device, torch.float32)[None], one)[0]

    if train.scope == "merged":
        yield torch.cat([layer(i).flatten(0, 1) for i in range(L)])[None]
    else:
        for i in range(L):
            yield layer(i) if train.scope == "head" else layer(i).flatten(0, 1)[None]


def _problems(scope: Scope, samples: Tensor, spec: CodeSpec) -> int:
    """Independent k-means problems of one side."""
    L, Hkv = samples.shape[:2]
    return {"merged": 1, "layer": L, "head": L * Hkv}[scope] * spec.M


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """`progress` of a part that starts after `before` of `total` problems."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _versions(trainer: Trainer) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    if trainer == "faiss":
        versions["faiss"] = import_faiss().__version__
    with suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
        versions["million"] = metadata.version("million")
    return versions
