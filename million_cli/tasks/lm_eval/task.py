"""lm-evaluation-harness through its own API: its tasks, prompts, stop sequences, filters and metrics.

Only tasks that generate (`output_type: generate_until`) are accepted: the others score given continuations in
one forward pass without a cache, which quantization of a cache cannot touch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from million_cli.errors import UserError
from million_cli.tasks.base import (
    CacheFactory,
    Prefill,
    Scalar,
    TaskResult,
    check_context,
    check_extra,
    check_task,
    dense_cache,
    finite,
    longest_context,
    memory_of_prompt,
)

DEFAULT_NEW_TOKENS = 256
"""The harness's own, where a task does not say."""


@dataclass
class Config:
    """The tasks and their settings.  `task=lm_eval/<name>` on the command line sets `tasks`.

    Attributes:
        tasks: of the harness: names of tasks, groups or tags.
        path: a folder of task definitions (YAML) of your own, beside the harness's.
        limit: number of documents of each task, from the first; null is all.
        num_fewshot: examples in each prompt; null is the task's own number.
        batch: prompts at once, padded on the left.  With codes, padding is coded like text, so batches are
            not exactly the same as prompts one at a time.
        max_length: tokens of a prompt and its answer; null is the model's context.  Longer prompts lose their
            beginning, as the harness does it.
        prefill: `quantized` or `exact`.
        chat: use the tokenizer's chat template.
        unsafe_code: run tasks that execute what the model writes.
    """

    name: str = "lm_eval"
    tasks: list[str] | None = None
    path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch: int = 1
    max_length: int | None = None
    prefill: str = "quantized"
    chat: bool = False
    unsafe_code: bool = False

    def __post_init__(self) -> None:
        check_task(self, limit=1, num_fewshot=0, batch=1, max_length=2)


@dataclass(frozen=True)
class Material:
    """The harness's tasks by name, in the form of `simple_evaluate`, and a hash of all their questions."""

    names: list[str]
    manager: Any
    new_tokens: int
    sha256: str


def load(config: Config) -> Material:
    """The tasks that `config` names, with their documents (of the hub, unless a task's YAML says otherwise).

    Raises:
        UserError: the extra `lm-eval` is missing; no task, an unknown one or one that does not generate; a
            folder that does not exist; documents that cannot be had.
    """
    if not config.tasks:
        raise UserError("task.tasks is empty: name a task of the harness, as in task=lm_eval/gsm8k")
    check_extra("task=lm_eval", "lm-eval", ("lm_eval", "accelerate"))
    if config.path is not None and not Path(config.path).is_dir():
        raise UserError(f"task.path={config.path}: no such folder of task definitions")
    from lm_eval.tasks import TaskManager

    _quiet()
    # To index the harness's own tasks takes seconds: those of a folder rarely need them.
    manager = TaskManager(include_path=config.path, include_defaults=config.path is None)
    if not set(config.tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=config.path)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise UserError(f"task.tasks={name}: no such task; `lm-eval ls tasks` lists those of the harness")
    try:
        tasks = manager.load(list(config.tasks))["tasks"]
    except Exception as error:  # whatever a loader of datasets may raise
        reason = (str(error).splitlines() or [""])[0]
        names = ", ".join(config.tasks)
        raise UserError(
            f"task.tasks={names}: the documents cannot be had: {type(error).__name__}: {reason}"
        ) from error
    asked, new_tokens = hashlib.sha256(), 1
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise UserError(
                f"task.tasks={name}: it is scored without a cache (output_type={task.OUTPUT_TYPE}); "
                "accepted are generation tasks"
            )
        if getattr(task, "UNSAFE_CODE", False) and not config.unsafe_code:
            raise UserError(
                f"task.tasks={name} runs what the model writes; accept it by task.unsafe_code=true"
            )
        limit = (task.config.generation_kwargs or {}).get("max_gen_toks", DEFAULT_NEW_TOKENS)
        new_tokens = max(new_tokens, int(limit))
        content = [name, task.dump_config(), list(task.eval_docs)]
        asked.update(json.dumps(content, sort_keys=True, default=str).encode())
    return Material(list(config.tasks), manager, new_tokens, asked.hexdigest())


