"""Timing, and chains of stages."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from million_cli.bench.stage_clock import STAGES
from million_cli.pipelines import Result, run


def test_bench_times_and_draws_the_stages(job, tmp_path):
    (result,) = run("bench", job(f"out={tmp_path}", "bench.breakdown=true", "cache=paged"))
    assert result.metrics["tpot_ms"] > 0
    with open(result.metrics["breakdown_table"]) as handle:
        rows = list(csv.DictReader(handle))
    assert [row["stage"] for row in rows] == list(STAGES)
    assert Path(result.metrics["breakdown_plot"]).read_bytes().startswith(b"\x89PNG")


def test_times_are_never_found_again(job):
    first, second = (run("bench", job())[0].metrics for _ in range(2))
    assert first["tpot_ms"] != second["tpot_ms"]
    assert "reused_from" not in second


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("[sample]", [("contiguous", "samples_folder")]),
        ("[sample,train]", [("contiguous", "codebook_file")]),
        ("[train,evaluate]", [("contiguous", "kl_e3")]),
        ("[baseline]", [("dense", "kl_e3")]),
        (
            "[bench,evaluate,baseline]",
            [("dense", "kl_e3"), ("contiguous", "kl_e3"), ("contiguous", "tpot_ms")],
        ),
    ],
)
def test_a_chain_leaves_a_result_a_measurement(job, stages, expected):
    results: list[Result] = run("run", job(f"stages={stages}"))
    assert [result.config["cache"]["kind"] for result in results] == [kind for kind, _ in expected]
    for result, (_, metric) in zip(results, expected, strict=True):
        assert metric in result.metrics
