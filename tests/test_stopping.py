"""Signals, closed pipes, full disks and narrow terminals: one line, the right exit code, and a row."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_job import SMALL_JOB

from million_cli import cli
from million_cli.files import reason
from million_cli.signals import STOPPING, Stopped, stopping
from million_cli.tables import read_results, records

FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A test run that a shell put into the background inherits an ignored SIGINT."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_million(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`million` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "million_cli", *arguments],
        text=True,
        timeout=60,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture
def stopped_job(monkeypatch, capfd, tmp_path):
    """Run a job whose work is `body`: (exit code, its rows, stderr)."""

    def run(body):
        monkeypatch.setattr("million_cli.pipelines.evaluate.run_evaluate", body)
        monkeypatch.setattr(
            sys, "argv", ["million", "eval", *SMALL_JOB, f"out={tmp_path}", "--multirun", "seed=1,2"]
        )
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return (
            exit_.value.code,
            records(read_results(tmp_path / "results.csv")),
            capfd.readouterr().err.splitlines(),
        )

    return run


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_job_leaves_a_row_and_the_rest_of_the_sweep_is_not_run(stopped_job, number, code):
    def stop(config):
        for _ in range(2):  # a terminal that closes sends HUP twice
            os.kill(os.getpid(), number)
        time.sleep(60)

    before = [signal.getsignal(each) for each in STOPPING]
    exit_code, rows, stderr = stopped_job(stop)
    assert exit_code == code
    assert [row["status"] for row in rows] == ["interrupted"]
    assert rows[0]["error"] == f"interrupted by {number.name}"
    assert rows[0]["config.seed"] == "1"
    assert stderr[-1] == "million: interrupted"
    assert not any("Traceback" in line for line in stderr)
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_the_process_reports_the_signal_that_stopped_it():
    code = (
        "import time; from million_cli import cli\n"
        "cli.app.command('wait')(lambda: (print('ready', flush=True), time.sleep(60)))\n"
        "cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=50)
    assert (process.returncode, stderr) == (143, "million: interrupted\n")


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopped_is_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught, stopping():
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(caught.value, Stopped)
    assert (str(caught.value), caught.value.exit_code) == ("SIGTERM", 143)


def test_a_full_disk_in_a_job_is_one_line_and_a_row(stopped_job):
    def full(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    exit_code, rows, stderr = stopped_job(full)
    assert exit_code == 2
    assert [(row["status"], row["error"]) for row in rows] == [
        ("refused", "cannot write: No space left on device")
    ] * 2
    assert [line for line in stderr if line.startswith("million: ")] == [
        "million: cannot write: No space left on device"
    ] * 2


def test_a_pipe_closed_during_a_sweep_leaves_a_row_each(stopped_job):
    def closed(config):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    exit_code, rows, stderr = stopped_job(closed)
    assert exit_code == 141
    assert [row["status"] for row in rows] == ["interrupted"] * 2
    assert stderr[-1] == "million: standard output was closed before everything was printed"


@needs_dev_full
def test_standard_output_on_a_full_disk_is_one_line():
    with FULL.open("w") as full:
        result = run_million("--help", stdout=full)
    assert (result.returncode, result.stderr) == (2, "million: cannot write: No space left on device\n")


def test_a_closed_pipe_is_one_line():
    read, write = os.pipe()
    os.close(read)
    result = run_million("--version", stdout=write)
    os.close(write)
    assert result.returncode == 141
    assert result.stderr == "million: standard output was closed before everything was printed\n"


def test_a_closed_standard_output_is_no_error():
    command = f"{sys.executable} -m million_cli --version >&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_terminal_without_the_character_shows_the_rest():
    code = "from million_cli import cli; cli.app.command('say')(lambda: print('a \\u2192 b')); cli.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "say"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (0, b"a \\u2192 b\n")


@pytest.mark.parametrize("arguments", [[], ["kernels"]])
def test_without_a_command_the_help_is_shown(arguments):
    result = run_million(*arguments, stdout=subprocess.PIPE)
    assert result.returncode == 0
    assert "Usage: million" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "cannot write /a: No space left on device"),
        (OSError("odd"), "cannot write: odd"),
        (OSError(), "cannot write: OSError"),
    ],
)
def test_reasons_never_say_none(error, line):
    assert reason(error) == line
