"""The table of accuracy: what it keeps of a results CSV."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from million_cli.results import write_rows

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "accuracy_table.py"


def test_measurements_are_sorted_and_the_rest_left_out(tmp_path):
    spec = importlib.util.spec_from_file_location("accuracy_table", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

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
