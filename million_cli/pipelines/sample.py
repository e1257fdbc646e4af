"""Sampling: the model reads the calibration text, a reservoir keeps keys and values of each layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from million_cli.calibration.calibrate import Calibration
from million_cli.calibration.samples import Samples
from million_cli.calibration.windows import CODE
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.session import Session
from million_cli.pipelines.stages import code_digest, locked, stage_key
from million_cli.text import load_text


def run_sample(config: JobConfig) -> list[Result]:
    """`million sample`."""
    session = Session(config)
    folder = sample(session)
    manifest = Samples(folder).manifest
    return [
        session.result(
            {
                "samples_folder": str(folder),
                "sample_tokens": manifest["progress"]["tokens"],
                "samples": min(manifest["samples"], manifest["seen"]),
                "calibration_text": session.text(config.data).source,
            }
        )
    ]


def calibration(session: Session) -> Calibration:
    """The job's calibration."""
    config = session.config
    return Calibration(
        session.model,
        session.tokenizer,
        session.text(config.data),
        config.recipe,
        config.seed,
        config.cache.window(),
    )


def sample_key(session: Session) -> str:
    """The key of the job's sample."""
    config = session.config
    return stage_key(
        {
            "model": session.identity,
            "text": session.text(config.data).sha256,
            "code_text": load_text(CODE).sha256,
            "sample": asdict(config.sample),
            "seed": config.seed,
            **code_digest("hf", "codecs", "calibration"),
        }
    )


def sample(session: Session) -> Path:
    """Sample K and V; continue an interrupted sampling, or return a finished one.

    Returns:
        The folder of safetensors shards (`calibration.sampling.Samples`).

    Raises:
        UserError: the text is too short, the context too long, or the folder cannot be written.
    """
    config = session.config
    folder = Path(config.out) / "samples" / f"{config.model.name}-{sample_key(session)}"
    with locked(folder):
        calibration(session).sample(folder, config.reuse)
    return folder
