"""Records: nothing is lost, columns grow, provenance is true."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli import files, results
from million_cli.errors import UserError
from million_cli.results import (
    Provenance,
    Record,
    append_row,
    flatten,
    git_commit,
    merge_columns,
    now,
    read_rows,
    version,
)

HERE = Provenance("million eval", "abc", "host", "3.11", "0.1.0", "2.13", "5.23", "cpu", "float32")


def record(**fields):
    values = {"run": "r", "verb": "eval", "status": "ok", "started": now(), "duration_s": 1.5}
    return Record(
        **{**values, "provenance": HERE, "config": {"seed": 0, "cache": {"kind": "paged"}}, **fields}
    )


def test_a_row_holds_everything(tmp_path):
    path = record(metrics={"kl_e3": 1.25, "tokens": 7}, fallbacks=["a", "b"]).save(tmp_path)
    columns, (row,) = read_rows(path)
    assert columns[:5] == ["run", "verb", "status", "started", "duration_s"]
    assert (row["kl_e3"], row["tokens"], row["fallbacks"]) == ("1.25", "7", "a; b")
    assert (row["config.seed"], row["config.cache.kind"]) == ("0", "paged")
    assert (row["commit"], row["device"], row["error"]) == ("abc", "cpu", "")
    (saved,) = (tmp_path / "records").glob("*.json")
    assert json.loads(saved.read_text())["metrics"] == {"kl_e3": 1.25, "tokens": 7}


def test_a_traceback_survives_the_csv(tmp_path):
    error = 'Traceback (most recent call last):\n  File "a.py", line 1\nValueError: "quoted", comma\n'
    path = record(status="failed", error=error).save(tmp_path)
    assert read_rows(path)[1][0]["error"] == error


def test_columns_grow_where_they_belong(tmp_path):
    table = tmp_path / "results.csv"
    append_row(table, {"run": "1", "kl": 1.0, "error": "", "config.a": 1})
    append_row(table, {"run": "2", "kl": 2.0, "recall": 0.5, "error": "", "config.a": 1, "config.b": 2})
    columns, rows = read_rows(table)
    assert columns == ["run", "kl", "recall", "error", "config.a", "config.b"]
    assert [row["recall"] for row in rows] == ["", "0.5"]


names = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(names, names)
def test_merging_columns_keeps_the_old_order_and_loses_none(old, new):
    merged = merge_columns(old, new)
    assert [name for name in merged if name in old] == old
    assert sorted(merged) == sorted(set(old) | set(new))


cells = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("ab ,;\"'\n=é世")
)


@examples(40)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["run", "a", "b", "c"]), cells), min_size=1, max_size=4))
def test_what_is_appended_is_read_back(tmp_path_factory, rows):
    table = tmp_path_factory.mktemp("t") / "results.csv"
    for row in rows:
        append_row(table, {"run": "x", **row})
    _, found = read_rows(table)
    for row, back in zip(rows, found, strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                assert float(back[name]) == value
            else:
                assert back[name] == ("" if value is None else str(value))


def _append_many(arguments):
    path, worker = arguments
    for i in range(10):
        append_row(Path(path), {"run": f"{worker}-{i}", f"column_{worker}": i})


def test_two_processes_at_once_lose_nothing(tmp_path):
    table = tmp_path / "results.csv"
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_append_many, [(str(table), 0), (str(table), 1)]))
    columns, rows = read_rows(table)
    assert {row["run"] for row in rows} == {f"{worker}-{i}" for worker in range(2) for i in range(10)}
    assert len(rows) == 20
    assert {"column_0", "column_1"} <= set(columns)


def test_a_full_disk_loses_no_earlier_row(tmp_path, monkeypatch):
    table = tmp_path / "results.csv"
    append_row(table, {"run": "1"})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*results\.csv: No space left on device"):
            append_row(table, {"run": "2"})
    assert [row["run"] for row in read_rows(table)[1]] == ["1"]
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["results.csv"]
    append_row(table, {"run": "3"})
    assert [row["run"] for row in read_rows(table)[1]] == ["1", "3"]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        record().save(tmp_path / "file")


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"run,a\n1,2,3\n", b"run,a\n1\n", b"\xff\xfe\x00", b"PK\x03\x04"]
)
def test_other_files_are_not_taken_for_results(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a results CSV"):
        read_rows(path)
    with pytest.raises(UserError, match="is not a results CSV"):
        append_row(path, {"run": "1"})
    assert path.read_bytes() == content


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


def test_cells_of_a_record_are_what_csv_readers_expect(tmp_path):
    path = record(metrics={"flag": True, "nothing": None, "third": 1 / 3}).save(tmp_path)
    with path.open(newline="") as handle:
        row = next(csv.DictReader(handle))
    assert (row["flag"], row["nothing"], float(row["third"])) == ("True", "", 1 / 3)
