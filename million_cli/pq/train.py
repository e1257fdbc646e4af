"""Samples of keys and values to a codebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.budget import Budget, allocate, assemble
from million_cli.pq.codebook import Codebook, CodebookMeta, LayerPQ, ProductQuantizer
from million_cli.pq.codec import decode, encode
from million_cli.pq.faiss_kmeans import faiss_kmeans, import_faiss
from million_cli.pq.kmeans import SEEDINGS, Seeding, kmeans
from million_cli.pq.metric import METRICS, Metric
from million_cli.pq.rotation import ROTATIONS, Fit, fit_transform
from million_cli.pq.samples import LayerSamples, SomeLayers, Thinned, layers
from million_cli.pq.side import Side
from million_cli.pq.transform import Transform
from million_cli.pq.weights import WEIGHTINGS, Weighting, Weights
from million_cli.pq.work import Progress, Work
from million_cli.spec import SCOPES, CodeSpec, ModelFingerprint, PQSpec, Scope

Trainer = Literal["torch", "faiss"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
# What a choice of codes costs is predicted after a training of this length, on so many samples a head.
_PROBE: dict[str, Any] = {"iterations": 5, "alternations": 0, "max_samples_per_centroid": 16}
_PROBE_SAMPLES = 8192
_KMEANS = {"torch": kmeans, "faiss": faiss_kmeans}  # by trainer: the same interface

Measure = Callable[[str, int, LayerPQ], float]
"""Called with a side, a layer's position and its quantizer: the KL divergence of coding it alone, in nats."""