@finite("lm_eval")
@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    caches: CacheFactory,
    material: Material,
    config: Config,
    seed: int,
) -> TaskResult:
    """The harness's scores with the cache and with the dense cache, on the same prompts.

    Args:
        material: from `load`.

    Returns:
        lm_eval_<task>_<metric>[_<filter>], as the harness defines it; lm_eval_average (mean over tasks of
        each one's first metric); each also with `_dense`; lm_eval_cut (prompts that lost their beginning to
        fit); the bytes of `memory_metrics` for the longest prompt.  The table `lm_eval` has a row a task,
        metric and filter, `lm_eval_samples` a row an answer.

    Raises:
        UserError: max_length is more than the model takes or too short for the answers, or no chat template.
    """
    from lm_eval import simple_evaluate

    from million_cli.tasks.lm_eval.model import CachedLM

    max_length = config.max_length or longest_context(model)
    check_context("task.max_length", max_length, model)
    if material.new_tokens >= max_length:
        raise UserError(
            f"task.max_length={max_length}: an answer takes up to {material.new_tokens} tokens; "
            "accepted is more"
        )
    if config.chat and not getattr(tokenizer, "chat_template", None):
        raise UserError("task.chat=true: the model's tokenizer has no chat template")
    prefill: Prefill = "exact" if config.prefill == "exact" else "quantized"
    makers = {"cache": lambda: caches(prefill), "dense": lambda: dense_cache(model)}
    found: list[Mapping[str, Any]] = []
    for label, make in makers.items():
        lm = CachedLM(model, tokenizer, make, label, batch=config.batch, max_length=max_length)
        results = simple_evaluate(
            lm,
            tasks=material.names,
            task_manager=material.manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            bootstrap_iters=1000,
            apply_chat_template=config.chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=config.unsafe_code,
        )
        assert results is not None  # it is None on ranks other than the first
        found.append(results)
    rows = list(_scores(*found))
    metrics: dict[str, Scalar] = {}
    for row in rows:
        parts = (row["task"], row["metric"], row["filter"])
        name = "_".join(("lm_eval", *(str(part) for part in parts if part != "none")))
        metrics |= {name: row["score"], f"{name}_dense": row["dense"]}
    firsts = list({row["task"]: row for row in reversed(rows) if row["samples"]}.values())
    metrics["lm_eval_average"] = fmean(row["score"] for row in firsts)
    metrics["lm_eval_average_dense"] = fmean(row["dense"] for row in firsts)
    metrics["lm_eval_cut"] = lm.cut
    memory = memory_of_prompt(model, caches(prefill), lm.longest)
    samples = list(_samples(*(results["samples"] for results in found)))
    return TaskResult({**metrics, **memory}, {"lm_eval": rows, "lm_eval_samples": samples})


def _scores(ours: Mapping[str, Any], dense: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a task (or group), metric and filter; a group has no samples of its own."""
    for task, scores in ours["results"].items():
        for key, score in scores.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(score, (int, float)):
                continue
            error = f"{metric}_stderr,{name}"
            yield {
                "task": task,
                "metric": metric,
                "filter": name,
                "higher_is_better": ours["higher_is_better"].get(task, {}).get(metric),
                "samples": ours["n-samples"].get(task, {}).get("effective"),
                "score": score,
                "score_se": _number(scores.get(error)),
                "dense": dense["results"][task][key],
                "dense_se": _number(dense["results"][task].get(error)),
            }


def _number(value: Any) -> float | None:
    """The harness writes N/A where it has no standard error."""
    return float(value) if isinstance(value, (int, float)) else None


def _samples(ours: Mapping[str, Any], dense: Mapping[str, Any]) -> Iterator[dict[str, Scalar]]:
    """A row an answer and filter, both caches' beside each other."""
    for task, samples in ours.items():
        for sample, other in zip(samples, dense[task], strict=True):
            yield {
                "task": task,
                "id": sample["doc_id"],
                "filter": sample["filter"],
                "target": str(sample["target"]),
                "prediction": str(sample["filtered_resps"][0]),
                "prediction_dense": str(other["filtered_resps"][0]),
            }


def _quiet() -> None:
    """Silence the harness: we report errors ourselves, and its advice is about its own command line."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
