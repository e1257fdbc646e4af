"""Records: nothing is lost, columns grow, provenance is true."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from million_cli import results
from million_cli.errors import UserError
from million_cli.results import Provenance, Record, flatten, git_commit, now, version
from million_cli.tables import read_results, records

HERE = Provenance("million eval", "abc", "host", "3.11", "0.1.0", "2.13", "5.23", "cpu", "float32")


def record(**fields):
    values = {"run": "r", "verb": "eval", "status": "ok", "started": now(), "duration_s": 1.5}
    return Record(
        **{**values, "provenance": HERE, "config": {"seed": 0, "cache": {"kind": "paged"}}, **fields}
    )


def test_a_row_holds_everything(tmp_path):
    path = record(metrics={"kl_e3": 1.25, "tokens": 7}, fallbacks=["a", "b"]).save(tmp_path)
    table = read_results(path)
    (row,) = records(table)
    assert list(table)[:7] == ["kind", "schema", "run", "verb", "status", "started", "duration_s"]
    assert (row["kind"], row["schema"]) == ("job", "1")
    assert (row["kl_e3"], row["tokens"], row["fallbacks"]) == ("1.25", "7", "a; b")
    assert (row["config.seed"], row["config.cache.kind"]) == ("0", "paged")
    assert (row["commit"], row["device"], row["error"]) == ("abc", "cpu", "")
    (saved,) = (tmp_path / "records").glob("*.json")
    assert json.loads(saved.read_text())["metrics"] == {"kl_e3": 1.25, "tokens": 7}


def test_a_traceback_survives_the_csv(tmp_path):
    error = 'Traceback (most recent call last):\n  File "a.py", line 1\nValueError: "quoted", comma\n'
    path = record(status="failed", error=error).save(tmp_path)
    assert read_results(path)["error"].tolist() == [error]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        record().save(tmp_path / "file")


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1, "x"]}, "config") == {
        "config.a.b": 1,
        "config.a.c.d": None,
        "config.e": '[1, "x"]',
    }


def test_a_metric_may_not_hide_a_fixed_column():
    with pytest.raises(AssertionError, match="status"):
        record(metrics={"status": 1}).row()


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_of_a_checkout_is_recorded_and_changes_are_marked(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    monkeypatch.delenv("MILLION_COMMIT", raising=False)
    found = []
    for change in (None, "changed"):
        if change:
            (tmp_path / "pyproject.toml").write_text(change)
        git_commit.cache_clear()
        found.append(git_commit())
    git_commit.cache_clear()
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert found == [head, head + "+dirty"]
    monkeypatch.setenv("MILLION_COMMIT", "0123abc")
    assert git_commit() == "0123abc"
    git_commit.cache_clear()


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    git_commit.cache_clear()
    assert git_commit() == ""
    git_commit.cache_clear()


def test_versions_are_found_without_importing():
    code = "import sys, million_cli.results as r; print(r.version('torch'), 'torch' in sys.modules)"
    torch_version, imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch_version[0].isdigit()
    assert imported == "False"
    assert version("no-such-package") == "not installed"


def test_cells_of_a_record_are_text_that_reads_back(tmp_path):
    path = record(metrics={"flag": True, "nothing": None, "third": 1 / 3}).save(tmp_path)
    (row,) = records(read_results(path))
    assert (row["flag"], row["nothing"], float(row["third"])) == ("True", "", 1 / 3)
