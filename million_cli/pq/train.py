"""From samples of keys and values to a codebook."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.pq.budget import allocate, assemble
from million_cli.pq.codebook import Codebook, CodebookMeta, LayerPQ, ProductQuantizer
from million_cli.pq.codec import decode, encode
from million_cli.pq.faiss_kmeans import faiss_kmeans, import_faiss
from million_cli.pq.kmeans import kmeans
from million_cli.pq.rotation import fit_transform
from million_cli.pq.samples import LayerSamples, Rows, SomeLayers, Thinned, layers
from million_cli.pq.setup import Setup
from million_cli.pq.side import Side
from million_cli.pq.transform import Transform
from million_cli.pq.weights import Weights
from million_cli.pq.work import Progress, Work
from million_cli.recipe import Training
from million_cli.spec import CodeSpec, ModelFingerprint, Scope

logger = logging.getLogger("million")
# The cost of a choice of codes is predicted after a training of this length, on so many samples a head.
_PROBE: dict[str, Any] = {"iterations": 5, "alternations": 0, "max_samples_per_centroid": 16}
_PROBE_SAMPLES = 8192
FEW_SAMPLES = 39
"""Samples a centroid below which training warns; FAISS's min_points_per_centroid."""
_KMEANS = {"torch": kmeans, "faiss": faiss_kmeans}  # by trainer: the same interface

Measure = Callable[[str, int, LayerPQ], float]
"""Called with a side, a layer's position and its quantizer: the KL divergence of coding it alone, in nats."""


@dataclass(frozen=True)
class TrainedSide:
    """One trained side, and its errors.

    error: [L][Hkv], mean squared error over variance; predicted_kl: [L][Hkv], nats that the error of one
    token adds to the KL divergences of later predictions, to second order; empty without Fisher information.
    """

    quantizer: ProductQuantizer
    error: list[list[float]]
    predicted_kl: list[list[float]]


