"""What the commands do, one file a verb.  A new verb is a module with a `run_` function, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from million_cli.pipelines.config import JobConfig


@dataclass(frozen=True)
class Result:
    """What one verb measured, on its way into a record; `config` is the configuration that was in force."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    fallbacks: Sequence[str] = field(default_factory=list)
    device: str = ""
    dtype: str = ""


VERBS = {
    "sample": "million_cli.pipelines.sample:run_sample",
    "train-codebook": "million_cli.pipelines.train_codebook:run_train",
    "eval": "million_cli.pipelines.evaluate:run_evaluate",
    "bench": "million_cli.pipelines.bench:run_bench",
    "bench-kernel": "million_cli.pipelines.kernel_bench:run_kernel_bench",
    "run": "million_cli.pipelines.chain:run_chain",
}
"""Verb -> function from a configuration to results; modules (and torch) are imported when asked for."""


def run(verb: str, config: JobConfig) -> list[Result]:
    """Run a verb.

    Raises:
        UserError: the user's mistake, in one line.
    """
    module, _, function = VERBS[verb].partition(":")
    results: list[Result] = getattr(importlib.import_module(module), function)(config)
    return results
