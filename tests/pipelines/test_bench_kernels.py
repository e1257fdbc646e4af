"""`million bench kernel` without a GPU: what happens to the rows."""

from __future__ import annotations

import csv

import pytest

from million_cli.bench import kernels
from million_cli.bench.kernels import COLUMNS
from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.ops import compiled
from million_cli.pipelines import run

ROWS = [
    {"gpu": "a GPU", "impl": "read bandwidth", "median_us": 500.0, "tb_per_s": 4.3, "bytes_read": 1 << 31},
    {"gpu": "a GPU", "impl": "sdpa flash", "batch": 1, "median_us": 40.0, "ratio_to_best_dense": 1.0},
    {"gpu": "a GPU", "impl": "million paged", "batch": 1, "median_us": 10.0, "ratio_to_best_dense": 4.0},
]


def job_of(*overrides):
    return compose(["bench=kernel", *overrides])


def test_rows_become_a_csv_and_a_short_table(tmp_path, monkeypatch, capsys):
    def bench(config, done):
        assert [case.batch for case in config.decode_cases()] == [4, 4]
        done()
        yield from ROWS

    monkeypatch.setattr(compiled, "load", lambda: None)
    monkeypatch.setattr(kernels, "bench", bench)
    (result,) = run("bench", job_of(f"out={tmp_path}", "bench.batch=[4]"))
    assert result.device == "a GPU"
    assert result.metrics["read_tb_per_s"] == 4.3
    assert result.metrics["best_ratio_to_dense"] == 4.0
    assert result.metrics["kernel_rows"] == 3
    with open(result.metrics["kernel_table"]) as handle:
        rows = list(csv.DictReader(handle))
    assert tuple(rows[0]) == ("kind", "schema", *COLUMNS)
    assert [row["impl"] for row in rows] == ["read bandwidth", "sdpa flash", "million paged"]
    assert rows[2]["batch"] == "1"
    shown = capsys.readouterr().out
    assert "million paged" in shown
    assert result.metrics["kernel_table"] in shown
    assert str(tmp_path) in result.metrics["kernel_table"]


def test_without_kernels_it_says_why(tmp_path, monkeypatch):
    def load():
        raise compiled.KernelsUnavailable("no nvcc")

    monkeypatch.setattr(compiled, "load", load)
    with pytest.raises(UserError, match="bench kernel needs a GPU and the compiled kernels: no nvcc"):
        run("bench", job_of(f"out={tmp_path}"))
