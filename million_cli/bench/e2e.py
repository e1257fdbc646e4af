"""`million bench e2e`: all cases in one run; each row is written as soon as it is measured.

Without Hydra: `python -m million_cli.bench.e2e OUT [key=value ...]`, keys of `conf/bench/e2e.yaml`.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from million_cli.bench.cases import COLUMNS, Case, Config, resolve_compile
from million_cli.bench.comparison import Comparison
from million_cli.bench.guard import clear, device_works, failure, guarded
from million_cli.bench.implementations import DENSE, STATIC, Implementation
from million_cli.bench.measure import Row
from million_cli.bench.models import Source, check_memory, dense_elements, free_memory
from million_cli.bench.stages import write_stages
from million_cli.conf import conf_folder
from million_cli.errors import UserError
from million_cli.hf.models import resolve_device
from million_cli.journal import Journal
from million_cli.progress import progress
from million_cli.results import git_commit, now, running, version
from million_cli.tables import Scalar, write_table

ATTEMPTS = 2
"""A measurement may end the process so many times; then its row stays `died`."""
UNUSABLE = 75
"""Exit code after a CUDA error that makes later calls fail: start again; measured rows are kept."""
ORIGIN = ("model", "context", "batch", "gpu", "dtype", "commit", "torch", "transformers", "command")
"""Columns of `e2e.csv` that tables of stages have too."""


class DeviceLost(RuntimeError):  # noqa: N818
    """The process can no longer use its GPU."""


class Bench:
    """One run.  Rows go into `out/e2e.jsonl` as they are measured; `out/e2e.csv` holds all of them.

    The next run with the same `out` measures the missing rows.  A measurement that ended its process is tried
    `ATTEMPTS` times.

    Args:
        own: the job's own model, for cases that name no model.

    Raises:
        UserError: a setting out of range, or a case that does not fit into a CPU's memory.  Nothing is loaded
            before all are checked.
    """

    def __init__(
        self, config: Config, out: Path, device: torch.device, seed: int = 0, own: Source | None = None
    ) -> None:
        self.config, self.out, self.device, self.seed = config, out, device, seed
        self.csv = out / "e2e.csv"
        self.cases = config.parsed(device)
        self.compile = resolve_compile(config.compile, device)
        self._sources = {case.model: self._source(case.model, own) for case in self.cases}
        if device.type == "cpu":
            free = free_memory()
            for case in self.cases:
                check_memory(case, self._sources[case.model], config.new_tokens, free)
        self.journal = Journal(out / "e2e.jsonl", fresh=not config.resume)
        self._loaded: tuple[str | None, Comparison] | None = None
        self._started = time.monotonic()

    def run(self) -> list[Row]:
        """All rows, those of earlier runs with the same `out` included.

        Raises:
            DeviceLost: the GPU is lost; a new run continues.
        """
        rows: list[Row] = []
        with progress(sum(len(case.impls) for case in self.cases), "end to end", "row") as bar:
            for case in self.cases:
                for row in self._rows(case):
                    rows.append(row)
                    cells = [{column: row.get(column) for column in COLUMNS} for row in rows]
                    write_table(self.csv, cells, "e2e")
                    bar.update()
        return rows

    def _source(self, name: str | None, own: Source | None) -> Source:
        if name is not None:
            return Source.named(name, self.device, self.config.dtype, self.seed)
        if own is None:
            raise UserError("bench.cases: a case without model")
        return own

    # -- rows of one case ------------------------------------------------------------------------------------

    def _rows(self, case: Case) -> Iterator[Row]:
        missing = tuple(impl for impl in case.impls if not self._is_done(case, impl))
        skipped = bool(missing) and self._is_late()
        if missing and not skipped:
            clock, began = time.monotonic(), now()
            measured = self.measure(replace(case, impls=missing))
            spent: Row = {"started": began, "duration_s": round(time.monotonic() - clock, 2)}
            self.journal.add(
                {
                    self._key(case, impl): self.row(case, impl, {**spent, **measured[impl.name]})
                    for impl in missing
                }
            )
            errors = [row for row in measured.values() if row["status"] == "error"]
            if errors and not device_works(self.device):
                raise DeviceLost(str(errors[0]["note"]))
        for impl in case.impls:
            if skipped and impl in missing:
                yield self.row(case, impl, {"status": "skipped", "note": "budget_s is used up"})
            else:
                yield self.journal[self._key(case, impl)]

    def _key(self, case: Case, impl: Implementation) -> str:
        settings = (self.config.new_tokens, self.config.rounds, self.compile, self.config.dtype, self.seed)
        return json.dumps([case.shared, impl.name, settings, str(self.device)])

    def _is_done(self, case: Case, impl: Implementation) -> bool:
        key = self._key(case, impl)
        if key not in self.journal:
            return False
        return self.journal[key]["status"] != "died" or self._attempts(key) >= ATTEMPTS

    def _attempts(self, key: str) -> int:
        return int(self.journal[key].get("attempts", 1)) if key in self.journal else 0

    @contextmanager
    def _attempt(self, case: Case, impls: Sequence[Implementation]) -> Iterator[None]:
        """Count an attempt at each of `impls`; it stays counted only if the process dies inside."""
        before = {impl: self._attempts(self._key(case, impl)) for impl in impls}
        self._note_attempts(case, {impl: count + 1 for impl, count in before.items()})
        try:
            yield
        finally:
            self._note_attempts(case, before)

    def _note_attempts(self, case: Case, attempts: dict[Implementation, int]) -> None:
        self.journal.add(
            {
                self._key(case, impl): self.row(
                    case,
                    impl,
                    {
                        "status": "died",
                        "attempts": count,
                        "note": f"the process ended in {count} of {ATTEMPTS} attempts",
                    },
                )
                for impl, count in attempts.items()
            }
        )

    def _is_late(self) -> bool:
        budget = self.config.budget_s
        return budget is not None and time.monotonic() - self._started > budget

    # -- measuring -------------------------------------------------------------------------------------------

    def measure(self, case: Case) -> dict[str, Row]:
        """A row for each implementation, also for failures.

        Raises:
            UserError: the model cannot be loaded.
        """
        try:
            with self._attempt(case, case.impls):
                comparison = self._comparison(case)
        except UserError:
            raise
        except Exception as error:
            return {impl.name: failure(error) for impl in case.impls}
        if case.what == "largest":
            return comparison.largest(case)
        if case.what == "speed":
            return comparison.speed(case)
        rows, shares = comparison.stages(case)
        if shares:
            model = (case.model or "own").replace("/", "-")  # a path stays one name
            name = f"{model}-{case.context}-{case.batch}"
            described = self.row(case, case.impls[0], {})
            files = write_stages(
                self.out / f"breakdown-{name}.csv",
                shares,
                f"{case.model or 'model'}, {case.context} tokens, batch {case.batch}",
                {column: described[column] for column in ORIGIN},
            )
            for name in shares:
                rows[name]["detail"] = "; ".join([str(rows[name]["detail"]), *(file.name for file in files)])
        return rows

    def _comparison(self, case: Case) -> Comparison:
        if self._loaded is None or self._loaded[0] != case.model:
            self._loaded = None
            torch._dynamo.reset()
            clear(self.device)
            model = self._sources[case.model].load()
            self._loaded = (
                case.model,
                Comparison(
                    model,
                    self.config.new_tokens,
                    self.config.rounds,
                    self.compile,
                    self.seed,
                    self._guard,
                    lambda: not self._is_late(),
                ),
            )
        return self._loaded[1]

    def _guard(self, case: Case, impl: Implementation, measure: Callable[[], Row]) -> Row:
        # `largest` tries several batches; all are attempts at the row of the case.
        with self._attempt(case, (impl,)):
            return guarded(measure, self.device)

    def row(self, case: Case, impl: Implementation, measured: Row) -> Row:
        """The columns of a case and its measurement."""
        model = self._loaded[1].model if self._loaded is not None else None
        row: Row = {
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "model": case.model,
            "what": case.what,
            "impl": impl.name,
            "dtype": str(model.dtype).removeprefix("torch.") if model is not None else None,
            "batch": case.batch,
            "context": case.context,
            "prompt": "random tokens in the cache" if case.fill or case.what == "largest" else "read",
            "new_tokens": case.new_tokens or self.config.new_tokens,
            "compile": impl.compiled(self.compile),
            "codebook": "random" if impl.codes(1, 64) is not None else None,
            "commit": git_commit(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "command": running.get(),
            **measured,
        }
        batch = row.get("largest_batch") or case.batch
        if row.get("cache_bytes") and model is not None:
            tokens = case.context + (2 if case.what == "largest" else int(row["new_tokens"] or 0)) + 2
            row["cache_ratio"] = float(row["cache_bytes"] or 0) / (
                dense_bytes(model, tokens) * int(batch or 1)
            )
        return row


def dense_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of 16-bit K and V of `tokens` tokens in all layers."""
    return 2 * dense_elements(model.config, tokens)


