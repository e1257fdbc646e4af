"""`million bench e2e`: what a case is, how it is timed, the row that comes out; not how it is served.

Everything that is compared in a case runs in turns, in rounds of alternating order, in one process.  A step
is the time between two events on the stream, so a host that cannot keep up shows in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from million_cli.errors import UserError
from million_cli.tasks.base import Scalar

WHATS = ("speed", "largest", "breakdown")
PQ_IMPLS = ("paged-4bit", "paged-3bit", "paged-2bit", "contiguous-4bit", "paged-4bit-mixed")
TRANSFORMERS_IMPLS = (
    "transformers-dynamic",
    "transformers-static",
    "transformers-quanto",
    "transformers-hqq",
)
IMPLS = ("dense", *PQ_IMPLS, *TRANSFORMERS_IMPLS)

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
        model: a name under conf/model, a folder or a name on the hub; null is the job's model.
        context: tokens of the prompt.
        batch: sequences at once.
        what: speed, largest (batch that fits with that context) or breakdown (of a step by stage).
        impls: what is compared, of `IMPLS`.
        fill: random codes or K and V in place of reading a prompt; there is no time to first token then.
        new_tokens: steps timed; null is the benchmark's.

    Raises:
        UserError: a value out of range.
    """

    context: int
    impls: tuple[str, ...]
    model: str | None = None
    batch: int = 1
    what: str = "speed"
    fill: bool = False
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        for impl in self.impls:
            if impl not in IMPLS:
                raise UserError(f"bench.cases.impls={impl}: accepted are {', '.join(IMPLS)}")
        if self.what not in WHATS:
            raise UserError(f"bench.cases.what={self.what}: accepted are {', '.join(WHATS)}")
        for name in ("context", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"bench.cases.{name}={getattr(self, name)}: accepted are integers from 1")

    @classmethod
    def of(cls, settings: Mapping[str, Any], fill: bool) -> Case:
        """A case from the configuration.

        Raises:
            UserError: an unknown key, a missing one, or a value out of range.
        """
        accepted = [f.name for f in fields(cls)]
        for key in settings:
            if key not in accepted:
                raise UserError(f"unknown key bench.cases.{key}; accepted are {', '.join(accepted)}")
        for key in ("context", "impls"):
            if key not in settings:
                raise UserError(f"bench.cases: a case without {key}")
        return cls(**{"fill": fill, **settings, "impls": tuple(settings["impls"])})


@dataclass
class Config:
    """What `million bench e2e` runs.

    Attributes:
        cases: see `Case`, in order of importance.
        new_tokens: steps timed in each round.
        rounds: each turns the order around.
        compile: of the engine's steps: none, default or tuned.
        fill: for the cases that do not say it.
        dtype: of random weights: auto (float16 on a GPU, float32 on a CPU) or a name.
        breakdown: also time our engine's steps by stage in every case of speed, each after it.
        budget_s: no case is begun after so many seconds; null is no limit.
        resume: pass over what an earlier run with the same `out` has measured.
    """

    name: str = "e2e"
    cases: list[dict[str, Any]] = field(default_factory=list)
    new_tokens: int = 32
    rounds: int = 2
    compile: str = "default"
    fill: bool = False
    breakdown: bool = False
    dtype: str = "auto"
    budget_s: float | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)}: accepted are integers from 1")

    def parsed(self) -> list[Case]:
        """The cases, checked."""
        cases: list[Case] = []
        for case in (Case.of(case, self.fill) for case in self.cases):
            cases.append(case)
            ours = tuple(impl for impl in case.impls if impl not in TRANSFORMERS_IMPLS)
            if self.breakdown and case.what == "speed" and ours:
                cases.append(replace(case, what="breakdown", impls=ours, fill=True))
        return cases


class Runner(Protocol):
    """One way to serve one case; made for it, with memory taken, and dropped after it."""

    def prefill(self, ids: Tensor) -> None:
        """Read the prompt `[B, T]` up to its first new token."""
        ...

    def fill(self, batch: int, length: int) -> None:
        """Hold random tokens in its place."""
        ...

    def warm(self, steps: int) -> None:
        """Do once all that need not be done again in the next `steps` steps; takes a step or more itself."""
        ...

    def step(self) -> None:
        """The next token; the host need not wait for it."""
        ...

    def reset(self) -> None:
        """Forget the prompt, so that it can be read again."""
        ...

    def facts(self) -> dict[str, Scalar]:
        """Columns that it knows by itself: bytes, detail, ..."""
        ...


@dataclass
class Times:
    """Milliseconds, of all rounds."""

    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def row(self, batch: int) -> dict[str, Scalar]:
        steps = torch.tensor(self.steps, dtype=torch.float64)
        median = steps.quantile(0.5).item()
        return {
            "ttft_ms": torch.tensor(self.ttft, dtype=torch.float64).median().item() if self.ttft else None,
            "tpot_ms": median,
            "tpot_p90_ms": steps.quantile(0.9).item(),
            "tokens_per_s": 1e3 * batch / median,
        }


def measure_round(
    runner: Runner, case: Case, ids: Tensor, new_tokens: int, device: torch.device, times: Times
) -> None:
    """Add one round of `runner` to `times`; the very first prompt is read twice, once to warm up."""
    if case.fill:
        runner.fill(case.batch, case.context)
    else:
        if not times.ttft:
            runner.prefill(ids)
            runner.reset()
        times.ttft.append(time_ms(lambda: runner.prefill(ids), device))
    runner.warm(new_tokens)
    times.steps += time_steps(runner.step, new_tokens, device)


def time_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call until the device has done all of it."""
    _wait(device)
    clock = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - clock)


def time_steps(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Milliseconds between the ends of successive steps, without waiting in between."""
    if device.type != "cuda":
        return [time_ms(step, device) for _ in range(steps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    _wait(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    _wait(device)
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def largest_batch(fits: Callable[[int], bool], guess: int, most: int = 4096) -> int:
    """The largest batch for which `fits`, 0 if there is none; `fits` is monotonous, `guess` a good start."""
    low, high = 0, most + 1  # fits, does not fit
    probe, stride = guess, 1
    while high - low > 1:
        probe = min(max(probe, low + 1), high - 1)
        if fits(probe):
            low, probe = probe, probe + stride
        else:
            high, probe = probe, probe - stride
        stride *= 2
        if low and high <= most:  # between two that are known
            probe = (low + high) // 2
    return low


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
