"""Composes a job's configuration, runs its pipeline and saves its record.

Every outcome of a job becomes its record, so one bad job does not stop a sweep, on any launcher.  Only an
interruption does: the job records it and raises it again.  The exit code follows from the records of the run.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
import traceback
import uuid
from argparse import ArgumentError
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from million_cli.conf import conf_folder
from million_cli.errors import UserError
from million_cli.files import CANNOT_WRITE, reason
from million_cli.pipelines.config import JobConfig, schema
from million_cli.pipelines.given import refuse_unread, take_from_codebook
from million_cli.registry import CODECS, TASKS
from million_cli.results import Provenance, Record, Status, check_destination, now, running
from million_cli.tables import read_results

VALUED_FLAGS = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i")
EXIT_CODES: dict[Status, int] = {"ok": 0, "failed": 1, "refused": 2, "interrupted": 130}


class Outcome(Callback):
    """A Hydra callback that keeps, in this process, the output folder of the run that has just ended."""

    out: Path | None = None

    def __init__(self, **_: Any) -> None: ...

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        type(self).out = Path(config.out)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        type(self).out = Path(config.out)


def run(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb's job or, with `--multirun`, its jobs.

    Args:
        verb: a name of `registry.VERBS`.
        arguments: Hydra overrides and flags in any order.

    Returns:
        The exit code: 0, 1 if a job failed by our mistake, 2 if one was refused by the user's.

    Raises:
        UserError: the configuration does not compose, or a folder cannot be written.
    """
    _register_schema(arguments)
    flags, overrides = split_arguments(arguments)
    command = shlex.join(["million", *sys.argv[1:]])
    run_id = f"{now().replace(':', '').replace('+0000', 'Z')}-{uuid.uuid4().hex[:6]}"
    task = partial(_job, verb, run_id, command)
    Outcome.out = None
    argv, sys.argv = sys.argv, ["million", *flags, *overrides]
    try:
        with _full_errors():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)()
    except Exception as error:
        _raise_as_user_error(error)
    finally:
        sys.argv = argv
    if Outcome.out is None:  # --cfg, --info and the like
        return 0
    return _finish(Outcome.out / "results.csv", run_id)


def compose(arguments: Sequence[str]) -> JobConfig:
    """Compose a configuration from overrides without a Hydra run: no folders, no logs, no sweep.

    Raises:
        UserError: it does not compose or a value is out of range.
    """
    _register_schema(arguments)
    flags, overrides = split_arguments(arguments)
    if flags:
        raise UserError(f"{flags[0]}: this command takes overrides only (key=value)")
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
            return to_job_config(hydra.compose("config", overrides))
    except Exception as error:
        _raise_as_user_error(error)