def table(rows: list[Row]) -> str:
    """The rows as text; `/static` and `/dense` are the times of those implementations over the row's."""
    lines = [
        f"{'model':20} {'context':>8} {'batch':>5}  {'cache':22} {'TTFT ms':>9} {'TPOT ms':>8} {'tok/s':>8} "
        f"{'cache GB':>8} {'/static':>7} {'/dense':>7}  status"
    ]
    for row in rows:
        beside = {
            other["impl"]: other
            for other in rows
            if all(other[k] == row[k] for k in ("model", "context", "batch", "what", "prompt"))
        }

        def ratio(impl: Implementation, row: Row = row, beside: dict[Scalar, Row] = beside) -> str:
            theirs, ours = beside.get(impl.name, {}).get("tpot_ms"), row.get("tpot_ms")
            return f"{float(theirs) / float(ours):.2f}" if theirs and ours else ""

        def number(name: str, digits: int, scale: float = 1.0, row: Row = row) -> str:
            value = row.get(name)
            return "" if value in (None, "") else f"{float(value) / scale:.{digits}f}"

        what = f"largest {row['largest_batch']}" if row.get("largest_batch") is not None else row["status"]
        lines.append(
            f"{row['model'] or 'own':20} {row['context']:>8} {row['batch'] or '':>5}  {row['impl']:22} "
            f"{number('ttft_ms', 1):>9} {number('tpot_ms', 2):>8} {number('tokens_per_s', 0):>8} "
            f"{number('cache_bytes', 2, 1e9):>8} {ratio(STATIC):>7} {ratio(DENSE):>7}  {what}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the benchmark without Hydra; see the module's head.

    Raises:
        UserError: see `Bench`.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UserError("python -m million_cli.bench.e2e OUT [key=value ...]")
    running.set(shlex.join(["python", "-m", "million_cli.bench.e2e", *arguments]))
    settings = yaml.safe_load((conf_folder() / "bench" / "e2e.yaml").read_text())
    device, seed = "cuda:0" if torch.cuda.is_available() else "cpu", 0
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key == "device":
            device = value
        elif key == "seed":
            if not value.isdecimal():
                raise UserError(f"seed={value}: accepted are integers from 0")
            seed = int(value)
        elif key in settings:
            settings[key] = yaml.safe_load(value)
        else:
            raise UserError(f"{key}: accepted are device, seed, {', '.join(settings)}")
    bench = Bench(Config(**settings), Path(arguments[0]), resolve_device(device), seed)
    try:
        rows = bench.run()
    except DeviceLost as error:
        print(f"million: {error}; run again to go on", file=sys.stderr)
        return UNUSABLE
    print(table(rows))
    print(f"\n{bench.csv}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"million: {error}", file=sys.stderr)
        sys.exit(2)
