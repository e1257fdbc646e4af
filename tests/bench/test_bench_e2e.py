"""The end-to-end benchmark on a CPU: every row is written when it is measured, no failure stops it."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import pytest
import torch
from small_job import SMALL_JOB
from transformers import PreTrainedModel

from million_cli.bench import e2e
from million_cli.bench.cases import COLUMNS, Config
from million_cli.bench.e2e import Bench, DeviceLost, main
from million_cli.bench.implementations import IMPLEMENTATIONS, Dense
from million_cli.bench.runners import EngineRunner
from million_cli.errors import UserError
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
    for name, expected in (("paged-4bit", 4), ("paged-3bit", 3), ("paged-2bit", 2), ("paged-4bit-mixed", 4)):
        specs = IMPLEMENTATIONS[name].codes(32, 128)
        assert fmean((of.keys.bits_per_element + of.values.bits_per_element) / 2 for of in specs) == expected
        assert len(specs) == 32
    mixed = IMPLEMENTATIONS["paged-4bit-mixed"].codes(8, 64)
    assert [of.keys.M for of in mixed] == [16, 16, 32, 32, 32, 32, 32, 64]
    assert IMPLEMENTATIONS["dense"].codes(32, 128) is None


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
    first = bench(tmp_path, case(), case(batch=1), rounds=1).run()
    lines = (tmp_path / "e2e.jsonl").read_text().splitlines()
    monkeypatch.setattr(Bench, "measure", None)  # nothing is left to do
    assert bench(tmp_path, case(), case(batch=1), rounds=1).run() == json.loads(json.dumps(first))
    assert (tmp_path / "e2e.jsonl").read_text().splitlines() == lines


@dataclass(frozen=True)
class Calling(Dense):
    """The dense engine, after a call of the test's own."""

    name: str = ""
    call: Callable[[], object] = lambda: None

    def runner(self, job):
        self.call()
        return super().runner(job)


@pytest.fixture
def calling(monkeypatch):
    """Adds an implementation that calls the test's function first."""

    def add(name, call):
        monkeypatch.setitem(IMPLEMENTATIONS, name, Calling(name, call))
        return name

    return add


def raising(error):
    def call():
        raise error

    return call