@dataclass(frozen=True)
class TrainSpec:
    """How a codebook is trained.

    scope: which layers and heads share centroids; trainer: which k-means; seeding: its seeds (random and 25
    iterations are FAISS's defaults); rotations: a method of `rotation.ROTATIONS` for each side; metrics: in
    which the squared error is least, `fisher` (see `pq.metric`) or plain; weighting: how much each sample
    counts in k-means, by its `gradient` (see `pq.weights`) or all the same (`none`); alternations: of
    k-means (torch's) and rotation, for opq; 0 leaves it at its parametric form; max_samples_per_centroid:
    a problem uses at most about this times C samples, chosen at random (256 is FAISS's limit too); device:
    where k-means runs.

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
    weighting: Weighting = "none"
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
            ("weighting", WEIGHTINGS),
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
    squares: tuple[LayerSamples, LayerSamples] | None = None,
    calibration: str,
    calibration_sha256: str,
    tokens: int,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Codebook:
    """Train both sides from samples [L, Hkv, n, D] (any float dtype; keys after RoPE) and fill in the card.

    information: Fisher information of keys and of values, [L, Hkv, D, D] each; needed by the metric `fisher`,
    which becomes `euclidean` without it, as the card says, and by a `Budget`.
    squares: squared gradients of the samples, [L, Hkv, n] each, -1 where not known; needed by the weighting
    `gradient`, which becomes `none` without them or without information, as the card says.
    measure: corrects what a `Budget` predicts, a layer and side at a time.

    Raises:
        UserError: samples that do not fit the fingerprint, no samples, or NaN or infinity among them;
            a budget with scope merged.
    """
    for name, samples in (("keys", keys), ("values", values)):
        _check_samples(name, samples, fingerprint)
    if information is None:
        train = replace(train, key_metric="euclidean", value_metric="euclidean")
        if isinstance(spec, Budget):
            spec = spec.otherwise
    if information is None or squares is None:
        train = replace(train, weighting="none")
    known, noted = information or (None, None), squares or (None, None)
    gathered = {
        "keys": Side(keys, known[0], noted[0], train.key_rotation, train.key_metric),
        "values": Side(values, known[1], noted[1], train.value_rotation, train.value_metric),
    }
    work = Work(progress)
    if isinstance(spec, Budget):
        if train.scope == "merged":
            raise UserError("bits: layers of one codebook cannot differ; accepted scopes are layer and head")
        specs = _within(spec, gathered, train, measure, work)
    else:
        specs = {"keys": (spec.keys,) * len(keys), "values": (spec.values,) * len(values)}
    parts = {name: _parts(specs[name]) for name in gathered}
    work.expect(
        _problems(train.scope, SomeLayers(side.samples, at), choice)
        for name, side in gathered.items()
        for choice, at in parts[name].items()
    )
    sides = []
    for name, side in gathered.items():
        trained = [
            (at, _train_part(side.part(at), choice, train, work)) for choice, at in parts[name].items()
        ]
        sides.append(_together(trained))
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
        key_metric=train.key_metric,
        value_metric=train.value_metric,
        weighting=train.weighting,
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
    squares: LayerSamples | None = None,
    progress: Progress | None = None,
) -> TrainedSide:
    """Train one side from finite samples [L, Hkv, n, D], layer by layer on `train.device`.

    transform: [Lt, Ht, D, D] or None, as `rotation.fit_transform` gives it (rotations and metrics in `train`
    are not read).  information: [L, Hkv, D, D], to predict the KL divergence over all the samples, or None.
    squares: [L, Hkv, n], squared gradients of the samples for the weighting `gradient`.
    """
    total, done = _problems(train.scope, samples, spec), 0

    def advance(problems: int) -> None:
        nonlocal done
        done += problems
        if progress:
            progress(done, total)

    trained = []
    if train.weighting == "none":
        squares = None
    for points, weights in _training_sets(samples, squares, spec, train, transform):  # [Hc, n', D], [Hc, n']
        Hc, n, _ = points.shape
        points = points.view(Hc, n, spec.M, spec.dsub).transpose(1, 2).reshape(Hc * spec.M, n, spec.dsub)
        centroids = _KMEANS[train.trainer](
            points,
            spec.C,
            iterations=train.iterations,
            seed=train.seed,
            seeding=train.seeding,
            weights=None if weights is None else weights.repeat_interleave(spec.M, 0),
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
    budget: Budget,
    sides: dict[str, Side],
    train: TrainSpec,
    measure: Measure | None,
    work: Work,
) -> dict[str, tuple[CodeSpec, ...]]:
    """The codes of each layer of either side that keep to the budget and promise the least divergence.

    What a choice costs is predicted after a short training on a part of the samples.  The prediction takes
    errors of tokens as independent of each other and of the gradients, and so is short by a factor which
    differs by layer and hardly by choice: it is measured for the one with the second fewest bits.
    """
    probe = replace(train, **_PROBE)
    everywhere, everything = range(len(sides["keys"].samples)), range(len(budget.choices))
    work.expect(
        _problems(train.scope, side.samples, one) for side in sides.values() for one in budget.choices
    )
    costs: list[list[float]] = []  # [2 L][choices], keys first
    for name, side in sides.items():
        part = side.thinned(_PROBE_SAMPLES, train.seed)  # read once for all choices
        tried = [_train_part(part, choice, probe, work) for choice in budget.choices]
        predicted = [[sum(one.predicted_kl[i]) for one in tried] for i in everywhere]
        if measure is not None:
            j = sorted(everything, key=lambda j: budget.choices[j].bits_per_element)[:2][-1]
            for i in everywhere:
                found = measure(name, i, tried[j].quantizer.layer(i))
                factor = found / predicted[i][j] if found > 0 and predicted[i][j] > 0 else 1.0
                predicted[i] = [cost * factor for cost in predicted[i]]
        costs += predicted
    sizes = [choice.M * choice.nbits for choice in budget.choices]
    most = math.floor(budget.bits * budget.choices[0].head_dim * len(costs) + 1e-6)
    chosen = [budget.choices[j] for j in allocate(costs, sizes, most)]
    return {"keys": tuple(chosen[: len(everywhere)]), "values": tuple(chosen[len(everywhere) :])}


def _parts(specs: Sequence[CodeSpec]) -> dict[CodeSpec, list[int]]:
    """The positions of the layers that have each of the codes."""
    parts: dict[CodeSpec, list[int]] = {}
    for i, spec in enumerate(specs):
        parts.setdefault(spec, []).append(i)
    return parts


def _train_part(side: Side, spec: CodeSpec, train: TrainSpec, work: Work) -> TrainedSide:
    """Codes of `spec` for the layers of a side, with the transform that goes with them."""
    fitted = side.information if side.metric == "fisher" else None
    trained = train_quantizer(
        side.samples,
        spec,
        train,
        transform=fit_transform(side.rotation, side.samples, spec, train.fit(spec), fitted),
        information=side.information,
        squares=side.squares,
        progress=work.advance,
    )
    work.finish()
    return trained


def _together(trained: Sequence[tuple[Sequence[int], TrainedSide]]) -> TrainedSide:
    """One side from its parts, each with the positions of its layers."""
    errors = {at: e for positions, part in trained for at, e in zip(positions, part.error, strict=True)}
    predicted = {
        at: kl
        for positions, part in trained
        for at, kl in zip(positions, part.predicted_kl, strict=False)  # empty without information
    }
    return TrainedSide(
        assemble([(positions, part.quantizer) for positions, part in trained]),
        [errors[at] for at in sorted(errors)],
        [predicted[at] for at in sorted(predicted)],
    )


def _training_sets(
    samples: LayerSamples,
    squares: LayerSamples | None,
    spec: CodeSpec,
    train: TrainSpec,
    transform: Transform | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Mapped float32 vectors [Hc, n', D], weights [Hc, n'] or None: for each layer, or once if merged."""
    pooled = {"merged": len(samples) * samples[0].shape[0], "layer": samples[0].shape[0], "head": 1}[
        train.scope
    ]
    most = -(-train.max_samples_per_centroid * spec.C // pooled)
    thinned = Thinned(samples, most, train.seed)
    weights = None if squares is None else Thinned(Weights(squares), most, train.seed)

    def layer(i: int) -> Tensor:
        part = thinned[i].to(train.device, torch.float32)
        return part if transform is None else transform.layer(i).to(train.device).apply(part)

    if train.scope == "merged":
        points = torch.cat([layer(i).flatten(0, 1) for i in range(len(samples))])[None]
        yield points, None if weights is None else torch.cat([w.flatten() for w in layers(weights)])[None]
        return
    for i in range(len(samples)):
        points, w = layer(i), None if weights is None else weights[i]
        if train.scope == "layer":
            points, w = points.flatten(0, 1)[None], None if w is None else w.flatten()[None]
        yield points, w


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


def _versions(trainer: Trainer) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    if trainer == "faiss":
        versions["faiss"] = import_faiss().__version__
    with suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
        versions["million"] = metadata.version("million")
    return versions
