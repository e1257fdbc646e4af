"""Training: samples become a codebook."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from million_cli.calibration.information import mean_of_state
from million_cli.calibration.measured import Measure
from million_cli.calibration.sampling import Samples
from million_cli.errors import UserError
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.sample import sample, sample_key
from million_cli.pipelines.session import Session
from million_cli.pipelines.stages import code_digest, locked, stage_key
from million_cli.pq import Budget, Codebook, TrainSpec, train_codebook
from million_cli.progress import progress
from million_cli.results import git_commit, running
from million_cli.spec import PQSpec

logger = logging.getLogger("million")


def run_train(config: JobConfig) -> list[Result]:
    """`million train-codebook`."""
    if config.quantizer.kind != "pq":
        raise UserError(
            f"quantizer={config.quantizer.name}: it has no codebook to train; accepted are pq ones"
        )
    session = Session(config)
    path = train(session)
    return [session.result(codebook_metrics(Codebook.load(path), path))]


def train(session: Session) -> Path:
    """Train the job's codebook, sampling first if need be, or find it finished.

    Returns:
        The codebook's file.

    Raises:
        UserError: the quantizer does not fit the model, or see `sample`.
    """
    config = session.config
    quantizer = config.quantizer
    head_dim = session.fingerprint.head_dim
    spec: PQSpec | Budget = quantizer.spec(head_dim)
    if quantizer.bits is not None:
        spec = Budget(quantizer.choices(head_dim), quantizer.bits, otherwise=quantizer.spec(head_dim))
    measured = config.train.measured if quantizer.bits is not None else 0
    metrics = (quantizer.keys.metric, quantizer.values.metric)
    key = stage_key(
        {
            "sample": sample_key(session),
            "spec": asdict(spec),
            "quantizer": {**asdict(quantizer), "name": ""},
            "train": asdict(config.train),
            "seed": config.seed,
            "device": session.device_name,
            "window": asdict(config.cache.window()) if measured else None,
            **code_digest("pq", "codecs", "calibration/measured.py"),
        }
    )
    path = Path(config.out) / "codebooks" / f"{config.model.name}-{quantizer.name}-{key}.safetensors"
    with locked(path):
        if config.reuse and path.is_file():
            logger.info("codebook: %s (from an earlier run)", path)
            return path
        folder = sample(session)
        samples = Samples(folder)
        keys, values = samples.sides()
        gathered = samples.information()
        information = None if gathered is None else mean_of_state(gathered)
        if information is None and (quantizer.bits is not None or "fisher" in metrics):
            logger.warning(
                "no Fisher information: plain squared errors and the widths of keys and values instead"
            )
        text = session.text(config.data)
        with progress(1, f"training {quantizer.name}", "k-means") as bar:

            def tick(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            codebook = train_codebook(
                keys,
                values,
                spec,
                session.fingerprint,
                TrainSpec(
                    scope=quantizer.scope,  # type: ignore[arg-type]  # checked by the configuration
                    trainer=config.train.trainer,  # type: ignore[arg-type]
                    seeding=quantizer.seeding,  # type: ignore[arg-type]
                    key_rotation=quantizer.keys.rotation,
                    value_rotation=quantizer.values.rotation,
                    key_metric=quantizer.keys.metric,  # type: ignore[arg-type]
                    value_metric=quantizer.values.metric,  # type: ignore[arg-type]
                    weighting=quantizer.weighting,  # type: ignore[arg-type]
                    iterations=config.train.iterations,
                    alternations=config.train.alternations,
                    seed=config.seed,
                    max_samples_per_centroid=config.train.max_samples_per_centroid,
                    device=str(session.device),
                ),
                information=information,
                squares=samples.squares(),
                calibration=text.source,
                calibration_sha256=text.sha256,
                tokens=samples.manifest["progress"]["tokens"],
                measure=Measure(session, measured) if measured else None,
                progress=tick,
            )
        meta = replace(codebook.meta, command=running.get(), commit=git_commit())
        replace(codebook, meta=meta).save(path)
        logger.info("codebook: %s", path)
    return path


def codebook_metrics(codebook: Codebook, path: Path) -> dict[str, Any]:
    """What a record says about a codebook."""
    meta = codebook.meta
    return {
        "codebook_file": str(path),
        "bits_nominal": codebook.bits_per_element,
        "key_error": fmean(error for layer in meta.key_error for error in layer),
        "value_error": fmean(error for layer in meta.value_error for error in layer),
        "calibration_text": meta.calibration,
        "calibration_tokens": meta.tokens,
        "samples": meta.samples,
        "trainer": meta.trainer,
        "seeding": meta.seeding,
        "weighting": meta.weighting,
    }