def test_what_fails_is_a_row(tmp_path, calling):
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")
    impls = [
        "paged-4bit",
        calling("large", raising(memory)),
        calling("wrong", raising(ValueError("bad shape\nsecond line"))),
        calling("absent", raising(ImportError("pip install optimum-quanto"))),
    ]
    rows = {row["impl"]: row for row in bench(tmp_path, case(impls)).run()}
    assert [row["status"] for row in rows.values()] == ["ok", "oom", "error", "unavailable"]
    assert rows["large"]["note"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert rows["wrong"]["note"] == "ValueError: bad shape"


def test_quantized_caches_of_transformers_where_installed(tmp_path):
    pytest.importorskip("optimum.quanto")
    (row,) = bench(tmp_path, case(["transformers-quanto"])).run()
    assert row["status"] == "ok", row["note"]
    assert 0 < row["cache_ratio"] < 2


def run_in_a_process(out, *impls):
    """The exit code of a run in another process; the test sees only its files in `out`."""

    def work():
        cases = case(impls), case(["dense"], batch=1)
        bench(out, *cases, rounds=1).run()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def statuses(out):
    return [(row["impl"], row["batch"], row["status"]) for row in read(out / "e2e.csv")]


def test_a_row_that_killed_its_process_is_measured_again(tmp_path, calling):
    assert run_in_a_process(tmp_path, "dense", calling("deadly", die)) == -signal.SIGKILL
    assert run_in_a_process(tmp_path, "dense", calling("deadly", lambda: None)) == 0
    assert statuses(tmp_path) == [("dense", "2", "ok"), ("deadly", "2", "ok"), ("dense", "1", "ok")]


def test_a_row_that_kills_every_process_is_given_up(tmp_path, calling):
    """Other rows are measured, and no row is tried a third time."""
    calling("deadly", die)
    codes = [run_in_a_process(tmp_path, "dense", "deadly") for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert statuses(tmp_path) == [("dense", "2", "ok"), ("deadly", "2", "died"), ("dense", "1", "ok")]
    (died,) = (row for row in read(tmp_path / "e2e.csv") if row["status"] == "died")
    assert died["note"] == "the process ended in 2 of 2 attempts"


def test_an_interruption_is_not_an_attempt(tmp_path, calling):
    for error in (KeyboardInterrupt, KeyboardInterrupt, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path, case([calling("slow", raising(error()))])).run()
    calling("slow", lambda: None)
    assert [row["status"] for row in bench(tmp_path, case(["slow"])).run()] == ["ok"]


def test_a_lost_device_ends_the_process_after_its_row(tmp_path, calling, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    cases = case([calling("lost", raising(error))]), case(["dense"], batch=1)
    with monkeypatch.context() as patch:
        patch.setattr(e2e, "device_works", lambda device: False)
        with pytest.raises(DeviceLost, match="illegal memory access"):
            bench(tmp_path, *cases).run()
    assert [row["status"] for row in bench(tmp_path, *cases).run()] == ["error", "ok"]


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


def test_stages_of_all_are_in_one_table_and_sum_to_the_step(tmp_path):
    rows = bench(tmp_path, case(["paged-4bit", "dense"], what="breakdown")).run()
    assert [row["status"] for row in rows] == ["ok", "ok"]
    names = [f"breakdown-tiny-random-150-2{end}" for end in (".csv", "-kernels.csv", ".png")]
    assert rows[0]["detail"].split("; ")[1:] == names
    table = read(tmp_path / names[0])
    spans = read(tmp_path / names[1])
    for impl in ("paged-4bit", "dense"):
        total = sum(float(row[f"{impl}_us"]) for row in table)
        assert total == pytest.approx(sum(float(s["us"]) for s in spans if s["impl"] == impl), abs=1)
        assert total > 0


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "free_memory", lambda: 8_000_000_000)
    monkeypatch.setattr(Bench, "measure", None)
    cases = case(["dense"]), {"model": "llama-2-7b-shape", "context": 32768, "impls": ["paged-4bit"]}
    with pytest.raises(UserError) as error:
        bench(tmp_path, *cases)
    # 6.74e9 weights of 4 bytes; 32 layers of 32 heads, K and V, 128 wide, of 32768 + 3 tokens.
    needed = 4 * (6738415616 + 2 * 32 * 32 * 128 * 32771) / 1e9
    assert str(error.value).startswith(
        f"bench.cases: model=llama-2-7b-shape, context=32768, batch=1 needs {needed:.1f} GB of memory and "
        "there are 8.0 GB; accepted are"
    )


def test_the_suite_of_a_cpu_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "free_memory", lambda: 2_000_000_000)
    run = Bench(Config(**{**compose(["bench=e2e"]).bench}), tmp_path, CPU)
    assert {case.model for case in run.cases} == {"reference"}


def test_the_verb_and_the_module(tmp_path, capsys):
    cases = "[{model: tiny-random, context: 150, impls: [dense]}, {context: 150, impls: [dense]}]"
    settings = ["bench=e2e", f"bench.cases={cases}", "bench.compile=none", "bench.new_tokens=2"]
    (result,) = run("bench", compose([*SMALL_JOB, *settings, f"out={tmp_path}"]))
    assert result.metrics["rows_ok"] == 2
    assert str(tmp_path / "e2e.csv") in capsys.readouterr().out
    module, cases = str(tmp_path / "m"), "cases=[{model: tiny-random, context: 99, impls: [dense]}]"
    assert main([module, cases, "new_tokens=2", "compile=none", "rounds=1", "device=cpu"]) == 0
    (row,) = read(tmp_path / "m" / "e2e.csv")
    assert row["context"] == "99"
    assert shlex.split(row["command"])[:4] == ["python", "-m", "million_cli.bench.e2e", module]
    assert shlex.split(row["command"])[4] == cases
