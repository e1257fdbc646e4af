"""The commands, one file a verb: a module with a `run_` function and a line in `registry.VERBS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from million_cli.pipelines.config import JobConfig
from million_cli.registry import VERBS


@dataclass(frozen=True)
class Result:
    """The measurements of one verb, for its record; `config` is the configuration in force."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    fallbacks: Sequence[str] = field(default_factory=list)
    device: str = ""
    dtype: str = ""


def run(verb: str, config: JobConfig) -> list[Result]:
    """Run a verb.

    Raises:
        UserError: the user's mistake, in one line.
    """
    results: list[Result] = VERBS.load(verb)(config)
    return results
