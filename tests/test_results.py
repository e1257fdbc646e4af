"""Records: nothing is lost, columns grow, provenance is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from million_cli import results
from million_cli.errors import UserError
from million_cli.results import Provenance, Record, check_destination, flatten, git_commit, now, version
from million_cli.tables import read_results, records
from million_cli.text import synthetic_text

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


@pytest.mark.parametrize("content", ["a,b\n1,2\n", 'run,a\n1,"cut'])
def test_a_result_that_its_table_does_not_take_is_kept_beside_it(tmp_path, content, capsys):
    (tmp_path / "results.csv").write_text(content)
    place = record(metrics={"kl_e3": 1.5}).save(tmp_path)
    assert place.parent == tmp_path
    assert place.match("results-*.csv")
    assert read_results(place)["kl_e3"].tolist() == ["1.5"]
    said = capsys.readouterr().err
    assert "results.csv is not a results CSV" in said
    assert f"the result is in {place}" in said
    assert (tmp_path / "results.csv").read_text() == content


def test_a_result_without_a_folder_is_kept_in_the_temporary_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    place = record().save(tmp_path / "file")
    assert place.parent == tmp_path / "tmp"
    assert len(read_results(place)) == 1
    assert str(place) in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        record(metrics={"kl_e3": 1.5}).save(tmp_path / "file")
    assert '"kl_e3": 1.5' in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot write"):
        record(status="failed").save(tmp_path / "file")


def test_a_destination_is_checked_before_any_work(tmp_path):
    check_destination(tmp_path / "new")
    check_destination(record().save(tmp_path).parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        check_destination(tmp_path / "file")
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a results CSV: it has no column `run`"):
        check_destination(tmp_path)


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


TINY = [
    "eval",
    "--dataset",
    "TEXT",
    "model=tiny-random",
    "cache=dense",
    "task.context=64",
    "task.max_tokens=128",
]


def million(folder, text, *more):
    """`million eval` with a tiny model: exit code, lines of standard output and of standard error."""
    arguments = [*(text if word == "TEXT" else word for word in TINY), f"out={folder}", *more]
    done = subprocess.run(
        [sys.executable, "-m", "million_cli", *arguments],
        capture_output=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_text_whose_name_is_no_utf8_leaves_its_row(tmp_path):
    text = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    Path(os.fsdecode(text)).write_text(synthetic_text(3, 4000))
    code, _, stderr = million(tmp_path / "out", text)
    assert (code, "Traceback" in stderr) == (0, False)
    (row,) = records(read_results(tmp_path / "out" / "results.csv"))
    assert row["status"] == "ok"
    assert row["config.task.path"].endswith("caf\\udce9.txt")


def test_a_foreign_table_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("a,b\n1,2\n")
    (tmp_path / "t.txt").write_text(synthetic_text(3, 4000))
    code, _, stderr = million(tmp_path / "out", tmp_path / "t.txt")
    assert code == 2
    assert stderr.splitlines()[-1].endswith("results.csv is not a results CSV: it has no column `run`")
    assert "Traceback" not in stderr
    assert not (tmp_path / "out" / "evaluations").exists()
