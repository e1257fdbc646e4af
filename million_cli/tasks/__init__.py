"""What is measured, one file a task.  A new task is a module with `Config` and `measure`, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from million_cli.errors import UserError

TASKS = {
    "perplexity": "million_cli.tasks.perplexity",
    "passkey": "million_cli.tasks.passkey",
    "speed": "million_cli.bench.speed",
    "kernel": "million_cli.bench.kernels",
    "e2e": "million_cli.bench.cases",
    "longbench": "million_cli.tasks.longbench",
    "lm_eval": "million_cli.tasks.lm_eval",
}
"""Name -> module; modules are imported when they are asked for."""


def task_module(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        UserError: an unknown name.
    """
    if name not in TASKS:
        raise UserError(f"task.name={name}: accepted are {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name])


def task_loader(name: str) -> Callable[[Any], Any] | None:
    """What reads a task's material from its configuration, if that is not a text.

    Raises:
        UserError: an unknown name.
    """
    load: Callable[[Any], Any] | None = getattr(task_module(name), "load", None)
    return load
