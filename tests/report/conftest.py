"""A folder with a CSV of every kind that a report reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import million_cli
from million_cli.hf.models import random_model
from million_cli.hydra_app import compose
from million_cli.pipelines.report import report
from million_cli.pipelines.session import byte_tokenizer
from million_cli.recipe import Recipe
from million_cli.tables import write_table
from million_cli.text import synthetic_text

# A browser is no Python package; its tests are collected where there is one (.ci/run sees to it).
collect_ignore = [] if shutil.which("chromium") else ["test_browser.py"]

ORIGIN = {"command": "million eval <all>", "commit": "abc123", "device": "cpu", "torch": "2.13.0"}


def job(quantizer: str, bits: float, kl: float, out: Path, **cells: object) -> dict[str, object]:
    """A row of results.csv."""
    return {
        "run": "r1",
        "verb": "eval",
        "status": "ok",
        **ORIGIN,
        "bits_nominal": bits,
        "kl_e3": kl,
        "kl_se_e3": kl / 10,
        "perplexity": 10 + kl,
        "perplexity_dense": 10,
        "perplexity_change_percent": 10 * kl,
        "context": 64,
        "config.out": str(out),
        "config.model.name": "tiny",
        "config.quantizer.name": quantizer,
        "config.quantizer.scope": "head",
        "config.cache.kind": "paged",
        "config.task.dataset": "words",
        **cells,
    }


def write_all(folder: Path) -> None:
    """results.csv with its tables, one of other jobs, kernel times with the suite's record, decode times."""
    tables = folder / "evaluations"
    recall = [
        {"length": n, "depth": d, "facts": 8, "recall": 1 - d / 2, "recall_dense": 1.0, "recall_n": 10}
        for n in (256, 1024)
        for d in (0.0, 1.0)
    ]
    write_table(tables / "passkey-1.csv", recall, "passkey")
    positions = [
        {
            "first": 16 * i,
            "last": 16 * i + 15,
            "tokens": 32,
            "perplexity": 11.0 + i,
            "perplexity_dense": 11.0,
            "perplexity_change_percent": float(i),
            "kl_e3": float(i),
            "kl_se_e3": 0.1,
        }
        for i in range(4)
    ]
    write_table(tables / "positions-1.csv", positions, "positions")
    write_table(
        tables / "longbench-1.csv",
        [{"task": "lcc", "category": "code", "score": 30.0, "dense": 40.0, "samples": 3}],
        "longbench",
    )
    ruler = [
        {"task": "vt", "length": length, "score": score, "dense": 50.0, "difference": score - 50.0}
        for length, score in ((1024, 40.0), (4096, 20.0))
    ]
    write_table(tables / "ruler-1.csv", ruler, "ruler")
    write_table(
        tables / "lm_eval-1.csv",
        [{"task": "echo", "metric": "exact_match", "filter": "none", "score": 0.5, "dense": 0.75}],
        "lm_eval",
    )
    write_table(
        tables / "breakdown-1.csv",
        [{"stage": s, "dense_ms": 1.5, "cache_ms": 1.0} for s in ("MLP", "head")],
        "breakdown",
    )
    write_table(tables / "samples-1.csv", [{"task": "lcc", "id": 1, "prediction": "x"}], "longbench_samples")
    linked = {
        "passkey_table": tables / "passkey-1.csv",
        "positions_table": tables / "positions-1.csv",
        "ruler_table": tables / "ruler-1.csv",
        "ruler_average": 30.0,
        "ruler_average_dense": 50.0,
        "longbench_table": tables / "longbench-1.csv",
        "longbench_samples_table": tables / "samples-1.csv",
        "longbench_average": 30.0,
        "longbench_average_dense": 40.0,
        "lm_eval_table": tables / "lm_eval-1.csv",
        "lm_eval_average": 0.5,
        "lm_eval_average_dense": 0.75,
    }
    bench = {"kl_e3": None, "verb": "bench", "breakdown_table": tables / "breakdown-1.csv", "batch": 1}
    times = {
        "ttft_ms": 20.0,
        "ttft_dense_ms": 18.0,
        "tpot_ms": 2.0,
        "tpot_dense_ms": 3.0,
        "tokens_per_s": 500,
    }
    rows = [
        job("pq-4bit", 4.0, 1.0, folder, **linked),
        job("pq-2bit", 2.0, 9.0, folder),
        job("worse", 4.0, 3.0, folder),
        job("pq-4bit", 4.0, 1.0, folder, **bench, **times),
        job("pq-4bit", 4.0, 1.0, folder, status="failed", error="Traceback\n  <b>\nValueError: <bad> luck"),
    ]
    write_table(folder / "results.csv", rows, "job")
    other = {"config.model.name": "other", "config.task.path": "/texts/like.txt", "context": None}
    write_table(
        folder / "other.csv",
        [
            job("pq", 4.0, kl, folder, **other, **{"config.quantizer.scope": scope})
            for scope, kl in (("head", 1.0), ("layer", 2.0))
        ],
        "job",
    )
    shape = {"gpu": "Some GPU", "dtype": "float16", "batch": 1, "q_heads": 32, "kv_heads": 8, "head_dim": 128}
    ours = {"m_keys": 64, "m_values": 64, "layout": "fragment"}
    write_table(
        folder / "gpu" / "kernel.csv",
        [
            {**shape, "impl": impl, "context": n, "median_us": us, "ratio_to_best_dense": ratio, **more}
            for n in (4096, 32768)
            for impl, us, ratio, more in (
                ("sdpa flash", n / 100, 1.0, {}),
                ("million paged", n / 300, 3.0, ours),
            )
        ],
        "kernel",
    )
    (folder / "gpu" / "suite.json").write_text(
        json.dumps({"gpu": "Some GPU", "commit": "f00d", "torch": "2.11.0"})
    )
    write_table(
        folder / "e2e.csv",
        [
            {
                "model": "llama",
                "impl": impl,
                "bits": bits,
                "context": n,
                "batch": 1,
                "tpot_ms": None if oom else ms * n / 1024,
                "error": "out of memory" if oom else "",
                **ORIGIN,
            }
            for n in (1024, 32768, 131072)
            for impl, bits, ms in (("dense engine", None, 2.0), ("pq paged", 4, 1.0), ("pq paged", 2, 0.5))
            for oom in (impl == "dense engine" and n == 131072,)
        ],
        "e2e",
    )


@pytest.fixture(scope="session")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codebook trained on a random model of two layers and two KV heads."""
    shape = {"model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = random_model({**shape, **heads}, seed=0, dtype="float32")
    path = tmp_path_factory.mktemp("codebook") / "mine.safetensors"
    recipe = Recipe().override(
        "quantizer.keys.nbits=4", "quantizer.values.nbits=4", "sample.context=128", "sample.code=0"
    )
    trained = million_cli.train_codebook(
        model, byte_tokenizer(), synthetic_text(1, 1500), recipe, show_progress=False
    )
    meta = replace(trained.meta, command="million train-codebook", commit="abc123")
    replace(trained, meta=meta).save(path)
    return path


@pytest.fixture(scope="session")
def page(codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all that (its figures take seconds: the tests share it)."""
    root = tmp_path_factory.mktemp("page")
    write_all(root / "results")
    files = [f"report.files=[{root}/results]", f"report.codebooks=[{codebook}]"]
    report(compose([*files, f"out={root}/out"]))
    return root / "out" / "report" / "index.html"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "results"
    write_all(path)
    return path
