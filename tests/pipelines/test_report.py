"""Tables and plots from rows."""

from __future__ import annotations

import pytest

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.pipelines import report as pipeline
from million_cli.pipelines.plots import plot_breakdown, plot_quality
from million_cli.pipelines.report import columns_for, report, table
from million_cli.results import append_row


def row(run="1", kind="paged", **cells):
    return {
        "run": run,
        "verb": "eval",
        "status": "ok",
        "bits_nominal": "4.0",
        "perplexity": "12.3456",
        "perplexity_dense": "12.0",
        "kl_e3": "5.678",
        "recall": "0.95",
        "recall_dense": "1.0",
        "cache_bytes": str(3 * 2**20),
        "cache_ratio": "0.27",
        "config.cache.kind": kind,
        "config.quantizer.name": "pq-4bit",
        "config.model.name": "reference",
        **cells,
    }


def test_the_table_formats_and_aligns():
    rows = [row(), row(kind="contiguous", recall="")]
    lines = table(rows, columns_for(rows[0])).splitlines()
    assert lines[0].split() == (
        [
            "verb",
            "model",
            "quantizer",
            "cache",
            "bits",
            "perplexity",
            "KL",
            "e-3",
            "recall",
            "%",
            "dense",
            "%",
            "cache",
            "MiB",
            "of",
            "16-bit",
        ]
    )
    assert lines[2].split() == [
        "eval",
        "reference",
        "pq-4bit",
        "paged",
        "4.0",
        "12.346",
        "5.68",
        "95.0",
        "100.0",
        "3.00",
        "0.27",
    ]
    assert lines[3].split()[7] == "-"
    assert lines[2].index("12.346") == lines[3].index("12.346")


def test_only_the_latest_run_is_shown_unless_all_are_asked_for(tmp_path, capsys):
    for run in ("old", "new"):
        append_row(tmp_path / "results.csv", row(run=run, perplexity={"old": "1.0", "new": "2.0"}[run]))
    report(compose([f"out={tmp_path}", "report.plot=false"]))
    latest = capsys.readouterr().out
    assert "2.000" in latest
    assert "1.000" not in latest
    report(compose([f"out={tmp_path}", "report.plot=false", "report.run=all"]))
    assert "1.000" in capsys.readouterr().out


def test_a_failed_row_shows_the_last_line_of_its_error(tmp_path, capsys):
    failed = {
        "status": "failed",
        "error": "Traceback:\n  a line\nValueError: bad luck",
        "kl_e3": "",
        "recall": "",
    }
    append_row(tmp_path / "r.csv", row(**failed))
    report(compose([f"report.csv={tmp_path}/r.csv", "report.plot=false"]))
    assert "ValueError: bad luck" in capsys.readouterr().out


def test_the_plot_is_drawn_beside_the_csv(tmp_path, capsys):
    path = tmp_path / "results.csv"
    for kind, bits in (("dense", "32.0"), ("contiguous", "4.0"), ("paged", "4.0")):
        append_row(path, row(kind=kind, bits_nominal=bits))
    report(compose([f"report.csv={path}"]))
    assert f"plot: {tmp_path}/results.png" in capsys.readouterr().out
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_rows_without_quality_make_no_plot(tmp_path):
    assert plot_quality([{"bits_nominal": "4", "kl_e3": "", "recall": ""}], tmp_path / "x.png") is None


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert (
        plot_breakdown([{"stage": "MLP", "dense_ms": 1, "cache_ms": 2}], tmp_path / "x.png", "m", "paged")
        is None
    )
    assert plot_quality([row()], tmp_path / "x.png") is None


def test_bad_reports_are_refused(tmp_path):
    with pytest.raises(UserError, match="no results at"):
        report(compose([f"out={tmp_path}"]))
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a results CSV"):
        report(compose([f"out={tmp_path}"]))
    with pytest.raises(UserError, match=r"report\.run=some: accepted are latest, all"):
        report(compose([f"out={tmp_path}", "report.run=some"]))


def test_every_kind_of_row_has_its_columns():
    assert columns_for(row()) is pipeline.QUALITY
    assert columns_for(row(tpot_ms="3")) is pipeline.SPEED
    assert columns_for(row(perplexity="", recall="")) is pipeline.TRAINING
    assert columns_for(row(status="refused")) is pipeline.FAILED
