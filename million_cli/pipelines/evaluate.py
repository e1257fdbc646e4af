"""Evaluation: tasks measured with the job's cache beside the dense one, into one record."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from million_cli.errors import UserError
from million_cli.files import write_text
from million_cli.journal import Journal, Journals
from million_cli.pipelines import Result
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig, typed
from million_cli.pipelines.session import Session
from million_cli.pipelines.stages import code_digest, locked, stage_key
from million_cli.pipelines.train_codebook import codebook_metrics
from million_cli.registry import TASKS
from million_cli.report.pictures import plot_table
from million_cli.results import now
from million_cli.tables import Scalar, write_table
from million_cli.tasks.base import finite
from million_cli.text import Text, TextConfig

logger = logging.getLogger("million")

Job = tuple[Any, Any]
"""A task's configuration and its material: a text, the result of its module's `load`, or None."""


ANSWERING = ("pq", "ops", "cache", "hf", "codecs", "tasks")
"""Where the code is that an answer of a resumable task depends on; a change elsewhere does not undo it."""


def run_evaluate(config: JobConfig) -> list[Result]:
    """`million eval`."""
    session = Session(config)
    jobs = prepare(session)
    return [evaluate(session, jobs, Caches(session))]


def prepare(session: Session) -> list[Job]:
    """`config.task` and each of `config.also`, checked, with their texts: before anything slow begins.

    Raises:
        UserError: an unknown task or setting, or a text that cannot be had.
    """
    config = session.config
    tasks = [("task", config.task), *((f"also.{name}", task) for name, task in config.also.items())]
    configs = [typed(where, settings) for where, settings in tasks]
    return [(task, _material(session, task)) for task in configs]


def evaluate(session: Session, jobs: list[Job], caches: Caches) -> Result:
    """Measure what `prepare` gave, all into one result.

    Raises:
        UserError: a text that the codebook was trained on, or a task's own.
    """
    for _, text in jobs:
        if isinstance(text, Text):
            refuse_calibration_text(session, caches, text)
    metrics: dict[str, Scalar] = {}
    fallbacks: dict[str, None] = {}
    for task, text in jobs:
        found = _measured(session, caches, task, text)
        metrics = {**found["metrics"], **metrics}  # what both measure (bytes) is the main task's
        fallbacks.update(dict.fromkeys(found["fallbacks"]))
        if found["reused_from"]:
            metrics["reused_from"] = found["reused_from"]
    if caches.codebook is not None and caches.codebook_path is not None:
        metrics |= codebook_metrics(caches.codebook, caches.codebook_path)
    return session.result(metrics, list(fallbacks))


def refuse_calibration_text(session: Session, caches: Caches, text: Text) -> None:
    """Raise unless the quantizer was calibrated on another text than `text`, or `allow_same_text` is set.

    Raises:
        UserError: they are the same, or one contains the other.
    """
    config = session.config
    if not caches.calibrated or config.allow_same_text:
        return
    same = caches.codebook is not None and caches.codebook.meta.calibration_sha256 == text.sha256
    if not same and config.codebook is None:
        calibration = session.text(config.data).content
        same = calibration in text.content or text.content in calibration
    if same:
        raise UserError(
            f"the quantizer was calibrated on the text under evaluation ({text.source}); "
            "name another one, or allow_same_text=true"
        )


def _material(session: Session, task: Any) -> Any:
    load = getattr(TASKS.load(task.name), "load", None)
    if load is not None:
        return load(task)
    return session.text(task) if isinstance(task, TextConfig) else None


def _measured(session: Session, caches: Caches, task: Any, text: Any) -> dict[str, Any]:
    """A task's metrics and fallbacks, from an earlier run if nothing that matters has changed."""
    config = session.config
    codebook = caches.codebook_path
    dense = {"model": session.identity, **code_digest(*ANSWERING)}
    cache = {
        **dense,
        "codebook": hashlib.sha256(codebook.read_bytes()).hexdigest() if codebook else None,
        "quantizer": None if codebook else {**asdict(config.quantizer), "name": ""},
        "codec": caches.codec_key,
        "cache": asdict(config.cache) if config.quantizer.kind != "dense" else None,
        "strict": config.strict,
        "fold": config.fold,
    }
    key = stage_key(
        {
            **cache,
            "task": asdict(task),
            "text": text.sha256 if text is not None else None,
            "files": getattr(text, "files", None),
            "seed": config.seed,
            **TASKS.source(task.name),
            **code_digest(""),
        }
    )
    path = Path(config.out) / "evaluations" / f"{task.name}-{key}.json"
    with locked(path):
        if config.reuse and path.is_file() and (kept := _kept(path)):
            logger.info("%s: %s (from an earlier run)", task.name, path)
            return {**kept, "reused_from": kept["measured"]}
        logger.info("%s with cache=%s, quantizer=%s", task.name, config.cache.kind, config.quantizer.name)
        module = TASKS.load(task.name)
        resume = {}
        if getattr(module, "RESUMABLE", False):
            same = config.quantizer.kind == "dense"
            resume["journals"] = _journals(path, dense if same else cache, dense, fresh=not config.reuse)
        measure = finite(task.name)(module.measure)
        result = measure(session.model, session.tokenizer, caches, text, task, config.seed, **resume)
        files: dict[str, str] = {}
        for name, rows in result.tables.items():
            place = path.with_name(f"{path.stem}-{name}.csv")
            write_table(place, rows, name)
            files[f"{name}_table"] = str(place)
            if plot := plot_table(name, rows, place.with_suffix(".png"), config.quantizer.name):
                files[f"{name}_plot"] = str(plot)
        found: dict[str, Any] = {
            "measured": now(),
            "metrics": {**result.metrics, **files},
            "fallbacks": caches.fallbacks,
        }
        write_text(path, json.dumps(found, indent=1) + "\n")
    return {**found, "reused_from": None}


def _kept(path: Path) -> dict[str, Any] | None:
    """The result of an earlier run; None, with a line, if the file is damaged or its tables are gone."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = [found["metrics"][key] for key in found["metrics"] if key.endswith(("_table", "_plot"))]
        gone = [file for file in files if not Path(file).is_file()]
        whole = isinstance(found["measured"], str) and isinstance(found["fallbacks"], list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, gone = False, []
    if whole and not gone:
        return found
    why = f"{gone[0]} is gone" if gone else f"{path} is damaged"
    logger.warning("%s; measured again", why)
    return None


def _journals(path: Path, cache: dict[str, Any], dense: dict[str, Any], fresh: bool) -> Journals:
    """Where a resumable task keeps its answers: by all that the cache, and the dense cache, depend on.

    The dense cache's are shared by every quantizer.
    """
    task = path.name.rpartition("-")[0]
    files = [path.with_name(f"{task}-answers-{stage_key(what)}.jsonl") for what in (cache, dense)]
    made = {file: Journal(file, fresh) for file in files}
    return Journals(*(made[file] for file in files))
