"""`million bench e2e`: all cases in one run, each row kept as soon as it is measured.

Without Hydra: `python -m million_cli.bench.e2e OUT [key=value ...]`, keys of `conf/bench/e2e.yaml`.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from million_cli.bench.cases import COLUMNS, Case, Config, Runner, Times, largest_batch, measure_round
from million_cli.bench.runners import layer_codes, make_runner, random_codebook
from million_cli.engine.engine import COMPILES, Compile
from million_cli.errors import UserError
from million_cli.hf.models import fingerprint, load_model, random_model, resolve_device
from million_cli.journal import Journal
from million_cli.pipelines import Result
from million_cli.pipelines.config import JobConfig, typed
from million_cli.pipelines.session import Session
from million_cli.pq.codebook import Codebook
from million_cli.progress import progress
from million_cli.results import CHECKOUT, git_commit, now, version
from million_cli.tables import Scalar, write_table

logger = logging.getLogger("million")
Row = dict[str, Scalar]
UNUSABLE = 75
"""Exit code after a CUDA error that no later call survives: start again, what is measured is kept."""


KEPT_BYTES = 4 << 30
"""Memory that a measurement may leave allocated: codebooks are made by the first that needs them."""


class DeviceLost(RuntimeError):  # noqa: N818
    """The process can no longer use its GPU."""


def run_e2e(config: JobConfig) -> list[Result]:
    """The verb: a short table, and the CSV's name, on stdout.

    Raises:
        UserError: a case that says something else than `Case` accepts, or an unknown model.
    """
    settings: Config = typed("bench", config.bench)
    session = Session(config)
    bench = Bench(settings, Path(config.out), session.device, config.seed, lambda: session.model)
    rows = bench.run()
    print(table(rows))
    print(f"\n{bench.csv}")
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "oom", "error")}
    return [
        Result(
            config={"bench": config.bench, "seed": config.seed, "out": config.out},
            metrics={"e2e_table": str(bench.csv), **{f"rows_{name}": n for name, n in counts.items()}},
            device=session.device_name,
        )
    ]


class Bench:
    """One run.  Rows go into `out/e2e.jsonl` as they are earned; `out/e2e.csv` is all of them.

    Args:
        own_model: the job's own model, for cases that name none.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        device: torch.device,
        seed: int = 0,
        own_model: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        if config.compile not in COMPILES:
            raise UserError(f"bench.compile={config.compile}: accepted are {', '.join(COMPILES)}")
        self.config, self.out, self.device, self.seed = config, out, device, seed
        self.csv = out / "e2e.csv"
        self.cases = config.parsed()
        self.compile: Compile = config.compile
        self.journal = Journal(out / "e2e.jsonl", fresh=not config.resume)
        self._own_model = own_model
        self._loaded: tuple[str | None, PreTrainedModel] | None = None
        self._codebooks: dict[str, Codebook] = {}
        self._started = time.monotonic()

    def run(self) -> list[Row]:
        """All rows, those of earlier runs with the same `out` included.

        Raises:
            DeviceLost: start again to go on.
        """
        rows: list[Row] = []
        with progress(sum(len(case.impls) for case in self.cases), "end to end", "row") as bar:
            for case in self.cases:
                for row in self._case(case):
                    rows.append(row)
                    table = [{column: row.get(column) for column in COLUMNS} for row in rows]
                    write_table(self.csv, table, "e2e")
                    bar.update()
        return rows

    def _case(self, case: Case) -> Iterator[Row]:
        keys = {impl: self._key(case, impl) for impl in case.impls}
        missing = [impl for impl in case.impls if keys[impl] not in self.journal]
        measured: dict[str, Row] = {}
        if missing and self._is_late():
            measured = {impl: {"status": "skipped", "note": "budget_s is used up"} for impl in missing}
        elif missing:
            # Were the process to die in here, the next one would find this and go on with the next case.
            self.journal.add({keys[impl]: self.row(case, impl, {"status": "died"}) for impl in missing})
            clock, began = time.monotonic(), now()
            measured = self._measure(case, missing)
            spent: Row = {"started": began, "duration_s": round(time.monotonic() - clock, 2)}
            self.journal.add({keys[i]: self.row(case, i, {**spent, **measured[i]}) for i in missing})
            lost = [row for row in measured.values() if row["status"] == "error"]
            if lost and not self._device_works():
                raise DeviceLost(str(lost[0]["note"]))
        for impl in case.impls:
            skipped = impl in measured and measured[impl]["status"] == "skipped"
            yield self.row(case, impl, measured[impl]) if skipped else self.journal[keys[impl]]

    def _key(self, case: Case, impl: str) -> str:
        settings = (self.config.new_tokens, self.config.rounds, self.compile, self.config.dtype, self.seed)
        shared = {name: value for name, value in vars(case).items() if name != "impls"}
        return json.dumps([shared, impl, settings, str(self.device)])

    def _is_late(self) -> bool:
        budget = self.config.budget_s
        return budget is not None and time.monotonic() - self._started > budget

    def _device_works(self) -> bool:
        if self.device.type != "cuda":
            return True
        try:
            torch.zeros(1, device=self.device).add_(1).item()
        except RuntimeError:
            return False
        return True

    # -- one case --------------------------------------------------------------------------------------------

    def _measure(self, case: Case, impls: list[str]) -> dict[str, Row]:
        try:
            model = self._model(case)
        except UserError:
            raise
        except Exception as error:
            return dict.fromkeys(impls, failure(error))
        if case.what == "largest":
            return {impl: self.guarded(partial(self._largest, model, case, impl)) for impl in impls}
        if case.what == "breakdown":
            from million_cli.bench.profile import breakdown_rows

            return breakdown_rows(self, model, case, impls)
        return self._speed(model, case, impls)

    def _speed(self, model: PreTrainedModel, case: Case, impls: list[str]) -> dict[str, Row]:
        steps = case.new_tokens or self.config.new_tokens
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(vocabulary, (case.batch, case.context), generator=generator).to(self.device)
        times = {impl: Times() for impl in impls}
        rows: dict[str, Row] = {}

        def round_of(impl: str) -> Row:
            runner = self.runner(model, case, impl, steps)
            measure_round(runner, case, ids, steps, self.device, times[impl])
            return runner.facts()

        for number in range(self.config.rounds):
            for impl in impls if number % 2 == 0 else reversed(impls):
                if rows.get(impl, {}).get("status") in ("oom", "error", "unavailable"):
                    continue
                if number and self._is_late():
                    continue
                found = self.guarded(partial(round_of, impl))
                rows[impl] = found if found["status"] != "ok" else {**found, **times[impl].row(case.batch)}
        return rows

    def _largest(self, model: PreTrainedModel, case: Case, impl: str) -> Row:
        """The largest batch that holds `context` tokens and can take a step; nothing is compiled for it."""
        facts: Row = {}

        def fits(batch: int) -> bool:
            one = Case(case.context, (impl,), case.model, batch, fill=True)
            found = self.guarded(lambda: attempt(one))
            if found["status"] not in ("ok", "oom"):
                raise RuntimeError(found["note"])
            if found["status"] == "ok":
                facts.update(found)
            return found["status"] == "ok"

        def attempt(one: Case) -> Row:
            runner = self.runner(model, one, impl, 2, compile="none")
            runner.fill(one.batch, one.context)
            runner.step()
            runner.step()
            return runner.facts()

        guess = 1
        if fits(1) and self.device.type == "cuda":
            # The memory of the codebooks is there already, so what a second sequence takes is known.
            free = torch.cuda.mem_get_info(self.device)[0]
            guess = max(1, int(free / float(facts["cache_bytes"] or 1)))
        most = 4096 if self.device.type == "cuda" else 4
        largest = largest_batch(fits, guess, most)  # the last one that fitted left its facts
        return {**facts, "largest_batch": largest, "batch": None}

    def runner(
        self, model: PreTrainedModel, case: Case, impl: str, steps: int, compile: Compile | None = None
    ) -> Runner:
        return make_runner(
            impl,
            model,
            case,
            steps,
            self.compile if compile is None else compile,
            self._codebook(model, impl),
        )

    def guarded(self, measure: Callable[[], Row]) -> Row:
        """What `measure` finds, or a row that says why there is nothing; memory is given back either way."""
        self.clear()
        before = 0
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            row: Row = {"status": "ok", **measure()}
        except Exception as error:
            row = failure(error)
        if self.device.type == "cuda" and row["status"] == "ok":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.clear()
        if self.device.type == "cuda" and torch.cuda.memory_allocated(self.device) - before > KEPT_BYTES:
            torch._dynamo.reset()  # compiled code may hold on to the cache that it was compiled with
            self.clear()
        return row

    def clear(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except RuntimeError:
                logger.warning("the GPU no longer answers")

    # -- what is measured ------------------------------------------------------------------------------------

    def _model(self, case: Case) -> PreTrainedModel:
        if self._loaded is None or self._loaded[0] != case.model:
            self._loaded, self._codebooks = None, {}
            torch._dynamo.reset()
            self.clear()
            self._loaded = case.model, self._load(case.model)
        return self._loaded[1]

    def _load(self, name: str | None) -> PreTrainedModel:
        if name is None:
            if self._own_model is None:
                raise UserError("bench.cases: a case without model")
            return self._own_model()
        auto = "float32" if self.device.type == "cpu" else "float16"
        path = conf_folder() / "model" / f"{name}.yaml"
        described: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {"path": name}
        if described.get("shape"):
            dtype = auto if self.config.dtype == "auto" else self.config.dtype
            return random_model(described["shape"], self.seed, dtype, self.device)
        trusted = bool(described.get("trust_remote_code", False))
        return load_model(described["path"] or name, self.config.dtype, self.device, trusted)[0]

    def _codebook(self, model: PreTrainedModel, impl: str) -> Codebook | None:
        bits = impl.partition("-")[2]
        if bits not in self._codebooks:
            print_ = fingerprint(model)
            specs = layer_codes(bits, len(print_.layers), print_.head_dim)
            if specs is None:
                return None
            self._codebooks = {
                bits: random_codebook(model, specs, self.seed)
            }  # one at a time: they are large
        return self._codebooks[bits]

    def row(self, case: Case, impl: str, measured: Row) -> Row:
        """What is known of a case, with what was measured."""
        on_gpu = self.device.type == "cuda"
        model = self._loaded[1] if self._loaded is not None else None
        row: Row = {
            "gpu": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "model": case.model,
            "what": case.what,
            "impl": impl,
            "dtype": str(model.dtype).removeprefix("torch.") if model is not None else None,
            "batch": case.batch,
            "context": case.context,
            "prompt": "random tokens in the cache" if case.fill or case.what == "largest" else "read",
            "new_tokens": case.new_tokens or self.config.new_tokens,
            "compile": "reduce-overhead" if impl == "transformers-static" else self.compile,
            "commit": git_commit(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "command": command(),
            **measured,
        }
        if impl.startswith("transformers-") and impl != "transformers-static":
            row["compile"] = "none"
        batch = row.get("largest_batch") or case.batch
        if row.get("cache_bytes") and model is not None:
            tokens = case.context + (2 if case.what == "largest" else int(row["new_tokens"] or 0)) + 2
            row["cache_ratio"] = float(row["cache_bytes"] or 0) / (
                dense_bytes(model, tokens) * int(batch or 1)
            )
        return row


def command() -> str:
    """The command line of this process."""
    program = "million" if Path(sys.argv[0]).stem != "e2e" else "python -m million_cli.bench.e2e"
    return shlex.join([*program.split(), *sys.argv[1:]])


def dense_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of 16-bit K and V of one sequence of `tokens` tokens, all layers."""
    config = model.config.get_text_config(decoder=True)
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * D * tokens


def failure(error: BaseException) -> Row:
    """The row of a case that gave no figures."""
    text = str(error).strip().splitlines()
    note = f"{type(error).__name__}: {text[0][:300] if text else ''}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return {"status": "oom", "note": note}
    if isinstance(error, ImportError):
        return {"status": "unavailable", "note": note}
    logger.warning("%s", note, exc_info=error)
    return {"status": "error", "note": note}


def table(rows: list[Row]) -> str:
    """The rows for people, with the time of a step beside those of transformers and the dense engine."""
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

        def ratio(impl: str, row: Row = row, beside: dict[Scalar, Row] = beside) -> str:
            theirs, ours = beside.get(impl, {}).get("tpot_ms"), row.get("tpot_ms")
            return f"{float(theirs) / float(ours):.2f}" if theirs and ours else ""

        def number(name: str, digits: int, scale: float = 1.0, row: Row = row) -> str:
            value = row.get(name)
            return "" if value in (None, "") else f"{float(value) / scale:.{digits}f}"

        what = f"largest {row['largest_batch']}" if row.get("largest_batch") is not None else row["status"]
        lines.append(
            f"{row['model'] or 'own':20} {row['context']:>8} {row['batch'] or '':>5}  {row['impl']:22} "
            f"{number('ttft_ms', 1):>9} {number('tpot_ms', 2):>8} {number('tokens_per_s', 0):>8} "
            f"{number('cache_bytes', 2, 1e9):>8} {ratio('transformers-static'):>7} {ratio('dense'):>7}  "
            f"{what}"
        )
    return "\n".join(lines)


def conf_folder() -> Path:
    """The folder of configuration groups, in a checkout or in the installed package."""
    folders = (CHECKOUT / "conf", Path(__file__).resolve().parent.parent / "conf")
    return next(folder for folder in folders if folder.is_dir())


def main(arguments: list[str]) -> int:
    """Run the benchmark without Hydra; see the module's head."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("python -m million_cli.bench.e2e OUT [key=value ...]")
    settings = yaml.safe_load((conf_folder() / "bench" / "e2e.yaml").read_text())
    device, seed = "cuda:0" if torch.cuda.is_available() else "cpu", 0
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key == "device":
            device = value
        elif key == "seed":
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
