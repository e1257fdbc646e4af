"""Timing, and chains of stages."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from million_cli.bench.spans import STAGES
from million_cli.errors import UserError
from million_cli.pipelines import Result, run


def test_bench_times_and_draws_the_stages(job, tmp_path):
    (result,) = run("bench", job(f"out={tmp_path}", "bench.breakdown=true", "cache=paged"))
    assert result.metrics["tpot_ms"] > 0
    with open(result.metrics["breakdown_table"]) as handle:
        rows = list(csv.DictReader(handle))
    assert [row["stage"] for row in rows] == list(STAGES)
    series = [column for column in rows[0] if column.endswith("_us")]
    assert series == ["dense_us", "paged, pq-4bit_us"]
    for column in series:
        times = {row["stage"]: float(row[column]) for row in rows}
        assert times["attention"] > 0
        assert times["MLP"] > 0
    assert Path(result.metrics["breakdown_plot"]).read_bytes().startswith(b"\x89PNG")


def test_a_dense_job_is_timed_once_and_equals_itself(job):
    (result,) = run("bench", job("cache=dense"))
    assert result.metrics["tpot_ratio"] == 1.0
    assert result.metrics["bits_nominal"] == 32


def test_bytes_are_of_the_tokens_held(job):
    (result,) = run("bench", job("cache=paged", "bench.batch=2"))
    found = result.metrics
    assert found["cache_tokens"] == 2 * (48 + 4 + 2)
    assert (
        found["cache_bytes"]
        == found["code_bytes"]
        + found["window_bytes"]
        + found["block_table_bytes"]
        + (found["pool_reserved_bytes"])
    )
    assert found["backend"] == "paged torch"
    assert found["tpot_ratio"] == pytest.approx(found["tpot_dense_ms"] / found["tpot_ms"])
    assert found["tokens_per_s"] == pytest.approx(2000 / found["tpot_ms"])


def test_a_chain_takes_only_the_benchmark_of_its_cache(job):
    config = job("stages=[bench]")
    config.bench = {"name": "kernel"}
    with pytest.raises(UserError, match=r"bench=kernel: accepted in a chain of stages is speed"):
        run("run", config)


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