def to_job_config(config: DictConfig) -> JobConfig:
    """The typed configuration.

    Raises:
        UserError: a value is missing, of the wrong type or out of range.
    """
    try:
        # Merged once more, because Hydra lets `+key=value` past the schema.
        plain = OmegaConf.to_container(config)
        job = OmegaConf.to_object(OmegaConf.merge(schema(), plain))
    except Exception as error:
        _raise_as_user_error(error)
    assert isinstance(job, JobConfig)
    return job


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's flags (with their values) from overrides.

    Hydra's parser refuses overrides on both sides of a flag.

    Raises:
        UserError: a flag that Hydra does not know, or an argument that is no override.
    """
    from hydra._internal.utils import get_args_parser

    flags: list[str] = []
    overrides: list[str] = []
    stray: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flags.append(argument)
            if argument in VALUED_FLAGS:
                flags.extend(value for value in [next(rest, None)] if value is not None)
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        else:
            stray.append(argument)
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args([*flags, *overrides])
    except ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"no such option: {unknown[0]} (see --help)")
    if stray:
        raise UserError(
            f"unexpected argument {stray[0]!r}; accepted are options and overrides such as seed=1"
        )
    return flags, [part for override in overrides for part in harness_task(override)]


def harness_task(override: str) -> list[str]:
    """Expand `task=lm_eval/<name>` (also several, and `+task@also.x=`); return any other override unchanged.

    The harness has thousands of tasks, which have no files of their own under `conf/task`.

    Example: "task=lm_eval/gsm8k" -> ["task=lm_eval", "task.tasks=['gsm8k']"].

    Raises:
        UserError: tasks of the harness and others in one sweep.
    """
    match = re.fullmatch(r"(\+?task(?:@([\w.]+))?)=(.*lm_eval/.*)", override)
    if match is None:
        return [override]
    choice, node, values = match.groups()
    names = [value.partition("lm_eval/")[2] for value in values.split(",")]
    if not all(names):
        raise UserError(f"{override}: a sweep has either tasks of the harness (lm_eval/<name>) or others")
    return [f"{choice}=lm_eval", f"{node or 'task'}.tasks={','.join(f'[{name!r}]' for name in names)}"]


def _job(verb: str, run_id: str, command: str, config: DictConfig) -> None:
    """One Hydra job: run the verb and save a record for each of its results."""
    started, clock = now(), time.perf_counter()
    raw: Any = OmegaConf.to_container(config)
    out = Path(raw["out"])
    check_destination(out)
    running.set(command)

    def record(**fields: Any) -> Record:
        duration = time.perf_counter() - clock
        return Record(run=run_id, verb=verb, started=started, duration_s=duration, **fields)

    def save_failure(status: Status, message: str) -> None:
        record(status=status, provenance=Provenance.here(command), config=raw, error=message).save(out)

    try:
        from million_cli import pipelines

        job = to_job_config(config)
        hydra_config = HydraConfig.get()
        sweep = hydra_config.mode == RunMode.MULTIRUN
        overrides = list(hydra_config.overrides.task)
        refuse_unread(job, overrides, sweep)
        take_from_codebook(job, overrides)
        for result in pipelines.run(verb, job):
            record(
                status="ok",
                provenance=Provenance.here(command, result.device, result.dtype),
                config=result.config,
                metrics=result.metrics,
                fallbacks=result.fallbacks,
            ).save(out)
    except UserError as error:
        print(f"million: {error}", file=sys.stderr)
        save_failure("refused", str(error))
    except KeyboardInterrupt as error:
        save_failure("interrupted", f"interrupted by {str(error) or 'SIGINT'}")
        raise  # the rest of a sweep is not run
    except BrokenPipeError as error:
        save_failure("interrupted", reason(error))
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            print(f"million: {reason(error)}", file=sys.stderr)
            save_failure("refused", reason(error))
        else:
            traceback.print_exc()
            save_failure("failed", traceback.format_exc())


def _finish(table: Path, run_id: str) -> int:
    """Print the run's measurements and turn the statuses of its records into an exit code."""
    statuses = set()
    for place in (table, *sorted(table.parent.glob("results-*.csv"))):  # beside it: what it did not take
        try:
            rows = read_results(place)
        except UserError:
            continue
        rows = rows[rows["run"] == run_id]
        statuses |= set(rows["status"])
        if "ok" in set(rows["status"]):
            from million_cli.pipelines.report import show

            show(rows, place, plot=len(rows) > 1)  # one point makes no plot
    if not statuses:  # `Record.save` said where they are
        return EXIT_CODES["refused"]
    return next(
        (EXIT_CODES[status] for status in ("failed", "refused", "interrupted") if status in statuses), 0
    )


def _register_schema(arguments: Sequence[str]) -> None:
    """Tell Hydra the schema, and a choice of `task` or `quantizer` for each name that other packages add.

    A name that the arguments mention is imported: its choice has all settings with their defaults, so that
    overrides of them compose.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=schema())
    for group, registry in (("task", TASKS), ("quantizer", CODECS)):
        for name in registry.added:
            if name in registry.own:
                continue
            settings: dict[str, Any] = {}
            if any(name in argument for argument in arguments):
                config = OmegaConf.structured(registry.load(name).Config)
                settings = OmegaConf.to_container(config, throw_on_missing=False)  # type: ignore[assignment]
            node = {"name": name, "kind": name, "codec": settings}
            store.store(group=group, name=name, node={**settings, "name": name} if group == "task" else node)


class _full_errors:  # noqa: N801 - a context manager
    """Make Hydra raise its errors; by default it prints several lines and exits."""

    def __enter__(self) -> None:
        self.before = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = self.before


def _raise_as_user_error(error: Exception) -> NoReturn:
    """Raise errors of Hydra, OmegaConf and the file system as a `UserError`, all others unchanged."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        raise UserError(one_line(error)) from error
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        raise UserError(reason(error)) from error
    raise error


def one_line(error: BaseException) -> str:
    """A composition error as one line that names the value and the accepted ones."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={name}: accepted are {', '.join(sorted(error.options))}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        parent = cause.parent_node
        keys = sorted(map(str, parent)) if isinstance(parent, DictConfig) else []
        accepted = f"; accepted are {', '.join(keys)}" if keys else ""
        return f"unknown key {cause.full_key}{accepted}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause).splitlines()[0]
        text = reason if reason in text else f"{text}: {reason}"
        if cause.full_key and cause.full_key not in text:
            text = f"{cause.full_key}: {text}"
    return re.sub(r"\s+", " ", text)
