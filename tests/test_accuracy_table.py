"""The table of accuracy: what it keeps of a results CSV."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from million_cli.results import write_rows

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "accuracy_table.py"


def load():
    spec = importlib.util.spec_from_file_location("accuracy_table", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_measurements_are_sorted_and_the_rest_left_out(tmp_path):
    script = load()

    def row(name, kind, kl, path="", status="ok"):
        return {
            "run": "r",
            "started": f"2026-01-0{len(name)}T00:00:00+00:00",
            "command": "million eval task.path=/some/where/code.py,other/x.txt out=outputs quantizer=a/b",
            "status": status,
            "kl_e3": kl,
            "config.quantizer.name": name,
            "config.quantizer.kind": kind,
            "config.quantizer.scope": "head",
            "config.quantizer.keys.rotation": "opq",
            "config.task.path": path,
            "config.task.dataset": "some-text",
            "config.sample.code": 0.3,
        }

    rows = [
        row("b", "pq", 10.5),
        row("a", "fp8", 9.5),
        row("c", "pq", 1.0, path="folder/code.py"),
        row("d", "pq", 0.1, status="failed"),
        row("e", "dense", ""),
    ]
    write_rows(tmp_path / "results.csv", rows)
    lines = script.table(script.read(tmp_path / "results.csv"))
    assert [(line["quantizer"], line["text"], line["key_rotation"]) for line in lines] == [
        ("c", "code.py", "opq"),
        ("a", "some-text", ""),
        ("b", "some-text", "opq"),
    ]
    assert [line["code_share"] for line in lines] == ["0.3", "", "0.3"]
    assert lines[0]["command"] == "million eval task.path=code.py,other/x.txt out=outputs quantizer=a/b"

    write_rows(tmp_path / "table.csv", lines)
    again = script.read(tmp_path / "table.csv")
    later = {**row("b", "pq", 9.0), "started": "2026-02-01T00:00:00+00:00"}
    budget = {**later, "config.quantizer.bits": 4.0, "kl_e3": 5.0}
    write_rows(tmp_path / "more.csv", [later, budget])
    merged = script.table([*script.read(tmp_path / "more.csv"), *again])
    assert [(line["quantizer"], line["budget_bits"], line["kl_e3"]) for line in merged] == [
        ("c", "", "1.0"),
        ("b", "4.0", "5.0"),
        ("b", "", "9.0"),
        ("a", "", "9.5"),
    ]


def test_recall_comes_in_all_and_by_cell(tmp_path):
    script = load()
    write_rows(
        tmp_path / "evaluations" / "k-passkey.csv",
        [{"length": 256, "depth": d, "recall": 0.5} for d in (0, 1)],
    )

    def row(name, bits, **cells):
        shared = {"run": "r", "verb": "eval", "status": "ok", "command": "million eval out=/some/where"}
        return {**shared, "config.quantizer.name": name, "bits_nominal": bits, **cells}

    recalled = {"recall": 0.5, "recall_lost": 3, "passkey_table": "gone/evaluations/k-passkey.csv"}
    rows = [row("b", 2.0, **recalled), row("a", 4.0, **recalled), row("c", 8.0, kl_e3=1.0)]
    write_rows(tmp_path / "results.csv", rows)
    read = script.read(tmp_path / "results.csv")
    assert [(line["quantizer"], line["recall_lost"]) for line in script.recall(read)] == [
        ("a", "3"),
        ("b", "3"),
    ]
    cells = [
        (line["quantizer"], line["depth"], line["recall"], line["command"]) for line in script.cells(read)
    ]
    assert cells == [(name, d, "0.5", "million eval out=where") for name in "ab" for d in "01"]


def test_mistakes_end_in_one_line_that_says_what_is_accepted(tmp_path):
    wide = {**os.environ, "COLUMNS": "400"}
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for arguments, said in (
        ([tmp_path / "out.csv"], "one or more CSVs to read, and last the one to write"),
        ([tmp_path / "none.csv", tmp_path / "out.csv"], "No such file or directory"),
        ([tmp_path / "other.csv", tmp_path / "out.csv"], "accepted are results CSVs"),
        (["--recall", "--cells", tmp_path / "other.csv", tmp_path / "out.csv"], "accepted is one of them"),
    ):
        done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=wide)
        words = " ".join(done.stderr.replace("\u2502", " ").split())
        assert done.returncode == 2
        assert said in words
        assert "Traceback" not in words
    assert not (tmp_path / "out.csv").exists()
