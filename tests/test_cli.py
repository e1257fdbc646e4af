"""The command line from end to end."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from small_job import SMALL_JOB

from million_cli import cli
from million_cli.cli import quote
from million_cli.hydra_app import compose, split_arguments
from million_cli.tables import read_results, records

torch.set_num_threads(1)

SMALL = [
    *SMALL_JOB,
    "task.dataset=synthetic",
    "task.seed=2",
]
SHORT = ["task.context=256", "task.max_tokens=512"]


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def million(monkeypatch, capfd, shared_out):
    """Run a command line in this process: (exit code, stdout, lines of stderr)."""

    def run(*arguments, out=shared_out):
        monkeypatch.setattr(sys, "argv", ["million", *arguments, *([f"out={out}"] if out else [])])
        monkeypatch.setenv("TQDM_DISABLE", "1")
        logging.getLogger().handlers.clear()  # an earlier run's write to a stream that pytest has closed
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        stdout, stderr = capfd.readouterr()
        return exit_.value.code or 0, stdout, stderr.splitlines()

    return run


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["--version"]])
def test_help_and_version_come_without_torch(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['million', *{arguments}]\n"
        "from million_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print([m for m in ('torch', 'transformers', 'hydra') if m in sys.modules])\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    assert "million" in result.stdout


def test_every_command_shows_an_example_or_its_meaning(million):
    for command in ("sample", "train-codebook", "eval", "bench", "run", "generate", "report"):
        code, stdout, _ = million(command, "--help", out=None)
        assert code == 0
        assert "Example" in stdout, command


def test_eval_with_own_options(million, shared_out):
    options = [
        "--paged",
        "--page_size",
        "16",
        "--extended-residual",
        "32",
        "-M",
        "8",
        "--seed",
        "3",
    ]
    code, stdout, _ = million("eval", *SMALL, *SHORT, *options)
    assert code == 0
    assert "KL e-3" in stdout
    row = records(read_results(shared_out / "results.csv"))[-1]
    assert row["status"] == "ok"
    assert row["verb"] == "eval"
    assert row["command"].startswith("million eval model=tiny-random data=synthetic")
    expected = {
        "config.cache.kind": "paged",
        "config.cache.page_size": "16",
        "config.cache.extended_residual": "32",
        "config.quantizer.keys.M": "8",
        "config.seed": "3",
        "bits_nominal": "0.75",
    }
    assert {name: row[name] for name in expected} == expected


def test_paged_passkey(million, shared_out):
    # As `million eval --paged task=passkey`, on a small model and text.
    recall = ["task=passkey", "task.lengths=[200]", "task.depths=[0.5]", "task.samples=2"]
    code, stdout, _ = million("eval", "--paged", *recall, *SMALL)
    assert code == 0
    row = records(read_results(shared_out / "results.csv"))[-1]
    assert (row["recall_n"], row["config.cache.kind"]) == ("2", "paged")
    assert "recall %" in stdout


def test_a_sweep_over_quantizers_gives_a_row_each(million, shared_out):
    sweep = ["--multirun", "quantizer=million-paper,pq-4bit,pq-2bit"]
    before = (
        len(records(read_results(shared_out / "results.csv"))) if (shared_out / "results.csv").exists() else 0
    )
    code, stdout, _ = million("run", *SMALL, *sweep, *SHORT)
    assert code == 0
    rows = records(read_results(shared_out / "results.csv"))[before:]
    assert [row["config.quantizer.name"] for row in rows] == ["million-paper", "pq-4bit", "pq-2bit"]
    assert len({row["run"] for row in rows}) == 1
    assert all(name in stdout for name in ("million-paper", "pq-4bit", "pq-2bit"))


def test_one_refused_job_does_not_stop_a_sweep(million, shared_out):
    code, stdout, stderr = million("eval", *SMALL, *SHORT, "--multirun", "cache.page_size=24,64")
    assert code == 2
    run = records(read_results(shared_out / "results.csv"))[-2:]
    assert [row["status"] for row in run] == ["refused", "ok"]
    assert run[0]["error"].startswith("page_size=24: accepted are multiples of 16")
    assert "million: page_size=24: accepted are multiples of 16 from 16 to 256" in stderr
    assert "page_size=24" in stdout


@pytest.mark.slow
def test_launchers_keep_records_too(million, tmp_path):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "--multirun", "cache=dense,paged"]
    assert million("eval", *SMALL, *SHORT, *launcher, out=tmp_path)[0] == 0
    assert sorted(row["config.cache.kind"] for row in records(read_results(tmp_path / "results.csv"))) == [
        "dense",
        "paged",
    ]


def test_sample_then_train_then_generate(million, shared_out, tmp_path):
    assert million("sample", *SMALL)[0] == 0
    assert million("train-codebook", *SMALL)[0] == 0
    rows = records(read_results(shared_out / "results.csv"))
    assert [row["verb"] for row in rows[-2:]] == ["sample", "train-codebook"]
    code, stdout, stderr = million("generate", "Some words to go on from", *SMALL, "--paged", "--tokens", "5")
    assert code == 0
    assert stdout.strip().startswith("Some words to go on from")
    assert stderr[-1].startswith("5 tokens, ")
    assert stderr[-1].endswith("(paged)")
    (tmp_path / "prompt.txt").write_text("Some words to go on from")
    again = million(
        "generate", "--prompt-file", str(tmp_path / "prompt.txt"), *SMALL, "--paged", "--tokens=5"
    )
    assert again[:2] == (0, stdout)


def test_report_shows_what_was_measured(million):
    read = [choice for choice in SMALL if choice.startswith(("model", "task"))]
    assert million("eval", *read, *SHORT, "cache=dense")[0] == 0
    code, stdout, _ = million("report", "report.page=false")
    assert code == 0
    assert "dense" in stdout


BAD = [
    (["eval", "task=chess"], "task=chess: accepted are "),
    (["eval", "quantizer=pq-9bit"], "quantizer=pq-9bit: accepted are dense, "),
    (["eval", "model=gpt"], "model=gpt: accepted are folder"),
    (["eval", "cache.size=3"], "unknown key cache.size; accepted are extended_residual"),
    (["eval", "+cache.size=3"], "unknown key cache.size; accepted are extended_residual"),
    (["eval", "+colour=3"], "unknown key colour; accepted are"),
    (["eval", "--page_size", "0"], "page_size=0: accepted are multiples of 16"),
    (["eval", "--page-size", "many"], "cache.page_size=many: Value 'many' of type 'str'"),
    (
        ["eval", "--extended_residual", "64"],
        "extended_residual=64: accepted are multiples of page_size=64 from 128",
    ),
    (["eval", "--max-pages", "0"], "cache.max_pages=0: accepted are integers from 1"),
    (["eval", "--pagesize", "3"], "no such option: --pagesize"),
    (["eval", "stray"], "unexpected argument 'stray'"),
    (["eval", "--model", "/no/such/folder"], "/no/such/folder: no such folder"),
    (["eval", *SMALL, "--dataset", "/no/such.txt"], "no such text file or folder: /no/such.txt"),
    (["eval", *SMALL, "--codebook", "/no/such"], "/no/such"),
    (["eval", *SMALL, "-M", "7"], "M=7 does not divide head_dim=32; accepted: [1, 2, 4, 8, 16, 32]"),
    (["eval", *SMALL[:6], "--nbits", "17"], "nbits=17: a code has 1 to 16 bits"),
    (["eval", *SMALL, "--device", "cuda:99"], "device=cuda:99: this machine has"),
    (["eval", *SMALL, "model.dtype=int3"], "dtype=int3: accepted are auto, float16"),
    (["eval", *SMALL, "task.context=4096"], "task.context=4096: accepted are 2 to 2048"),
    (
        ["eval", *SMALL, "task.max_chars=20", "task.context=64"],
        "has 20 tokens; accepted are at least task.context=64",
    ),
    (["run", "stages=[dance]"], "stages=dance: accepted are baseline, sample"),
    (["train-codebook", *SMALL, "train.trainer=magic"], "train.trainer=magic: accepted are torch, faiss"),
    (["bench", *SMALL, "bench.rounds=0"], "bench.rounds=0: accepted are integers from 1"),
    (["bench", "kernel", "bench.heads=[7/7]"], "bench.heads=7/7: accepted are some of 32/32, 32/8, 64/8"),
    (["bench", "kernel", "bench.replays=0"], "bench.replays=0: accepted are integers from 1"),
    (["bench", "kernel", "bench.batch=[8]", "bench.encode=false", "bench.context=[4096]"], "no case has all"),
    (["bench", "nonsense"], "unexpected argument 'nonsense'"),
    (["generate", "", *SMALL], "the prompt is empty"),
    (["generate", "word", *SMALL, "--tokens", "3000"], "4 + 3000; accepted are 2048"),
    (["generate", "--prompt-file", "/no/prompt"], "no such text file or folder: /no/prompt"),
    (["generate", "word", *SMALL, "--top-p", "0.5"], "top_p=0.5: accepted with a temperature above 0"),
    (["generate", "word", *SMALL, "--temperature", "-1"], "temperature=-1.0: accepted are 0 (greedy)"),
    (["generate", "word", *SMALL, "--chat"], "--chat: the tokenizer has no chat template"),
    (["report", "/no/results.csv"], "no results at /no/results.csv"),
    (["report", "--codebook", "/no/book"], "no such codebook: /no/book"),
    (["report", "report.run=some"], "report.run=some: accepted are latest, all"),
    (["eval", "seed=[1"], "no viable alternative at input '[1'"),
    (["kernels", "build", "--arch", "7"], "arch=7: accepted are 80"),
    (["dance"], "No such command 'dance'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[-50:] for a, _ in BAD])
def test_the_users_mistake_is_one_line_and_exit_code_2(million, arguments, message):
    code, _, stderr = million(*arguments, out=None if arguments[0] in ("dance", "kernels") else "OUT")
    assert code == 2
    mistakes = [line for line in stderr if line.startswith("million: ")]
    assert len(mistakes) == 1
    assert mistakes[0] == stderr[-1]
    assert message in mistakes[0]
    assert not any("Traceback" in line for line in stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bench_kernel_says_that_it_needs_a_gpu(million, tmp_path):
    code, _, stderr = million("bench", "kernel", out=tmp_path)
    assert code == 2
    assert stderr[-1].startswith("million: bench kernel needs a GPU and the compiled kernels: ")
    assert "CUDA" in stderr[-1]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(million, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, stderr = million("eval", *SMALL, out=tmp_path / "file")
    assert code == 2
    assert "cannot write" in stderr[-1]
    assert f"{tmp_path}/file" in stderr[-1]


def test_our_own_mistake_is_a_traceback_exit_code_1_and_a_record(million, tmp_path, monkeypatch):
    def broken(config):
        raise ZeroDivisionError("our mistake")

    monkeypatch.setattr("million_cli.pipelines.evaluate.run_evaluate", broken)
    code, _, stderr = million("eval", *SMALL, out=tmp_path / "o")
    assert code == 1
    assert any("Traceback" in line for line in stderr)
    (row,) = records(read_results(tmp_path / "o" / "results.csv"))
    assert row["status"] == "failed"
    assert "ZeroDivisionError: our mistake" in row["error"]
    assert row["config.model.name"] == "tiny-random"


def test_hydra_can_show_the_configuration(million):
    code, stdout, _ = million("eval", "--cfg", "job", "--half", "--strict", "quantizer=pq-3bit")
    assert code == 0
    assert "dtype: float16" in stdout
    assert "strict: true" in stdout
    assert "name: pq-3bit" in stdout


def test_doctor_says_that_the_torch_path_works(million):
    code, stdout, _ = million("doctor", out=None)
    assert code == 0
    found = {line.split()[0]: line for line in stdout.splitlines()}
    assert {
        "python",
        "torch",
        "conf",
        "kernels",
        "faiss",
        "pykeops",
        "g++",
        "nvcc",
        "cpu",
        "cuda",
        "compiled",
    } <= found.keys()
    assert "ok" in found["self-test"]


def test_doctor_fails_when_the_torch_path_does(million, monkeypatch):
    from million_cli import doctor

    monkeypatch.setattr(doctor, "self_test", lambda: 1 / 0)
    code, stdout, _ = million("doctor", out=None)
    assert code == 1
    assert "FAILED" in stdout


@pytest.mark.parametrize(
    ("arguments", "flags", "overrides"),
    [
        (["a=1", "--multirun", "b=2,3"], ["--multirun"], ["a=1", "b=2,3"]),
        (["--cfg", "job", "a=1"], ["--cfg", "job"], ["a=1"]),
        (["a=1", "-c", "job", "~task", "+b=2"], ["-c", "job"], ["a=1", "~task", "+b=2"]),
    ],
)
def test_flags_and_overrides_are_told_apart(arguments, flags, overrides):
    assert split_arguments(arguments) == (flags, overrides)


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "with space",
        "it's",
        "a,b",
        "a=b",
        "{x}",
        "[y]",
        "${z}x",
        "back\\slash",
        "trail\\",
        "\\'",
        "null",
        "1",
    ],
)
def test_quoted_values_reach_the_configuration_unchanged(value):
    assert compose([f"codebook={quote(value)}"]).codebook == value


@pytest.mark.parametrize(
    ("dataset", "key"),
    [("wikitext2", "dataset"), ("synthetic", "dataset"), ("my text.txt", "path"), ("/data/x", "path")],
)
def test_a_dataset_is_a_name_or_a_path(dataset, key):
    from million_cli.cli import dataset_overrides

    for node in ("task", "data"):
        config = compose(dataset_overrides(dataset, node))
        found = getattr(config, node)
        assert (found[key] if node == "task" else getattr(found, key)) == dataset


def test_a_model_is_a_name_or_a_path():
    from million_cli.cli import model_overrides

    assert compose(model_overrides("llama-2-7b")).model.path == "meta-llama/Llama-2-7b-hf"
    assert compose(model_overrides("some/model")).model.path == "some/model"
    assert compose(model_overrides("/models/x y")).model.path == "/models/x y"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["eval", "--paged", "cache=dense"],
            "cache=dense: cache=paged is given too; accepted is one of them",
        ),
        (["eval", "quantizer=fp8", "--nbits", "3"], "quantizer.keys.nbits=3: quantizer=fp8 is of kind fp8"),
        (["generate", "x", "cache=dense", "--max-pages", "9"], "cache.max_pages=9: cache=dense quantizes"),
        (["bench", "--half", "model.dtype=float32"], "model.dtype=float32: model.dtype=float16 is given too"),
    ],
)
def test_switches_that_contradict_each_other_are_refused(million, tmp_path, arguments, message):
    code, _, stderr = million(*arguments, "model=tiny-random", out=tmp_path)
    assert code == 2
    assert stderr[-1].startswith(f"million: {message}")


def test_a_row_is_labelled_by_its_codebook(million, tmp_path):
    assert million("train-codebook", *SMALL_JOB, "quantizer.name=pq-mine", out=tmp_path)[0] == 0
    (file,) = (tmp_path / "codebooks").glob("*.safetensors")
    task = [choice for choice in SMALL if choice.startswith(("model", "task"))]
    given = ["eval", *task, *SHORT, "--codebook", str(file)]
    assert million(*given, out=tmp_path)[0] == 0
    row = records(read_results(tmp_path / "results.csv"))[-1]
    assert (row["config.quantizer.name"], row["config.quantizer.keys.nbits"]) == ("pq-mine", "3")
    code, _, stderr = million(*given, "quantizer=pq-2bit", out=tmp_path)
    assert code == 2
    assert stderr[-1].startswith("million: quantizer=pq-2bit: codebook=")
    assert stderr[-1].endswith("was trained with quantizer=pq-mine")
