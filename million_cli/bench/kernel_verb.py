"""`million bench kernel`: attention and encoding kernels beside torch's dense attention, into a CSV."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from million_cli.bench.kernels import Config, as_frame, bench, short_table
from million_cli.errors import UserError
from million_cli.ops import compiled
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig, typed
from million_cli.progress import progress
from million_cli.results import now
from million_cli.tables import write_table


def run_kernel_bench(config: JobConfig) -> list[Result]:
    """Measure `config.bench`; the rows become `out/tables/kernel-<time>.csv`, a short table is printed.

    Raises:
        UserError: an unknown setting, or a machine on which the kernels do not run.
    """
    task = typed("bench", config.bench)
    assert isinstance(task, Config)
    try:
        compiled.load()
    except compiled.KernelsUnavailable as error:
        raise UserError(f"bench kernel needs a GPU and the compiled kernels: {error}") from error
    cases = len(task.decode_cases()) + len(task.encode_cases())
    with torch.inference_mode(), progress(cases, "measuring kernels", "case") as bar:
        table = as_frame(list(bench(task, bar.update)))
    path = Path(config.out) / "tables" / f"kernel-{now().replace(':', '').replace('+0000', 'Z')}.csv"
    write_table(path, table, "kernel")
    print(short_table(table))
    print(f"kernel table: {path}")
    ours = table[table["impl"] == "million paged"]
    metrics = {
        "kernel_table": str(path),
        "kernel_rows": len(table),
        "read_tb_per_s": float(table["tb_per_s"].iloc[0]),
        "best_ratio_to_dense": float(ours["ratio_to_best_dense"].max()) if len(ours) else None,
    }
    return [Result(config=asdict(config), metrics=metrics, device=str(table["gpu"].iloc[0]))]
