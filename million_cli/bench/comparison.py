"""One case measured on a loaded model: all implementations in turns, in one process.

Every round reverses the order, so a drift within a run affects all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from million_cli.bench.cases import Case
from million_cli.bench.implementations import Implementation, Job
from million_cli.bench.measure import (
    Row,
    Runner,
    Times,
    largest_batch,
    random_prompt,
    time_ms,
    time_steps,
)
from million_cli.bench.random_codebook import random_codebook
from million_cli.bench.stages import Share, measure_stages
from million_cli.engine.engine import Compile
from million_cli.hf.models import fingerprint
from million_cli.pq.codebook import Codebook
from million_cli.spec import PQSpec

STAGED_STEPS = 8
"""Steps whose stages are timed."""
MOST_ON_CPU = 4
"""The largest batch to try where no allocator reports that memory is out."""

Guard = Callable[[Case, Implementation, Callable[[], Row]], Row]
"""Runs a measurement: its row with `status` ok, or for a failure a row that says so."""


@dataclass
class Comparison:
    """How a model's cases are measured.

    Attributes:
        new_tokens: steps timed in each round, for cases that do not set it.
        seed: of prompts and random codebooks.
        guard: runs every measurement.
        go_on: called before each round but the first; False ends the rounds.
    """

    model: PreTrainedModel
    new_tokens: int
    rounds: int
    compile: Compile
    seed: int
    guard: Guard
    go_on: Callable[[], bool] = lambda: True
    _codebook: tuple[list[PQSpec], Codebook] | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def speed(self, case: Case) -> dict[str, Row]:
        """Times to the first token and of each step, a row an implementation."""
        steps = case.new_tokens or self.new_tokens
        times = {impl.name: Times() for impl in case.impls}
        rows: dict[str, Row] = {}

        def one_round(impl: Implementation) -> Row:
            runner = self.runner(case, impl, steps)
            self.measure_round(runner, case, steps, times[impl.name])
            return runner.facts()

        for number in range(self.rounds):
            for impl in case.impls if number % 2 == 0 else reversed(case.impls):
                if number and (rows[impl.name]["status"] != "ok" or not self.go_on()):
                    continue

                found = self.guard(case, impl, partial(one_round, impl))
                done = found["status"] == "ok"
                rows[impl.name] = {**found, **times[impl.name].row(case.batch)} if done else found
        return rows

    def measure_round(self, runner: Runner, case: Case, steps: int, times: Times) -> None:
        """Add one round to `times`; the very first prompt is read twice, once to warm up."""
        if case.fill:
            runner.fill(case.batch, case.context)
        else:
            vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
            ids = random_prompt(vocabulary, case.batch, case.context, self.seed).to(self.device)
            if not times.ttft:
                runner.prefill(ids)
                runner.reset()
            times.ttft.append(time_ms(lambda: runner.prefill(ids), self.device))
        runner.warm(steps)
        times.steps += time_steps(runner.step, steps, self.device)

    def largest(self, case: Case) -> dict[str, Row]:
        """The largest batch that holds the context and can take a step; nothing is compiled for it."""
        return {impl.name: self._largest(case, impl) for impl in case.impls}

    def _largest(self, case: Case, impl: Implementation) -> Row:
        facts: Row = {}
        failed: list[Row] = []

        def fits(batch: int) -> bool:
            one = replace(case, batch=batch, fill=True)
            found = self.guard(case, impl, lambda: attempt(one))
            if found["status"] == "ok":
                facts.update(found)
            elif found["status"] != "oom":
                failed.append(found)
            return found["status"] == "ok"

        def attempt(one: Case) -> Row:
            runner = self.runner(one, impl, 2, "none")
            runner.fill(one.batch, one.context)
            runner.step()
            runner.step()
            return runner.facts()

        guess, on_gpu = 1, self.device.type == "cuda"
        if fits(1) and on_gpu:
            # The codebooks are in memory already, so the difference is the memory of one sequence.
            free = torch.cuda.mem_get_info(self.device)[0]
            guess = max(1, int(free / float(facts["cache_bytes"] or 1)))
        if failed:
            return failed[0]
        largest = largest_batch(fits, guess, 4096 if on_gpu else MOST_ON_CPU)
        if failed:
            return failed[0]
        return {"status": "ok", **facts, "largest_batch": largest, "batch": None}

    def stages(self, case: Case) -> tuple[dict[str, Row], dict[str, list[Share]]]:
        """Time of a step by stage: a row an implementation, and the shares of those that were measured."""
        shares: dict[str, list[Share]] = {}
        # Hooks on modules find nothing in compiled steps, so on a CPU none is compiled.
        compile: Compile = self.compile if self.device.type == "cuda" else "none"
        steps = 4 * STAGED_STEPS

        def one(impl: Implementation) -> Row:
            runner = self.runner(case, impl, steps, compile)
            if case.fill:
                runner.fill(case.batch, case.context)
            else:
                vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
                runner.prefill(random_prompt(vocabulary, case.batch, case.context, self.seed).to(self.device))
            runner.warm(steps)
            plain_us = 1e3 * statistics.median(time_steps(runner.step, STAGED_STEPS, self.device))
            shares[impl.name] = measure_stages(runner.step, STAGED_STEPS, self.model)
            total_us = sum(row.us for row in shares[impl.name])
            return {
                **runner.facts(),
                "compile": impl.compiled(compile),
                "tpot_ms": plain_us / 1e3,
                "note": f"stages sum to {total_us / plain_us:.3f} of a step without the profiler",
            }

        rows = {impl.name: self.guard(case, impl, partial(one, impl)) for impl in case.impls}
        return rows, {name: shares[name] for name, row in rows.items() if row["status"] == "ok"}

    def runner(self, case: Case, impl: Implementation, steps: int, compile: Compile | None = None) -> Runner:
        """A runner for a case and `steps` steps after its prompt."""
        compile = self.compile if compile is None else compile
        return impl.runner(Job(self.model, case.context, steps, compile, self._codebook_for(impl)))

    def _codebook_for(self, impl: Implementation) -> Codebook | None:
        """The codebook of an implementation; one is kept at a time, as they are large."""
        of_model = fingerprint(self.model)
        specs = impl.codes(len(of_model.layers), of_model.head_dim)
        if specs is None:
            return None
        if self._codebook is None or self._codebook[0] != specs:
            self._codebook = None
            self._codebook = specs, random_codebook(self.model, specs, self.seed)
        return self._codebook[1]
