"""A change of the kernels lands only with a fresh record of the GPU suite (scripts/gpu_suite.sh results)."""

import json
from pathlib import Path

import pytest

from million_cli.bench.kernels import COLUMNS
from million_cli.ops.build import suite_digest
from million_cli.tables import read_table

RESULTS = Path(__file__).resolve().parents[2] / "results"
RECORDS = sorted(RESULTS.glob("*/suite.json"))


def test_there_is_a_record() -> None:
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_record_is_of_this_tree_and_clean(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["sha256"] == suite_digest(), (
        "kernels/ or their Python changed: run scripts/gpu_suite.sh results"
    )
    assert record["tests"] > 0
    assert record["failures"] == record["errors"] == record["skipped"] == 0
    assert record["memcheck"] == record["racecheck"] == "clean"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_figures_lie_beside_it(path: Path) -> None:
    table = read_table(path.with_name("kernel.csv"))
    assert tuple(table) == ("kind", "schema", *COLUMNS)
    assert set(table["kind"]) == {"kernel"}
    assert {"sdpa flash", "sdpa cudnn", "million paged", "million lookup"} <= set(table["impl"])
    assert set(table["gpu"]) == {json.loads(path.read_text())["gpu"]}
