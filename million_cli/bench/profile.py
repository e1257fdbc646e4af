"""Where the time of an engine's step goes: the kernels of real replays, as the profiler records them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.autograd import DeviceType
from transformers import PreTrainedModel

from million_cli.bench.cases import Case, time_steps
from million_cli.bench.stages import STAGES, Kernel, Share, breakdown, shares, split_steps
from million_cli.pipelines.plots import plot_stages
from million_cli.tables import Scalar, write_table

if TYPE_CHECKING:
    from million_cli.bench.e2e import Bench, Row

PROFILED_STEPS = 8
ORIGIN = ("model", "context", "batch", "gpu", "dtype", "commit", "torch", "transformers", "command")
"""Columns of `e2e.csv` that the stages are given too."""


def breakdown_rows(bench: Bench, model: PreTrainedModel, case: Case, impls: list[str]) -> dict[str, Row]:
    """A row for each implementation; the stages of all go into one CSV and one plot beside it, and the
    kernels of each stage into another CSV."""
    rows: dict[str, Row] = {}
    found: dict[str, list[Share]] = {}
    for impl in impls:
        rows[impl] = bench.guarded(partial(_one, bench, model, case, impl, found))
    stages = {impl: breakdown(of_impl) for impl, of_impl in found.items()}
    if stages:
        name = f"breakdown-{case.model or 'own'}-{case.context}-{case.batch}"
        path = bench.out / f"{name}.csv"
        described = bench.row(case, impls[0], {})
        origin = {name: described[name] for name in ORIGIN}
        table: list[dict[str, Scalar]] = [
            {"stage": stage, **{f"{impl}_us": round(us[stage], 2) for impl, us in stages.items()}, **origin}
            for stage in STAGES
        ]
        write_table(path, table, "breakdown")
        kernels = path.with_name(f"{name}-kernels.csv")
        launched = [
            {"impl": impl, **row._asdict(), "us": round(row.us, 2)}
            for impl, of_impl in found.items()
            for row in of_impl
        ]
        write_table(kernels, launched, "breakdown_kernels")
        title = f"{case.model or 'model'}, {case.context} tokens, batch {case.batch}"
        bars = {
            impl: {stage: us / 1e3 for stage, us in of_impl.items() if any(s[stage] for s in stages.values())}
            for impl, of_impl in stages.items()
        }
        plot = plot_stages(bars, path.with_suffix(".png"), title)
        for impl in stages:
            files = [path.name, kernels.name, *([plot.name] if plot else [])]
            rows[impl]["detail"] = "; ".join([str(rows[impl]["detail"]), *files])
    return rows


def _one(
    bench: Bench,
    model: PreTrainedModel,
    case: Case,
    impl: str,
    shares_of: dict[str, list[Share]],
) -> Row:
    steps = PROFILED_STEPS * 4
    runner = bench.runner(model, case, impl, steps)
    runner.fill(case.batch, case.context)
    runner.warm(steps)
    plain_us = 1e3 * statistics.median(time_steps(runner.step, PROFILED_STEPS, bench.device))
    found = shares(split_steps(profile(runner.step, PROFILED_STEPS, bench.device), PROFILED_STEPS))
    shares_of[impl] = found
    profiled_us = sum(row.us for row in found)
    return {
        **runner.facts(),
        "tpot_ms": plain_us / 1e3,
        "note": f"stages sum to {profiled_us / plain_us:.3f} of a step without the profiler",
    }


def profile(step: Callable[[], object], steps: int, device: torch.device) -> list[Kernel]:
    """The kernels of `steps` steps; copies from the host, of new pages' ids, are not the steps' own."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    kernels = [event for event in record.events() if event.device_type == DeviceType.CUDA]
    return [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in kernels
        if not event.name.startswith(("Memcpy HtoD", "Context", "Stream"))
    ]
