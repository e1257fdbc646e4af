"""Sampling: the model reads the calibration text, a reservoir keeps keys and values of each layer."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path

import torch

from million_cli.calibration.information import Information, NoGradients
from million_cli.calibration.sampling import Samples, SamplingCache, read_text
from million_cli.errors import UserError
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig
from million_cli.pipelines.session import Session
from million_cli.pipelines.stages import code_digest, locked, stage_key
from million_cli.progress import progress
from million_cli.tasks.base import check_context, longest_context
from million_cli.text import TextConfig, load_text

logger = logging.getLogger("million")
SAVE_EVERY_S = 60.0
CODE = TextConfig("python-excerpt")
"""The code that is spread among the calibration text."""


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
            **code_digest("hf", "codecs", "calibration", "pipelines/sample.py"),
        }
    )


def sample(session: Session) -> Path:
    """Sample K and V, or go on with an interrupted sampling, or find a finished one.

    Returns:
        The folder of safetensors shards (`calibration.sampling.Samples`).

    Raises:
        UserError: the text is too short, the context too long, or the folder cannot be written.
    """
    config = session.config
    folder = Path(config.out) / "samples" / f"{config.model.name}-{sample_key(session)}"
    with locked(folder):
        cache = SamplingCache(session.model, config.sample.reservoir, config.seed)
        state = cache.resume(folder) if config.reuse else None
        if state is not None and not {"windows", "tokens", "done"} <= state.keys():
            raise UserError(
                f"{folder}: the manifest's progress is damaged; remove the folder to sample again"
            )
        if state is not None and state["done"]:
            logger.info("samples: %s (from an earlier run)", folder)
            return folder
        windows = calibration_windows(session)
        done = state["windows"] if state is not None else 0
        information = Information(session.model, seed=config.seed)
        if done:
            logger.info("going on with the samples in %s at window %d of %d", folder, done, len(windows))
            gathered = Samples(folder).information()
            if gathered is not None:
                information.restore(gathered)
        _read(session, cache, information, windows, done, folder)
        logger.info("samples: %s", folder)
    return folder


def _read(
    session: Session,
    cache: SamplingCache,
    information: Information,
    windows: torch.Tensor,
    done: int,
    folder: Path,
) -> None:
    config = session.config.sample
    saved = time.monotonic()
    wanted = min(config.information, windows.numel())

    def save(finished: bool) -> None:
        progress = {"windows": done, "tokens": done * windows.shape[1], "done": finished}
        cache.save(folder, progress, information.state())

    with progress(windows.numel() + wanted, "sampling", "tok") as bar:
        bar.update(done * windows.shape[1] + information.read_tokens)
        for start in range(done, len(windows), config.batch):
            ids = windows[start : start + config.batch]
            first = cache.seen
            read_text(session.model, cache, ids)
            for row, window in enumerate(ids):
                if information.read_tokens + len(window) <= wanted:
                    try:
                        cache.weigh(information.read(window[None]), first + row, len(ids))
                    except NoGradients as error:
                        logger.warning("codebooks will be trained without Fisher information: %s", error)
                        information.forget()
                        wanted = 0
                    bar.update(len(window))
            bar.update(ids.numel())
            done = start + len(ids)
            if done < len(windows) and time.monotonic() - saved > SAVE_EVERY_S:
                save(False)
                saved = time.monotonic()
    save(True)


def calibration_windows(session: Session, repeats: bool = True) -> torch.Tensor:
    """Token ids `[windows, context]`: calibration text, with code and random repetitions spread among it.

    A text shorter than a window is one window.  Without `repeats` the rest is the same.
    """
    config, text = session.config.sample, session.text(session.config.data)
    context = config.context or min(longest_context(session.model), 2048)
    check_context("sample.context", context, session.model)
    ids = session.tokenizer(text.content, verbose=False)["input_ids"][: config.tokens]
    if len(ids) < 2:
        raise UserError(f"the calibration text {text.source} has {len(ids)} tokens; accepted are at least 2")
    context = min(context, len(ids))
    whole = len(ids) // context
    code_ids = session.tokenizer(load_text(CODE).content, verbose=False)["input_ids"]
    shares = {"code": config.code, "repeats": config.repeats}
    wanted = {name: round(whole * share / (1 - sum(shares.values()))) for name, share in shares.items()}
    code = torch.tensor(code_ids[: wanted["code"] * context], dtype=torch.int64)
    vocabulary = min(len(session.tokenizer), session.model.config.get_text_config(decoder=True).vocab_size)
    return _interleave(
        torch.tensor(ids[: whole * context], dtype=torch.int64).view(whole, context),
        code[: len(code) // context * context].view(-1, context),
        _repeating(wanted["repeats"] if repeats else 0, context, vocabulary, session.config.seed),
    )


def _repeating(n: int, context: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Windows `[n, context]` of random tokens, each with a period of its own, 1/16 to 1/2 of the context."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.empty(n, context, dtype=torch.int64)
    for window in windows:
        period = int(torch.randint(max(1, context // 16), context // 2 + 1, (), generator=generator))
        tokens = torch.randint(vocabulary, (period,), generator=generator)
        window.copy_(tokens.repeat(-(-context // period))[:context])
    return windows


def _interleave(*parts: torch.Tensor) -> torch.Tensor:
    """The rows of all, in order and evenly spread, so that a part from the start has all in proportion."""
    at = torch.cat([(torch.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return torch.cat(parts)[at.argsort(stable=True)]
