"""Training: samples become a codebook."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from million_cli.calibration.samples import Sampled, Samples
from million_cli.errors import UserError
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.sample import calibration, sample, sample_key
from million_cli.pipelines.session import Session
from million_cli.pipelines.stages import code_digest, locked, stage_key
from million_cli.pq import Codebook
from million_cli.results import git_commit, running

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
    recipe = config.recipe
    key = stage_key(
        {
            "sample": sample_key(session),
            "recipe": replace(recipe, quantizer=replace(recipe.quantizer, name="")).to_dict(),
            "seed": config.seed,
            "device": session.device_name,
            "window": asdict(config.cache.window()) if recipe.quantizer.bits is not None else None,
            **code_digest("pq", "codecs", "calibration", "tasks/perplexity.py"),
        }
    )
    path = Path(config.out) / "codebooks" / f"{config.model.name}-{config.quantizer.name}-{key}.safetensors"
    with locked(path):
        if config.reuse and path.is_file():
            logger.info("codebook: %s (from an earlier run)", path)
            return path
        sampled = Sampled.in_folder(Samples(sample(session)))
        codebook = calibration(session).train(sampled)
        meta = replace(codebook.meta, command=running.get(), commit=git_commit())
        replace(codebook, meta=meta).save(path)
        logger.info("codebook: %s", path)
    return path


def codebook_metrics(codebook: Codebook, path: Path) -> dict[str, Any]:
    """The columns of a record about a codebook."""
    meta = codebook.meta
    return {
        "codebook_file": str(path),
        "bits_nominal": codebook.bits_per_element,
        "codebook_positions": "any" if meta.positions is None else meta.positions,
        "key_error": fmean(error for layer in meta.key_error for error in layer),
        "value_error": fmean(error for layer in meta.value_error for error in layer),
        "calibration_text": meta.calibration,
        "calibration_tokens": meta.tokens,
        "samples": meta.samples,
        "held_out": meta.held_out,
        "trainer": meta.recipe.train.trainer,
        "seeding": meta.recipe.quantizer.seeding,
        "weighting": meta.recipe.quantizer.weighting,
    }
