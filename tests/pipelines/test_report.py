"""Tables and plots from rows."""

from __future__ import annotations

import pytest

from million_cli.errors import UserError
from million_cli.hydra_app import compose
from million_cli.pipelines import report as pipeline
from million_cli.pipelines.report import columns_for, report, table
from million_cli.report import style
from million_cli.report.pictures import plot_quality, plot_stages, plot_table
from million_cli.tables import append_row, frame_of, read_results


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
        append_row(
            tmp_path / "results.csv", row(run=run, perplexity={"old": "1.0", "new": "2.0"}[run]), "job"
        )
    report(compose([f"out={tmp_path}", "report.page=false"]))
    latest = capsys.readouterr().out
    assert "2.000" in latest
    assert "1.000" not in latest
    report(compose([f"out={tmp_path}", "report.page=false", "report.run=all"]))
    assert "1.000" in capsys.readouterr().out


def test_a_failed_row_shows_the_last_line_of_its_error(tmp_path, capsys):
    failed = {
        "status": "failed",
        "error": "Traceback:\n  a line\nValueError: bad luck",
        "kl_e3": "",
        "recall": "",
    }
    append_row(tmp_path / "r.csv", row(**failed), "job")
    report(compose([f"report.files=[{tmp_path}/r.csv]", "report.page=false"]))
    assert "ValueError: bad luck" in capsys.readouterr().out


def test_the_page_and_its_pictures_are_written_under_out(tmp_path, capsys):
    path = tmp_path / "named.csv"
    for run, bits in (("1", "4.0"), ("2", "3.0"), ("3", "2.0")):
        append_row(path, row(run=run, bits_nominal=bits), "job")
    report(compose([f"report.files=[{path}]", f"out={tmp_path}"]))
    stdout = capsys.readouterr().out
    assert f"page: {tmp_path}/report/index.html" in stdout
    assert f"Quality against bits: {tmp_path}/report/quality-reference.png" in stdout
    assert (tmp_path / "report" / "quality-reference.png").read_bytes().startswith(b"\x89PNG")
    # Every run of a file that is named; of the job's own results, the latest.
    assert len(read_results(path)) == 3
    assert (tmp_path / "report" / "quality-reference.csv").read_text().count(
        "\n"
    ) == 2  # one label, the latest
    path.rename(tmp_path / "results.csv")
    report(compose([f"out={tmp_path}"]))
    assert "2.0" in (tmp_path / "report" / "quality-reference.csv").read_text()


def test_rows_without_quality_make_no_plot(tmp_path):
    assert plot_quality(frame_of([row(kl_e3="", recall="")], "job"), tmp_path / "x.png") is None
    assert plot_table("longbench", [{"task": "lcc"}], tmp_path / "x.png", "pq") is None


def test_jobs_leave_pictures_beside_their_tables(tmp_path):
    cell = {"length": 256, "depth": 0.5, "recall": 0.5, "recall_dense": 1.0}
    bucket = {
        "first": 0,
        "last": 9,
        "kl_e3": 1.0,
        "kl_se_e3": None,
        "perplexity": 2.0,
        "perplexity_dense": 2.0,
    }
    bars = {"dense": {"MLP": 1.0}, "paged": {"MLP": 2.0}}
    for path in (
        plot_quality(frame_of([row(), row(kind="contiguous", bits_nominal="2")], "job"), tmp_path / "q.png"),
        plot_table("passkey", [cell], tmp_path / "r.png", "pq"),
        plot_table("positions", [bucket], tmp_path / "p.png", "pq"),
        plot_stages(bars, tmp_path / "b.png", "model"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(style, "available", lambda: False)
    bars = {"dense": {"MLP": 1.0}, "paged": {"MLP": 2.0}}
    assert plot_stages(bars, tmp_path / "x.png", "m") is None
    assert plot_quality(frame_of([row()], "job"), tmp_path / "x.png") is None
    append_row(tmp_path / "results.csv", row(), "job")
    report(compose([f"out={tmp_path}"]))
    assert "quality-reference.csv" in capsys.readouterr().out
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<img" not in page
    assert "5.68" in page


def test_bad_reports_are_refused(tmp_path):
    with pytest.raises(UserError, match="no results at"):
        report(compose([f"out={tmp_path}"]))
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"results\.csv: no column kind, schema; accepted are tables"):
        report(compose([f"out={tmp_path}"]))
    (tmp_path / "results.csv").unlink()
    append_row(tmp_path / "results.csv", row(kl_e3=""), "job")
    with pytest.raises(UserError, match=r"results\.csv: nothing that makes a figure"):
        report(compose([f"out={tmp_path}"]))
    with pytest.raises(UserError, match=r"report\.run=some: accepted are latest, all"):
        report(compose([f"out={tmp_path}", "report.run=some"]))


def test_every_kind_of_row_has_its_columns():
    assert columns_for(row()) is pipeline.QUALITY
    assert columns_for(row(tpot_ms="3")) is pipeline.SPEED
    assert columns_for(row(perplexity="", recall="")) is pipeline.TRAINING
    assert columns_for(row(status="refused")) is pipeline.FAILED
