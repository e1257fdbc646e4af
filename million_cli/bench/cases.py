"""`million bench e2e`: its cases, its settings and the columns of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from million_cli.bench.implementations import IMPLEMENTATIONS, Implementation
from million_cli.engine.engine import COMPILES, Compile
from million_cli.errors import UserError

WHATS = ("speed", "largest", "breakdown")
AUTO = "auto"

COLUMNS = (
    "gpu", "model", "what", "impl", "status", "dtype", "batch", "context", "prompt", "new_tokens", "ttft_ms",
    "tpot_ms", "tpot_p90_ms", "tokens_per_s", "largest_batch", "cache_bytes", "cache_ratio", "code_bytes",
    "window_bytes", "block_table_bytes", "pool_reserved_bytes", "codebook_bytes", "peak_bytes", "codebook",
    "compile", "detail", "note", "started", "duration_s", "commit", "torch", "transformers", "command",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        context: tokens of the prompt.
        impls: the implementations to compare.
        model: a name under conf/model, a folder or a name on the hub; None is the job's model.
        batch: sequences at once.
        what: `speed`, `largest` (the largest batch that fits) or `breakdown` (time of a step by stage).
        fill: fill the caches with random codes or K and V instead of reading a prompt; the row then has no
            time to the first token.
        new_tokens: steps timed; None takes the benchmark's number.

    Raises:
        UserError: a value out of range.
    """

    context: int
    impls: tuple[Implementation, ...]
    model: str | None = None
    batch: int = 1
    what: str = "speed"
    fill: bool = False
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.what not in WHATS:
            raise UserError(f"bench.cases.what={self.what}: accepted are {', '.join(WHATS)}")
        for name in ("context", "batch", "new_tokens"):
            value = getattr(self, name)
            if value is None and name == "new_tokens":
                continue
            if not isinstance(value, int) or value < 1:
                raise UserError(f"bench.cases.{name}={value}: accepted are integers from 1")

    @classmethod
    def parse(cls, settings: Mapping[str, Any], fill: bool) -> Case:
        """A case from the configuration, where implementations have names.

        Raises:
            UserError: an unknown key or name, a missing key, or a value out of range.
        """
        accepted = [f.name for f in fields(cls)]
        for key in settings:
            if key not in accepted:
                raise UserError(f"unknown key bench.cases.{key}; accepted are {', '.join(accepted)}")
        for key in ("context", "impls"):
            if key not in settings:
                raise UserError(f"bench.cases: a case without {key}")
        for name in settings["impls"]:
            if name not in IMPLEMENTATIONS:
                raise UserError(f"bench.cases.impls={name}: accepted are {', '.join(IMPLEMENTATIONS)}")
        impls = tuple(IMPLEMENTATIONS[name] for name in settings["impls"])
        return cls(**{"fill": fill, **settings, "impls": impls})

    @property
    def shared(self) -> dict[str, Any]:
        """All but `impls`, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "impls"}


@dataclass
class Config:
    """Settings of `million bench e2e`.

    Attributes:
        cases: see `Case`, in order of importance; None is the suite of the device.
        suites: cases by type of device, `cuda` and `cpu`.
        new_tokens: steps timed in each round.
        rounds: measurements of each implementation; every round reverses the order.
        compile: of the engine's steps: none, default or tuned; auto is default on a GPU and none on a CPU.
        fill: for the cases that do not set it.
        dtype: of random weights: auto (float16 on a GPU, float32 on a CPU) or a name.
        breakdown: after every case of speed, time the steps of our engine by stage too.
        budget_s: start no case after so many seconds; None is no limit.
        resume: skip rows that an earlier run with the same `out` has measured.
    """

    name: str = "e2e"
    cases: list[dict[str, Any]] | None = None
    suites: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    new_tokens: int = 32
    rounds: int = 2
    compile: str = AUTO
    fill: bool = False
    breakdown: bool = False
    dtype: str = "auto"
    budget_s: float | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)}: accepted are integers from 1")

    def parsed(self, device: torch.device) -> list[Case]:
        """The cases for a device, checked.

        Raises:
            UserError: as `Case.parse`, or there is no suite for the device.
        """
        chosen = self.suites.get(device.type) if self.cases is None else self.cases
        if not chosen:
            raise UserError(f"bench.cases={self.cases}: there are none for device={device.type}")
        cases: list[Case] = []
        for case in (Case.parse(case, self.fill) for case in chosen):
            cases.append(case)
            ours = tuple(impl for impl in case.impls if impl.ours)
            if self.breakdown and case.what == "speed" and ours:
                cases.append(replace(case, what="breakdown", impls=ours, fill=True))
        return cases


def resolve_compile(compile: str, device: torch.device) -> Compile:
    """How the engine's steps are compiled on a device.

    Raises:
        UserError: an unknown name.
    """
    if compile == AUTO:
        return "default" if device.type == "cuda" else "none"
    for known in COMPILES:
        if compile == known:
            return known
    raise UserError(f"bench.compile={compile}: accepted are {AUTO}, {', '.join(COMPILES)}")
