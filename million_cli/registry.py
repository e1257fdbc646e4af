"""The names that a configuration accepts, each with its object: verbs, caches, codecs, tasks, benchmarks.

An object is written "module" or "module:attribute" and imported when it is asked for, so reading this list
imports nothing.  Other packages add codecs and tasks by entry points of the groups `million.codecs` and
`million.tasks`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from million_cli.errors import UserError


@dataclass(frozen=True)
class Registry:
    """The names of one kind.

    Attributes:
        key: of the configuration, for messages.
        own: name -> object of this package.
        group: of the entry points by which other packages add names; "" if they cannot.
    """

    key: str
    own: Mapping[str, str]
    group: str = ""

    @cached_property
    def added(self) -> dict[str, list[EntryPoint]]:
        """Names of other packages.  A name that is also ours or another package's is refused by `check`."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self.group), key=_package) if self.group else ():
            found.setdefault(entry.name, []).append(entry)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.own, *(name for name in self.added if name not in self.own))

    def check(self, name: str) -> None:
        """Refuse a name, without importing its object.

        Raises:
            UserError: the name is unknown, or several packages have it.
        """
        if name not in self.names:
            raise UserError(f"{self.key}={name}: accepted are {', '.join(self.names)}")
        packages = [*(["million"] if name in self.own else []), *map(_package, self.added.get(name, []))]
        if len(packages) > 1:
            raise UserError(
                f"{self.key}={name}: several packages have it, accepted is one of them installed: "
                + ", ".join(packages)
            )

    def load(self, name: str) -> Any:
        """The object of a name.

        Raises:
            UserError: as `check`, or the object of another package cannot be imported.
        """
        self.check(name)
        if name in self.own:
            return EntryPoint(name, self.own[name], "million").load()
        (entry,) = self.added[name]
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self.key}={name}: {_package(entry)} cannot be imported: {error}") from error

    def package(self, name: str) -> str:
        """The distribution that a known name comes from."""
        return "million" if name in self.own else _package(self.added[name][0])

    def source(self, name: str) -> dict[str, str]:
        """The version and sources of another package's object, on which results depend; {} for our own."""
        if name in self.own:
            return {}
        found = self.load(name)
        module = found if isinstance(found, ModuleType) else sys.modules[found.__module__]
        top = Path(sys.modules[module.__name__.partition(".")[0]].__file__ or "")
        digest = hashlib.sha256()
        for path in sorted(top.parent.rglob("*.py")) if top.name == "__init__.py" else [top]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        version = getattr(self.added[name][0].dist, "version", "")
        return {f"{self.key}={name}": f"{self.package(name)} {version} {digest.hexdigest()}"}


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


VERBS = Registry(
    "verb",
    {
        "sample": "million_cli.pipelines.sample:run_sample",
        "train-codebook": "million_cli.pipelines.train_codebook:run_train",
        "eval": "million_cli.pipelines.evaluate:run_evaluate",
        "bench": "million_cli.pipelines.bench:run_bench",
        "run": "million_cli.pipelines.chain:run_chain",
    },
)
"""Functions from a `JobConfig` to results."""

CACHES = Registry(
    "cache.kind",
    {
        "dense": "transformers.cache_utils:DynamicCache",
        "contiguous": "million_cli.hf.cache:DynamicPQCache",
        "paged": "million_cli.hf.cache:PagedPQCache",
    },
)
"""Caches of a model; all but `dense` are made from a codebook."""

CODECS = Registry(
    "quantizer.kind",
    {
        "fp8": "million_cli.codecs.fp8:Fp8",
        "kivi": "million_cli.codecs.uniform:Kivi",
        "per-token": "million_cli.codecs.uniform:PerToken",
        "quanto": "million_cli.codecs.transformers_own:Quanto",
        "hqq": "million_cli.codecs.transformers_own:Hqq",
    },
    "million.codecs",
)
"""Alternatives to product quantization, see `codecs.codec.Codec`."""

TASKS = Registry(
    "task.name",
    {
        "perplexity": "million_cli.tasks.perplexity",
        "passkey": "million_cli.tasks.passkey",
        "drift": "million_cli.tasks.drift",
        "ruler": "million_cli.tasks.ruler",
        "longbench": "million_cli.tasks.longbench",
        "lm_eval": "million_cli.tasks.lm_eval",
    },
    "million.tasks",
)
"""Measurements of `million eval`, see `tasks.base`."""

BENCHES = Registry(
    "bench.name",
    {
        "speed": "million_cli.bench.speed",
        "kernel": "million_cli.bench.kernels",
        "e2e": "million_cli.bench.cases",
    },
)
"""Measurements of `million bench`: modules with a `Config`."""
