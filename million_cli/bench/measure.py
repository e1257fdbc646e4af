"""How a decode is timed: one runner, one prompt, and the steps after it.

A step is the time between two events on the stream, so a host that cannot keep up shows in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from million_cli.tables import Scalar

Row = dict[str, Scalar]


class Runner(Protocol):
    """Serves one case.  It is made for the case, holds its memory, and is dropped after it."""

    def prefill(self, ids: Tensor) -> None:
        """Read the prompt `[B, T]` up to its first new token."""
        ...

    def fill(self, batch: int, length: int) -> None:
        """Hold random tokens instead of a prompt."""
        ...

    def warm(self, steps: int) -> None:
        """Do the one-time work of the next `steps` steps; runs a step or more itself."""
        ...

    def step(self) -> None:
        """Make the next token; the host need not wait for it."""
        ...

    def reset(self) -> None:
        """Forget the prompt, so that it can be read again."""
        ...

    def facts(self) -> Row:
        """Columns of the row that only the runner knows: bytes, detail, ..."""
        ...


@dataclass
class Times:
    """Times of all rounds, in milliseconds."""

    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def row(self, batch: int) -> Row:
        """Median time to the first token; median and 90th percentile of the steps; tokens a second."""
        steps = torch.tensor(self.steps, dtype=torch.float64)
        median = steps.quantile(0.5).item()
        return {
            "ttft_ms": torch.tensor(self.ttft, dtype=torch.float64).median().item() if self.ttft else None,
            "tpot_ms": median,
            "tpot_p90_ms": steps.quantile(0.9).item(),
            "tokens_per_s": 1e3 * batch / median,
        }


def random_prompt(vocabulary: int, batch: int, context: int, seed: int) -> Tensor:
    """Token ids `[B, T]` on the CPU; their values do not matter for time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, context), generator=generator)


def time_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call until the device has finished it."""
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
