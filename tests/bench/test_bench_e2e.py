"""The end-to-end benchmark on a CPU: every row is kept as it is earned, no failure stops it."""

from __future__ import annotations

import csv
import json
from statistics import fmean

import pytest
import torch
from small_job import SMALL_JOB
from transformers import PreTrainedModel

from million_cli.bench import e2e
from million_cli.bench.cases import COLUMNS, Config
from million_cli.bench.e2e import Bench, DeviceLost, main
from million_cli.bench.runners import EngineRunner, layer_codes
from million_cli.hydra_app import compose
from million_cli.pipelines import run

CPU = torch.device("cpu")
IMPLS = ["paged-4bit", "dense", "transformers-dynamic"]


def bench(out, *cases, **options):
    settings = {"new_tokens": 3, "compile": "none", **options}
    return Bench(Config(cases=list(cases), **settings), out, CPU)


def case(impls=IMPLS, **options):
    return {"model": "tiny-random", "context": 150, "batch": 2, "impls": list(impls), **options}


def read(path):
    with open(path) as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(autouse=True)
def _plain_calls(monkeypatch):
    """transformers' static cache without a compiler."""
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", lambda self, config: self.__call__)


def test_rows_of_all_caches(tmp_path):
    impls = [*IMPLS, "transformers-static", "paged-3bit", "paged-2bit", "contiguous-4bit", "paged-4bit-mixed"]
    rows = bench(tmp_path, case(impls)).run()
    assert read(tmp_path / "e2e.csv")[0].keys() == {"kind", "schema", *COLUMNS}
    assert [(row["impl"], row["status"]) for row in rows] == [(impl, "ok") for impl in impls]
    found = {row["impl"]: row for row in rows}
    for row in rows:
        assert row["ttft_ms"] > 0
        assert 0 < row["tpot_ms"] <= row["tpot_p90_ms"]
        assert row["prompt"] == "read"
    # The window of 128 tokens is in float32 here; of the 154 tokens 64 are codes.
    assert found["paged-4bit"]["code_bytes"] == 2 * found["paged-2bit"]["code_bytes"]
    assert found["paged-4bit"]["code_bytes"] == 2 * 2 * 2 * 64 * 2 * 16  # B, layers, heads, tokens, sides, M
    assert found["dense"]["cache_ratio"] == pytest.approx(2 * 157 / 155)  # float32, room for all steps
    assert found["paged-4bit"]["codebook"] == "random"
    assert "paged torch" in found["paged-4bit"]["detail"]
    assert found["dense"]["detail"].startswith("steps, sdpa default")


def test_bits_by_layer_average_to_those_of_the_name():
    for bits, expected in (("4bit", 4), ("3bit", 3), ("2bit", 2), ("4bit-mixed", 4)):
        specs = layer_codes(bits, 32, 128)
        assert fmean((of.keys.bits_per_element + of.values.bits_per_element) / 2 for of in specs) == expected
        assert len(specs) == 32
    assert [of.keys.M for of in layer_codes("4bit-mixed", 8, 64)] == [16, 16, 32, 32, 32, 32, 32, 64]
    assert layer_codes("dense", 32, 128) is None


def test_all_caches_make_the_same_kind_of_step(tmp_path, monkeypatch):
    """The dense engine and transformers' caches read the same prompt, so they make the same tokens."""
    made = {}
    original = EngineRunner.step

    def step(self):
        original(self)
        made.setdefault(type(self.cache).__name__, []).append(self.engine._tokens.tolist())

    monkeypatch.setattr(EngineRunner, "step", step)
    bench(tmp_path, case(["dense", "transformers-dynamic"]), rounds=1, dtype="float64").run()
    assert made["DenseCache"] == made["DynamicCache"]


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    first = bench(tmp_path, case(), case(batch=1)).run()
    lines = (tmp_path / "e2e.jsonl").read_text().splitlines()
    monkeypatch.setattr(Bench, "_measure", None)  # nothing is left to do
    assert bench(tmp_path, case(), case(batch=1)).run() == json.loads(json.dumps(first))
    assert (tmp_path / "e2e.jsonl").read_text().splitlines() == lines


