"""Rows of jobs in the terms of all figures."""

from __future__ import annotations

from pathlib import Path

from million_cli.report.exhibit import Row

ORIGIN = ("command", "commit", "device", "torch", "transformers")
MEASURED = (
    *("kl_e3", "kl_se_e3", "perplexity", "perplexity_dense", "perplexity_change_percent", "nll", "nll_dense"),
    *("top1_agreement", "recall", "recall_dense", "recall_low", "recall_high", "recall_n"),
    *("tokens", "context", "cache_bytes", "dense_bytes", "cache_ratio", "key_error", "value_error"),
)
SUITES = {"ruler": "RULER", "longbench": "LongBench", "lm_eval": "lm-evaluation-harness"}


def terms(row: Row) -> Row:
    """A job's terms: model, quantizer, cache, bits, text, settings (`set.`), origin."""
    name = row.get("config.model.name", "")
    if name == "folder":
        name = Path(row.get("config.model.path", "")).name
    text = row.get("config.task.path") or row.get("config.task.dataset", "")
    settings = {
        "set." + key.split(".", 2)[2]: cell
        for key, cell in row.items()
        if key.split(".")[:2] in (["config", "quantizer"], ["config", "train"], ["config", "sample"])
        or key in ("config.cache.page_size", "config.cache.extended_residual")
    }
    settings.pop("set.name", None)
    return {
        "model": name,
        "quantizer": row.get("config.quantizer.name", ""),
        "cache": row.get("config.cache.kind", ""),
        "bits": row.get("bits_nominal", ""),
        "text": Path(text).name,
        **settings,
        **{key: row.get(key, "") for key in (*ORIGIN, "started", "source")},
    }


def failure(row: Row) -> Row:
    """A job that did not finish, with the last line of its error."""
    why = row.get("error", "").strip().splitlines()
    return {**terms(row), "verb": row["verb"], "status": row["status"], "why": (why or [""])[-1]}


def measured(row: Row) -> Row:
    """The quality that a job measured."""
    return {**terms(row), **{key: row[key] for key in MEASURED if row.get(key)}}


def averages(row: Row) -> list[Row]:
    """The averages of task suites."""
    return [
        {
            **terms(row),
            "suite": name,
            "task": "average",
            "score": row[f"{suite}_average"],
            "dense": row.get(f"{suite}_average_dense", ""),
        }
        for suite, name in SUITES.items()
        if row.get(f"{suite}_average")
    ]


def times(row: Row) -> list[Row]:
    """The two caches that `million bench` times, as two rows; none where it does not say the context."""
    shared = {**terms(row), "context": row.get("context", ""), "batch": row.get("batch", "")}
    if not shared["context"]:
        return []
    names = ("ttft", "tpot", "tpot_p90")
    cache = ", ".join(filter(None, [shared["cache"], shared["quantizer"]]))
    ours = {f"{name}_ms": row.get(f"{name}_ms", "") for name in names}
    dense = {f"{name}_ms": row.get(f"{name}_dense_ms", "") for name in names}
    more = {key: row.get(key, "") for key in ("tokens_per_s", "cache_bytes")}
    rows = [{**shared, "impl": "dense", "bits": "", **dense, "cache_bytes": row.get("dense_bytes", "")}]
    return rows if shared["cache"] == "dense" else [*rows, {**shared, "impl": cache, **ours, **more}]
