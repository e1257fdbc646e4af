"""Timing: the bench task with the job's cache beside the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from million_cli.pipelines import Result
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig, typed
from million_cli.pipelines.plots import plot_breakdown
from million_cli.pipelines.session import Session
from million_cli.registry import BENCHES
from million_cli.results import now
from million_cli.tables import Scalar, write_table


def run_bench(config: JobConfig) -> list[Result]:
    """`million bench`: of one cache, with `bench=kernel` of the kernels, with `bench=e2e` of whole texts."""
    if config.bench.get("name") == "kernel":
        from million_cli.bench.kernel_verb import run_kernel_bench

        return run_kernel_bench(config)
    if config.bench.get("name") == "e2e":
        from million_cli.bench.e2e import run_e2e

        return run_e2e(config)
    session = Session(config)
    return [bench(session, Caches(session))]


def bench(session: Session, caches: Caches) -> Result:
    """Time `config.bench`; its tables become CSVs under `out/tables`, the breakdown a plot too.

    Times are never taken from an earlier run.

    Raises:
        UserError: an unknown task or setting, or the task's own.
    """
    config = session.config
    task: Any = typed("bench", config.bench)
    measured = BENCHES.load(task.name).measure(
        session.model, session.tokenizer, caches, None, task, config.seed
    )
    metrics: dict[str, Scalar] = dict(measured.metrics)
    folder, stamp = Path(config.out) / "tables", now().replace(":", "").replace("+0000", "Z")
    for name, rows in measured.tables.items():
        path = folder / f"{name}-{config.cache.kind}-{config.quantizer.name}-{stamp}.csv"
        write_table(path, rows, name)
        metrics[f"{name}_table"] = str(path)
        if name == "breakdown":
            plot = plot_breakdown(rows, path.with_suffix(".png"), config.model.name, config.cache.kind)
            metrics["breakdown_plot"] = str(plot) if plot else None
    if caches.codebook_path is not None:
        metrics["codebook_file"] = str(caches.codebook_path)
    return session.result(metrics, caches.fallbacks)
