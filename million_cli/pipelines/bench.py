"""The verb `bench`: one cache beside the dense one, whole comparisons, or the kernels alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from million_cli.bench import kernel_cases, kernels, speed
from million_cli.bench.cases import Config as ComparisonConfig
from million_cli.bench.e2e import Bench, table
from million_cli.bench.implementations import DENSE, Given
from million_cli.bench.models import Source
from million_cli.bench.stages import write_stages
from million_cli.errors import UserError
from million_cli.ops import compiled
from million_cli.pipelines import Result
from million_cli.pipelines.caches import Caches
from million_cli.pipelines.config import JobConfig, typed
from million_cli.pipelines.session import Session
from million_cli.progress import progress
from million_cli.results import git_commit, now, running, version
from million_cli.tables import write_table


def run_bench(config: JobConfig) -> list[Result]:
    """`million bench`: `bench=speed` times one cache, `e2e` compares many, `kernel` measures kernels."""
    task = typed("bench", config.bench)
    if isinstance(task, kernel_cases.Config):
        return [bench_kernels(config, task)]
    if isinstance(task, ComparisonConfig):
        return [compare(config, task)]
    session = Session(config)
    return [bench(session, Caches(session))]


def bench(session: Session, caches: Caches) -> Result:
    """Time the job's cache; with `bench.breakdown` the stages become a CSV and a plot under `out/tables`.

    Times are never taken from an earlier run.

    Raises:
        UserError: an unknown setting, or see `speed.measure`.
    """
    config = session.config
    task = typed("bench", config.bench)
    if not isinstance(task, speed.Config):
        raise UserError(f"bench={task.name}: accepted in a chain of stages is speed")
    dense = config.quantizer.kind == "dense"
    kind, quantizer = config.cache.kind, config.quantizer.name
    impl = DENSE if dense else Given(f"{kind}, {quantizer}", lambda: caches("exact"))
    measured = speed.measure(session.model, impl, task, config.seed)
    metrics = dict(measured.metrics)
    if measured.stages:
        path = Path(config.out) / "tables" / f"breakdown-{kind}-{quantizer}-{_stamp()}.csv"
        origin = {"commit": git_commit(), "torch": version("torch"), "command": running.get()}
        title = f"{config.model.name}, {task.context} tokens, batch {task.batch}"
        files = write_stages(path, measured.stages, title, origin)
        metrics["breakdown_table"] = str(path)
        metrics["breakdown_plot"] = next((str(file) for file in files if file.suffix == ".png"), None)
    if caches.codebook_path is not None:
        metrics["codebook_file"] = str(caches.codebook_path)
    return session.result(metrics, caches.fallbacks)


def compare(config: JobConfig, task: ComparisonConfig) -> Result:
    """Measure all cases; prints a short table, and the CSV's name.

    Raises:
        UserError: a case out of range, an unknown model, or one that does not fit into memory.
    """
    session = Session(config)
    model = config.model
    own = Source(
        model.name,
        model.path,
        model.shape,
        session.device,
        session.dtype,
        trust_remote_code=model.trust_remote_code,
        loaded=lambda: session.model,
    )
    run = Bench(task, Path(config.out), session.device, config.seed, own)
    rows = run.run()
    print(table(rows))
    print(f"\n{run.csv}")
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "oom", "error")}
    return Result(
        config={"bench": config.bench, "seed": config.seed, "out": config.out},
        metrics={"e2e_table": str(run.csv), **{f"rows_{name}": n for name, n in counts.items()}},
        device=session.device_name,
    )


def bench_kernels(config: JobConfig, task: kernel_cases.Config) -> Result:
    """Measure kernels; the rows become `out/tables/kernel-<time>.csv`, a short table is printed.

    Raises:
        UserError: a machine on which the kernels do not run.
    """
    try:
        compiled.load()
    except compiled.KernelsUnavailable as error:
        raise UserError(f"bench kernel needs a GPU and the compiled kernels: {error}") from error
    cases = len(task.decode_cases()) + len(task.encode_cases())
    with torch.inference_mode(), progress(cases, "measuring kernels", "case") as bar:
        frame = kernels.as_frame(list(kernels.bench(task, bar.update)))
    path = Path(config.out) / "tables" / f"kernel-{_stamp()}.csv"
    write_table(path, frame, "kernel")
    print(kernels.short_table(frame))
    print(f"kernel table: {path}")
    ours = frame[frame["impl"] == "million paged"]
    metrics = {
        "kernel_table": str(path),
        "kernel_rows": len(frame),
        "read_tb_per_s": float(frame["tb_per_s"].iloc[0]),
        "best_ratio_to_dense": float(ours["ratio_to_best_dense"].max()) if len(ours) else None,
    }
    return Result(config=asdict(config), metrics=metrics, device=str(frame["gpu"].iloc[0]))


def _stamp() -> str:
    return now().replace(":", "").replace("+0000", "Z")
