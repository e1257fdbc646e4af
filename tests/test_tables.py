"""Result tables: rows are read back as written, columns grow, nothing is lost, no cell is a formula."""

from __future__ import annotations

import csv
import errno
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli import files
from million_cli.errors import UserError
from million_cli.tables import append_row, merge_columns, read_results, read_table, records, write_table


def test_each_row_says_its_kind_and_schema(tmp_path):
    write_table(
        tmp_path / "x.csv", [{"stage": "MLP", "ms": 1.0}, {"stage": "head", "kind": "?"}], "breakdown"
    )
    assert (
        tmp_path / "x.csv"
    ).read_text() == "kind,schema,stage,ms\nbreakdown,1,MLP,1.0\nbreakdown,1,head,\n"
    write_table(tmp_path / "none.csv", [], "breakdown")
    assert list(read_table(tmp_path / "none.csv")) == ["kind", "schema"]


def test_columns_grow_where_they_belong(tmp_path):
    table = tmp_path / "results.csv"
    append_row(table, {"run": "1", "kl": 1.0, "error": "", "config.a": 1}, "job")
    append_row(
        table, {"run": "2", "kl": 2.0, "recall": 0.5, "error": "", "config.a": 1, "config.b": 2}, "job"
    )
    frame = read_results(table)
    assert list(frame) == ["kind", "schema", "run", "kl", "recall", "error", "config.a", "config.b"]
    assert frame["recall"].tolist() == ["", "0.5"]


def test_rows_of_an_earlier_version_stay_beside_new_ones(tmp_path):
    table = tmp_path / "results.csv"
    table.write_text("run,kl\n1,0.1\n")
    append_row(table, {"run": "2", "kl": 0.2}, "job")
    assert table.read_text() == "kind,schema,run,kl\n,,1,0.1\njob,1,2,0.2\n"


names = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(names, names)
def test_merging_columns_keeps_the_old_order_and_loses_none(old, new):
    merged = merge_columns(old, new)
    assert [name for name in merged if name in old] == old
    assert sorted(merged) == sorted(set(old) | set(new))


cells = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("ab ,;\"'\n=+-@\t1e.é世")
)


@examples(40)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["run", "a", "b", "c"]), cells), min_size=1, max_size=4))
def test_what_is_appended_is_read_back(tmp_path_factory, rows):
    table = tmp_path_factory.mktemp("t") / "results.csv"
    for row in rows:
        append_row(table, {"run": "x", **row}, "job")
    for row, back in zip(rows, records(read_results(table)), strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                assert float(back[name]) == value
            else:
                assert back[name] == ("" if value is None else str(value))


@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_floats_of_a_frame_come_back_bit_for_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("t") / "x.csv"
    frame = pd.DataFrame(
        {"x": values, "n": pd.array([1] * len(values), dtype="Int64"), "gone": [None] * len(values)}
    )
    write_table(path, frame, "kernel")
    found = read_table(path)
    assert [float(cell) for cell in found["x"]] == values
    assert set(found["n"]) == {"1"}
    assert set(found["gone"]) == {""}


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "'=1", "\uff1d1"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_cell_is_a_formula_to_a_spreadsheet(tmp_path, formula):
    path = tmp_path / "x.csv"
    write_table(path, [{"a": formula, formula: "b", "c": -0.5, "d": "-1e-05", "e": "it's"}], "job")
    with path.open(encoding="utf-8", newline="") as handle:
        ((_, _, _, name, *_), (_, _, cell, _, *rest)) = csv.reader(handle)
    assert cell.startswith("'")
    assert name.startswith("'")
    assert rest == ["-0.5", "-1e-05", "it's"]
    back = formula.replace("\r", "\n")
    assert records(read_table(path)) == [
        {"kind": "job", "schema": "1", "a": back, back: "b", "c": "-0.5", "d": "-1e-05", "e": "it's"}
    ]


def test_line_ends_in_a_cell_are_newlines(tmp_path):
    write_table(tmp_path / "x.csv", [{"a": "1\r\n2\r3\n4"}], "job")
    assert read_table(tmp_path / "x.csv")["a"].tolist() == ["1\n2\n3\n4"]


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    (tmp_path / "x.csv").write_bytes("\ufeffkind,schema,run\r\njob,1,é\r\n".encode())
    assert records(read_table(tmp_path / "x.csv")) == [{"kind": "job", "schema": "1", "run": "é"}]


def _append_many(arguments):
    path, worker = arguments
    for i in range(10):
        append_row(Path(path), {"run": f"{worker}-{i}", f"column_{worker}": i}, "job")


def test_two_processes_at_once_lose_nothing(tmp_path):
    table = tmp_path / "results.csv"
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_append_many, [(str(table), 0), (str(table), 1)]))
    frame = read_results(table)
    assert set(frame["run"]) == {f"{worker}-{i}" for worker in range(2) for i in range(10)}
    assert len(frame) == 20
    assert {"column_0", "column_1"} <= set(frame)


def test_a_full_disk_loses_no_earlier_row(tmp_path, monkeypatch):
    table = tmp_path / "results.csv"
    append_row(table, {"run": "1"}, "job")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*results\.csv: No space left on device"):
            append_row(table, {"run": "2"}, "job")
    assert read_results(table)["run"].tolist() == ["1"]
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["results.csv"]
    append_row(table, {"run": "3"}, "job")
    assert read_results(table)["run"].tolist() == ["1", "3"]


OTHER = [
    b"",
    b"a,b\n1,2\n",
    b"run,a\n1,2,3\n",
    b"run,a\n1,2\n1\n",
    b'run,a\n1,"2',
    b"\xff\xfe\x00",
    b"PK\x03\x04",
]


@pytest.mark.parametrize("content", OTHER)
def test_other_files_are_not_taken_for_results(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^\S*x\.csv is not a results CSV: .*$"):
        read_results(path)
    with pytest.raises(UserError, match="is not a results CSV"):
        append_row(path, {"run": "1"}, "job")
    assert path.read_bytes() == content


def test_pandas_is_not_imported_by_the_help():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom million_cli.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "import million_cli.results, million_cli.tables\nprint('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
