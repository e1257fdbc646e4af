"""The table of accuracy: what it keeps of a results CSV."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from million_cli.results import read_rows, write_rows

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "accuracy_table.py"


def test_measurements_are_sorted_and_the_rest_left_out(tmp_path):
    spec = importlib.util.spec_from_file_location("accuracy_table", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def row(name, kind, kl, path="", status="ok"):
        return {
            "run": "r",
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
    lines = script.table(read_rows(tmp_path / "results.csv")[1])
    assert [(line["quantizer"], line["text"], line["key_rotation"]) for line in lines] == [
        ("c", "code.py", "opq"),
        ("a", "some-text", ""),
        ("b", "some-text", "opq"),
    ]
    assert [line["code_share"] for line in lines] == ["0.3", "", "0.3"]