def train_codebook(
    keys: LayerSamples,
    values: LayerSamples,
    fingerprint: ModelFingerprint,
    setup: Setup,
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

    A random share of the samples (`Training.held_out`) is held out to measure errors.

    information: Fisher information of keys and of values, [L, Hkv, D, D] each.  Without it the metric
    `fisher` becomes `euclidean`, and the sides' own codes replace a budget of bits.
    squares: squared gradients of the samples, [L, Hkv, n] each, -1 where not known.  Without them or
    without information the weighting `gradient` becomes `none`.
    measure: corrects the divergence that a budget of bits predicts, a layer and side at a time.

    The card holds the recipe as it was carried out.

    Raises:
        UserError: codes do not fit head_dim; samples do not fit the fingerprint, are fewer than the
            centroids, or hold NaN or infinity.
    """
    for name, samples in (("keys", keys), ("values", values)):
        _check_samples(name, samples, fingerprint)
    offered = setup.recipe.quantizer
    # A budget is checked even where nothing can be predicted: a mistake should not depend on the model.
    choices = offered.choices(fingerprint.head_dim) if offered.bits is not None else ()
    setup = _possible(setup, information is not None, squares is not None)
    quantizer = setup.recipe.quantizer
    spec = quantizer.spec(fingerprint.head_dim)
    training, held = _split(keys[0].shape[1], setup)
    _check_number(len(training), fingerprint, setup, (spec.keys, spec.values))
    gathered = {
        name: Side(
            Rows(samples, training),
            Rows(samples, held if len(held) else training),
            None if information is None else information[i],
            None if squares is None else Rows(squares[i], training),
            codes.rotation,
            codes.metric,
        )
        for i, (name, samples, codes) in enumerate(
            (("keys", keys, quantizer.keys), ("values", values, quantizer.values))
        )
    }
    work = Work(progress)
    if quantizer.bits is not None:
        specs = _within(choices, gathered, setup, measure, work)
    else:
        specs = {"keys": (spec.keys,) * len(keys), "values": (spec.values,) * len(values)}
    parts = {name: _parts(specs[name]) for name in gathered}
    work.expect(
        _problems(quantizer.scope, SomeLayers(side.samples, at), choice)
        for name, side in gathered.items()
        for choice, at in parts[name].items()
    )
    sides = []
    for name, side in gathered.items():
        trained = [
            (at, _train_part(side.part(at), choice, setup, work)) for choice, at in parts[name].items()
        ]
        sides.append(_together(trained))
    meta = CodebookMeta(
        fingerprint=fingerprint,
        calibration=calibration,
        calibration_sha256=calibration_sha256,
        tokens=tokens,
        samples=len(training),
        held_out=len(held),
        seed=setup.seed,
        recipe=setup.recipe,
        key_error=sides[0].error,
        value_error=sides[1].error,
        key_predicted_kl=sides[0].predicted_kl,
        value_predicted_kl=sides[1].predicted_kl,
        versions=_versions(setup.recipe.train),
    )
    return Codebook(sides[0].quantizer, sides[1].quantizer, meta)


def train_quantizer(
    samples: LayerSamples,
    spec: CodeSpec,
    setup: Setup,
    *,
    transform: Transform | None = None,
    information: Tensor | None = None,
    squares: LayerSamples | None = None,
    held: LayerSamples | None = None,
    progress: Progress | None = None,
) -> TrainedSide:
    """Train one side from finite samples [L, Hkv, n, D], layer by layer on `setup.device`.

    Only scope, seeding, weighting and training of the recipe are read.
    transform: [Lt, Ht, D, D] or None, as `rotation.fit_transform` gives it.
    information: [L, Hkv, D, D], to predict the KL divergence, or None.
    squares: [L, Hkv, n], squared gradients of the samples for the weighting `gradient`.
    held: [L, Hkv, n', D], on which errors are measured; None takes the samples themselves.
    """
    quantizer, train = setup.recipe.quantizer, setup.recipe.train
    total, done = _problems(quantizer.scope, samples, spec), 0

    def advance(problems: int) -> None:
        nonlocal done
        done += problems
        if progress:
            progress(done, total)

    trained = []
    if quantizer.weighting == "none":
        squares = None
    for points, weights in _training_sets(samples, squares, spec, setup, transform):  # [Hc, n', D], [Hc, n']
        Hc, n, _ = points.shape
        points = points.view(Hc, n, spec.M, spec.dsub).transpose(1, 2).reshape(Hc * spec.M, n, spec.dsub)
        centroids = _KMEANS[train.trainer](
            points,
            spec.C,
            iterations=train.iterations,
            seed=setup.seed,
            seeding=quantizer.seeding,
            weights=None if weights is None else weights.repeat_interleave(spec.M, 0),
            progress=advance,
        )
        trained.append(centroids.view(Hc, spec.M, spec.C, spec.dsub).cpu())
    scope: Scope = quantizer.scope  # type: ignore[assignment]  # checked by the recipe
    side = ProductQuantizer((spec,) * len(samples), scope, tuple(trained), transform)
    errors, predicted = [], []
    for i, layer in enumerate(layers(samples if held is None else held)):
        x, pq = layer.to(setup.device, torch.float32), side.layer(i).to(setup.device)
        difference = x - decode(encode(x[None], pq, train.encoder), pq, x.dtype)[0]
        errors.append(relative_error(x, difference))
        if information is not None:
            F = information[i].to(x)
            predicted.append(
                ((difference @ F) * difference).sum(2).mean(1, dtype=torch.float64).div(2).tolist()
            )
    return TrainedSide(side, errors, predicted)


def relative_error(x: Tensor, difference: Tensor) -> list[float]:
    """Mean square of `difference` over the variance of x around its mean vector, [Hkv, n, D] both: [Hkv].

    Where the variance is zero the mean square itself.
    """
    error = difference.square().mean((1, 2), dtype=torch.float64)
    variance = (x - x.mean(1, keepdim=True)).square().mean((1, 2), dtype=torch.float64)
    return (error / torch.where(variance > 0, variance, 1.0)).tolist()


def _within(
    choices: Sequence[CodeSpec],
    sides: dict[str, Side],
    setup: Setup,
    measure: Measure | None,
    work: Work,
) -> dict[str, tuple[CodeSpec, ...]]:
    """The codes of each layer and side with the least predicted KL within the recipe's bits.

    The cost of a choice is predicted after a short training on a part of the samples.  The prediction takes
    the errors of tokens as independent of each other and of the gradients.  It underestimates the KL by a
    factor that varies by layer, hardly by choice: the factor is measured with the second fewest bits.
    """
    quantizer = setup.recipe.quantizer
    assert quantizer.bits is not None
    probe = replace(setup, recipe=replace(setup.recipe, train=replace(setup.recipe.train, **_PROBE)))
    everywhere, everything = range(len(sides["keys"].samples)), range(len(choices))
    work.expect(
        _problems(quantizer.scope, side.samples, choice) for side in sides.values() for choice in choices
    )
    costs: list[list[float]] = []  # [2 L][choices], keys first
    for name, side in sides.items():
        part = side.thinned(_PROBE_SAMPLES, setup.seed)  # read once for all choices
        tried = [_train_part(part, choice, probe, work) for choice in choices]
        predicted = [[sum(one.predicted_kl[i]) for one in tried] for i in everywhere]
        if measure is not None:
            j = sorted(everything, key=lambda j: choices[j].bits_per_element)[:2][-1]
            for i in everywhere:
                found = measure(name, i, tried[j].quantizer.layer(i))
                factor = found / predicted[i][j] if found > 0 and predicted[i][j] > 0 else 1.0
                predicted[i] = [cost * factor for cost in predicted[i]]
        costs += predicted
    sizes = [choice.M * choice.nbits for choice in choices]
    most = math.floor(quantizer.bits * choices[0].head_dim * len(costs) + 1e-6)
    chosen = [choices[j] for j in allocate(costs, sizes, most)]
    return {"keys": tuple(chosen[: len(everywhere)]), "values": tuple(chosen[len(everywhere) :])}


def _parts(specs: Sequence[CodeSpec]) -> dict[CodeSpec, list[int]]:
    """Codes -> the positions of their layers."""
    parts: dict[CodeSpec, list[int]] = {}
    for i, spec in enumerate(specs):
        parts.setdefault(spec, []).append(i)
    return parts


def _train_part(side: Side, spec: CodeSpec, setup: Setup, work: Work) -> TrainedSide:
    """Train codes of `spec` and their transform for the layers of a side."""
    fitted = side.information if side.metric == "fisher" else None
    trained = train_quantizer(
        side.samples,
        spec,
        setup,
        transform=fit_transform(side.rotation, side.samples, spec, setup, fitted),
        information=side.information,
        squares=side.squares,
        held=side.held,
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
    setup: Setup,
    transform: Transform | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Mapped float32 vectors [Hc, n', D], weights [Hc, n'] or None: for each layer, or once if merged."""
    scope = setup.recipe.quantizer.scope
    most = -(-setup.max_samples(spec.C) // _sharing(scope, len(samples), samples[0].shape[0]))
    thinned = Thinned(samples, most, setup.seed)
    weights = None if squares is None else Thinned(Weights(squares), most, setup.seed)

    def layer(i: int) -> Tensor:
        part = thinned[i].to(setup.device, torch.float32)
        return part if transform is None else transform.layer(i).to(setup.device).apply(part)

    if scope == "merged":
        points = torch.cat([layer(i).flatten(0, 1) for i in range(len(samples))])[None]
        yield points, None if weights is None else torch.cat([w.flatten() for w in layers(weights)])[None]
        return
    for i in range(len(samples)):
        points, w = layer(i), None if weights is None else weights[i]
        if scope == "layer":
            points, w = points.flatten(0, 1)[None], None if w is None else w.flatten()[None]
        yield points, w


def _possible(setup: Setup, informed: bool, weighed: bool) -> Setup:
    """The setup without metrics, weighting and budget that lack their data: see `train_codebook`."""
    quantizer = setup.recipe.quantizer
    if not informed:
        quantizer = replace(
            quantizer,
            keys=replace(quantizer.keys, metric="euclidean"),
            values=replace(quantizer.values, metric="euclidean"),
            bits=None,
        )
    if not (informed and weighed):
        quantizer = replace(quantizer, weighting="none")
    return replace(setup, recipe=replace(setup.recipe, quantizer=quantizer))


def _split(n: int, setup: Setup) -> tuple[Tensor, Tensor]:
    """Indices of n samples: those that train, and those held out, each in rising order."""
    held = int(setup.recipe.train.held_out * n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(setup.seed))
    return order[held:].sort().values, order[:held].sort().values


def _check_number(n: int, fingerprint: ModelFingerprint, setup: Setup, specs: Sequence[CodeSpec]) -> None:
    """Refuse n training samples a layer and head that are fewer than the centroids; warn of few."""
    scope = setup.recipe.quantizer.scope
    shared = n * _sharing(scope, len(fingerprint.layers), fingerprint.num_kv_heads)
    C = max(spec.C for spec in specs)
    if shared < C:
        raise UserError(
            f"{shared} samples for {C} centroids: accepted are at least as many samples; give more text, or "
            "lower quantizer.keys.nbits and quantizer.values.nbits"
        )
    if shared < FEW_SAMPLES * C:
        logger.warning(
            "%d samples for %d centroids: below %d a centroid codebooks fit other text badly; give more text",
            shared,
            C,
            FEW_SAMPLES,
        )


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


def _sharing(scope: str, L: int, Hkv: int) -> int:
    """Heads, of all layers, that share a codebook."""
    return {"merged": L * Hkv, "layer": Hkv, "head": 1}[scope]


def _problems(scope: str, samples: LayerSamples, spec: CodeSpec) -> int:
    """Independent k-means problems of one side."""
    L, Hkv = len(samples), samples[0].shape[0]
    return L * Hkv // _sharing(scope, L, Hkv) * spec.M


def _versions(train: Training) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    if "faiss" in (train.trainer, train.encoder):
        versions["faiss"] = import_faiss().__version__
    if train.encoder == "keops":
        versions["pykeops"] = metadata.version("pykeops")
    with suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
        versions["million"] = metadata.version("million")
    return versions
