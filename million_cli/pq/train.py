"""Samples of keys and values to a codebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, get_args

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.budget import allocate, mix
from million_cli.pq.codebook import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.codec import decode, encode
from million_cli.pq.faiss_kmeans import faiss_kmeans, import_faiss
from million_cli.pq.kmeans import SEEDINGS, Seeding, kmeans
from million_cli.pq.rotation import ROTATIONS, Fit, fit_transform
from million_cli.pq.samples import LayerSamples, Thinned, layers
from million_cli.pq.transform import Transform
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint, PQSpec, Scope

Trainer = Literal["torch", "faiss"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
Metric = Literal["euclidean", "fisher"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_KMEANS = {"torch": kmeans, "faiss": faiss_kmeans}  # by trainer: the same interface

Progress = Callable[[int, int], None]
"""Called with (k-means problems done, problems in all)."""


@dataclass(frozen=True)
class TrainSpec:
    """How a codebook is trained.

    scope: which layers and heads share centroids; trainer: which k-means; seeding: its seeds (random and 25
    iterations are FAISS's defaults); rotations: a method of `rotation.ROTATIONS` for each side; metrics: in
    which the squared error is least, `fisher` (see `pq.metric`) or plain; alternations: of k-means (torch's)
    and rotation, for opq; 0 leaves it at its parametric form; max_samples_per_centroid: a problem uses at
    most about this times C samples, chosen at random (256 is FAISS's limit too); device: where k-means runs.

    Raises:
        UserError: a value outside of what is accepted, or trainer=faiss without FAISS.
    """

    scope: Scope = "head"
    trainer: Trainer = "torch"
    seeding: Seeding = "kmeans++"
    key_rotation: str = "none"
    value_rotation: str = "none"
    key_metric: Metric = "euclidean"
    value_metric: Metric = "euclidean"
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
            ("key_metric", METRICS),
            ("value_metric", METRICS),
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
        """What a transform for codes of `spec` is fitted for."""
        most = self.max_samples_per_centroid * spec.C
        return Fit(self.scope, self.alternations, most, self.seed, self.device)


@dataclass(frozen=True)
class Budget:
    """Codes chosen a layer and side such that the predicted KL divergence is least.

    choices: the codes to choose from; bits: mean code bits per element over all layers, keys and values;
    otherwise: what to take where there is no Fisher information to predict from.
    """

    choices: tuple[CodeSpec, ...]
    bits: float
    otherwise: PQSpec

    def __post_init__(self) -> None:
        least, most = (f(choice.bits_per_element for choice in self.choices) for f in (min, max))
        if not least <= self.bits <= most:
            raise UserError(f"bits={self.bits:g}: accepted are {least:g} to {most:g}")


@dataclass(frozen=True)
class TrainedSide:
    """One side, and how well it fits its samples.

    error: [L][Hkv], mean squared error over variance; predicted_kl: [L][Hkv], what the error of one token
    adds to the KL divergences of later predictions, to second order; empty without Fisher information.
    """

    quantizer: ProductQuantizer
    error: list[list[float]]
    predicted_kl: list[list[float]]


def train_codebook(
    keys: LayerSamples,
    values: LayerSamples,
    spec: PQSpec | Budget,
    fingerprint: ModelFingerprint,
    train: TrainSpec,
    *,
    information: tuple[Tensor, Tensor] | None = None,
    calibration: str,
    calibration_sha256: str,
    tokens: int,
    progress: Progress | None = None,
) -> Codebook:
    """Train both sides from samples [L, Hkv, n, D] (any float dtype; keys after RoPE) and fill in the card.

    information: Fisher information of keys and of values, [L, Hkv, D, D] each; needed by the metric `fisher`,
    which becomes `euclidean` without it, as the card says, and by a `Budget`.

    Raises:
        UserError: samples that do not fit the fingerprint, no samples, or NaN or infinity among them;
            a budget with scope merged.
    """
    samples = {"keys": keys, "values": values}
    for name, side in samples.items():
        _check_samples(name, side, fingerprint)
    metrics = {"keys": train.key_metric, "values": train.value_metric}
    if information is None:
        metrics = dict.fromkeys(samples, "euclidean")
        if isinstance(spec, Budget):
            spec = spec.otherwise
    if isinstance(spec, Budget):
        if train.scope == "merged":
            raise UserError("bits: layers of one codebook cannot differ; accepted scopes are layer and head")
        choices = dict.fromkeys(samples, spec.choices)
    else:
        choices = {"keys": (spec.keys,), "values": (spec.values,)}
    total = sum(_problems(train.scope, samples[n], choice) for n in samples for choice in choices[n])
    trained: dict[str, list[TrainedSide]] = {}
    before = 0
    for position, (name, side) in enumerate(samples.items()):
        rotation = (train.key_rotation, train.value_rotation)[position]
        known = None if information is None else information[position]
        metric = known if metrics[name] == "fisher" else None
        trained[name] = []
        for choice in choices[name]:
            transform = fit_transform(rotation, side, choice, train.fit(choice), metric)
            shifted = _shifted(progress, before, total)
            trained[name].append(
                train_quantizer(side, choice, train, transform=transform, information=known, progress=shifted)
            )
            before += _problems(train.scope, side, choice)
    if isinstance(spec, Budget):
        sides = _within(spec, trained["keys"], trained["values"])
    else:
        sides = trained["keys"][0], trained["values"][0]
    meta = CodebookMeta(
        fingerprint=fingerprint,
        calibration=calibration,
        calibration_sha256=calibration_sha256,
        tokens=tokens,
        samples=keys[0].shape[1],
        seed=train.seed,
        trainer=train.trainer,
        seeding=train.seeding,
        iterations=train.iterations,
        alternations=train.alternations,
        key_rotation=train.key_rotation,
        value_rotation=train.value_rotation,
        key_metric=metrics["keys"],
        value_metric=metrics["values"],
        key_error=sides[0].error,
        value_error=sides[1].error,
        key_predicted_kl=sides[0].predicted_kl,
        value_predicted_kl=sides[1].predicted_kl,
        versions=_versions(train.trainer),
    )
    return Codebook(sides[0].quantizer, sides[1].quantizer, meta)


def train_quantizer(
    samples: LayerSamples,
    spec: CodeSpec,
    train: TrainSpec,
    *,
    transform: Transform | None = None,
    information: Tensor | None = None,
    progress: Progress | None = None,
) -> TrainedSide:
    """Train one side from finite samples [L, Hkv, n, D], layer by layer on `train.device`.

    transform: [Lt, Ht, D, D] or None, as `rotation.fit_transform` gives it (rotations and metrics in `train`
    are not read).  information: [L, Hkv, D, D], to predict the KL divergence over all the samples, or None.
    """
    total, done = _problems(train.scope, samples, spec), 0

    def advance(problems: int) -> None:
        nonlocal done
        done += problems
        if progress:
            progress(done, total)

    trained = []
    for points in _training_sets(samples, spec, train, transform):  # [Hc, n', D] each
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
    quantizer = ProductQuantizer((spec,) * len(samples), train.scope, tuple(trained), transform)
    errors, predicted = [], []
    for i, layer in enumerate(layers(samples)):
        x, pq = layer.to(train.device, torch.float32), quantizer.layer(i).to(train.device)
        difference = x - decode(encode(x[None], pq), pq, x.dtype)[0]
        errors.append(relative_error(x, difference))
        if information is not None:
            F = information[i].to(x)
            predicted.append(
                ((difference @ F) * difference).sum(2).mean(1, dtype=torch.float64).div(2).tolist()
            )
    return TrainedSide(quantizer, errors, predicted)


def relative_error(x: Tensor, difference: Tensor) -> list[float]:
    """Mean square of `difference` over the variance of x around its mean vector, [Hkv, n, D] both: [Hkv].

    Where the variance is zero the mean square itself.
    """
    error = difference.square().mean((1, 2), dtype=torch.float64)
    variance = (x - x.mean(1, keepdim=True)).square().mean((1, 2), dtype=torch.float64)
    return (error / torch.where(variance > 0, variance, 1.0)).tolist()


def _within(
    budget: Budget, keys: list[TrainedSide], values: list[TrainedSide]
) -> tuple[TrainedSide, TrainedSide]:
    """The best mix of layers of either side, trained with each choice of the budget, that keeps to it."""
    L = len(keys[0].error)
    sizes = [choice.M * choice.nbits for choice in budget.choices]
    costs = [[sum(one.predicted_kl[i]) for one in side] for side in (keys, values) for i in range(L)]
    chosen = allocate(costs, sizes, math.floor(budget.bits * budget.choices[0].head_dim * len(costs) + 1e-6))
    mixed = []
    for side, choices in ((keys, chosen[:L]), (values, chosen[L:])):
        mixed.append(
            TrainedSide(
                mix([one.quantizer for one in side], choices),
                [side[j].error[i] for i, j in enumerate(choices)],
                [side[j].predicted_kl[i] for i, j in enumerate(choices)],
            )
        )
    return mixed[0], mixed[1]


def _training_sets(
    samples: LayerSamples, spec: CodeSpec, train: TrainSpec, transform: Transform | None
) -> Iterator[Tensor]:
    """Mapped float32 vectors [Hc, n', D] for each set of centroids' layers: L times, or once if merged."""
    pooled = {"merged": len(samples) * samples[0].shape[0], "layer": samples[0].shape[0], "head": 1}[
        train.scope
    ]
    thinned = Thinned(samples, -(-train.max_samples_per_centroid * spec.C // pooled), train.seed)

    def layer(i: int) -> Tensor:
        part = thinned[i].to(train.device, torch.float32)
        return part if transform is None else transform.layer(i).to(train.device).apply(part)

    if train.scope == "merged":
        yield torch.cat([layer(i).flatten(0, 1) for i in range(len(samples))])[None]
    else:
        for i in range(len(samples)):
            yield layer(i) if train.scope == "head" else layer(i).flatten(0, 1)[None]


def _check_samples(name: str, samples: LayerSamples, fingerprint: ModelFingerprint) -> None:
    expected = (len(fingerprint.layers), fingerprint.num_kv_heads, fingerprint.head_dim)
    heads, n, head_dim = samples[0].shape
    if (len(samples), heads, head_dim) != expected:
        raise UserError(
            f"{name} were sampled from {len(samples)} layers, {heads} heads, head_dim={head_dim}; "
            f"accepted are {expected[0]}, {expected[1]}, {expected[2]}"
        )
    if n == 0:
        raise UserError(f"no samples of {name}: the text is too short")
    for layer, part in zip(fingerprint.layers, layers(samples), strict=True):
        if not bool(part.isfinite().all()):
            raise UserError(f"samples of {name} of layer {layer} hold NaN or infinity")


def _problems(scope: Scope, samples: LayerSamples, spec: CodeSpec) -> int:
    """Independent k-means problems of one side."""
    L, Hkv = len(samples), samples[0].shape[0]
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