def test_what_fails_is_a_row(tmp_path, monkeypatch):
    original = e2e.make_runner

    def fails(impl, *arguments, **options):
        if impl == "dense":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")
        if impl == "transformers-dynamic":
            raise ValueError("bad shape\nsecond line")
        return original(impl, *arguments, **options)

    monkeypatch.setattr(e2e, "make_runner", fails)
    rows = {row["impl"]: row for row in bench(tmp_path, case()).run()}
    assert {impl: row["status"] for impl, row in rows.items()} == {
        "paged-4bit": "ok",
        "dense": "oom",
        "transformers-dynamic": "error",
    }
    assert rows["dense"]["note"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert rows["transformers-dynamic"]["note"] == "ValueError: bad shape"


def test_a_missing_package_is_a_row(tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("pip install optimum-quanto")

    monkeypatch.setattr(e2e, "make_runner", missing)
    (row,) = bench(tmp_path, case(["transformers-quanto"])).run()
    assert row["status"] == "unavailable"


def test_quantized_caches_of_transformers_where_installed(tmp_path):
    pytest.importorskip("optimum.quanto")
    (row,) = bench(tmp_path, case(["transformers-quanto"])).run()
    assert row["status"] == "ok", row["note"]
    assert 0 < row["cache_ratio"] < 2


def test_a_process_that_died_is_remembered(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_measure", dies)
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path, case(["dense"]), case(["dense"], batch=1)).run()
    rows = bench(tmp_path, case(["dense"]), case(["dense"], batch=1)).run()
    assert [row["status"] for row in rows] == ["died", "ok"]


def test_a_lost_device_ends_the_process_after_its_row(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(e2e, "make_runner", fails)
        patch.setattr(Bench, "_device_works", lambda self: False)
        with pytest.raises(DeviceLost, match="illegal memory access"):
            bench(tmp_path, case(["dense"]), case(["dense"], batch=1)).run()
    rows = bench(tmp_path, case(["dense"]), case(["dense"], batch=1)).run()
    assert [row["status"] for row in rows] == ["error", "ok"]


def test_the_budget_skips_what_comes_last(tmp_path):
    rows = bench(tmp_path, case(["dense"]), budget_s=-1.0).run()
    assert [row["status"] for row in rows] == ["skipped"]
    assert [row["status"] for row in bench(tmp_path, case(["dense"])).run()] == ["ok"]  # not remembered


def test_the_largest_batch(tmp_path, monkeypatch):
    """On a CPU with memory for three sequences."""
    original = EngineRunner.fill

    def fill(self, batch, length):
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, batch, length)

    monkeypatch.setattr(EngineRunner, "fill", fill)
    (row,) = bench(tmp_path, case(["dense"], what="largest")).run()
    assert (row["status"], row["largest_batch"]) == ("ok", 3)
    assert row["cache_ratio"] == pytest.approx(2 * 156 / 154)


def test_orders_alternate(tmp_path, monkeypatch):
    order = []
    original = e2e.make_runner
    monkeypatch.setattr(
        e2e, "make_runner", lambda impl, *a, **o: order.append(impl) or original(impl, *a, **o)
    )
    bench(tmp_path, case(), rounds=3).run()
    assert order == [*IMPLS, *reversed(IMPLS), *IMPLS]


def test_the_verb_and_the_module(tmp_path, capsys):
    cases = "[{model: tiny-random, context: 150, impls: [dense]}, {context: 150, impls: [dense]}]"
    settings = ["bench=e2e", f"bench.cases={cases}", "bench.compile=none", "bench.new_tokens=2"]
    (result,) = run("bench", compose([*SMALL_JOB, *settings, f"out={tmp_path}"]))
    assert result.metrics["rows_ok"] == 2
    assert str(tmp_path / "e2e.csv") in capsys.readouterr().out
    module, cases = str(tmp_path / "m"), "cases=[{model: tiny-random, context: 99, impls: [dense]}]"
    assert main([module, cases, "new_tokens=2", "compile=none", "rounds=1", "device=cpu"]) == 0
    assert read(tmp_path / "m" / "e2e.csv")[0]["context"] == "99"
