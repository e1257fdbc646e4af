"""Typer commands, nothing else: each turns its options into Hydra overrides and hands over.

Long because every command spells out its options, from which Typer makes its help.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from million_cli.errors import UserError
from million_cli.files import CANNOT_WRITE, reason
from million_cli.registry import BENCHES
from million_cli.signals import Stopped, stopping

# Numbers stay text here: the configuration's schema checks them and names the mistake.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
EPILOG = (
    "Everything else is a Hydra override (key=value, e.g. quantizer=pq-3bit cache.page_size=128) or a Hydra "
    "flag: --multirun runs every combination of comma-separated values, --cfg job prints the configuration."
)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="KV-cache product quantization: sample keys and values, train codebooks, measure the cost, decode.",
)

kernels = typer.Typer(help="The compiled CUDA kernels.")
app.add_typer(kernels, name="kernels")

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A name under conf/model (reference, smollm2, ...), a folder, a GGUF file or a hub name.",
        metavar="NAME|PATH",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="A text by name (wikitext2, ptb, ...), a file or a folder.", metavar="NAME|PATH"
    ),
]
Codebook = Annotated[str | None, typer.Option("--codebook", help="A trained codebook (default: train one).")]
Paged = Annotated[bool, typer.Option("--paged", help="Keep codes in pages (cache=paged).")]
PageSize = Annotated[
    str | None, typer.Option("--page-size", "--page_size", help="Tokens per page.", metavar="N")
]
ExtendedResidual = Annotated[
    str | None,
    typer.Option(
        "--extended-residual",
        "--extended_residual",
        help="Residual window, a multiple of the page size.",
        metavar="N",
    ),
]
MaxPages = Annotated[
    str | None, typer.Option("--max-pages", "--max_pages", help="Pages in the pool.", metavar="N")
]
Subspaces = Annotated[
    str | None, typer.Option("-M", help="Subspaces of keys and of values, in all layers.", metavar="N")
]
Nbits = Annotated[str | None, typer.Option("--nbits", help="Bits of a code, 1 to 16.", metavar="N")]
Half = Annotated[bool, typer.Option("--half", help="Run the model in float16.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:<number>.")]
Seed = Annotated[
    str | None,
    typer.Option("--seed", help="Seed of samples, training, prompts and random weights.", metavar="N"),
]
Strict = Annotated[bool, typer.Option("--strict", help="Make any fallback an error.")]
Out = Annotated[str | None, typer.Option("--out", help="Folder for results (default: outputs).")]


@app.callback(invoke_without_command=True)
def top(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from million_cli.results import version as installed

        print(f"million {installed('million')}")
        raise typer.Exit
    _help_without_command(ctx)


@kernels.callback(invoke_without_command=True)
def kernels_top(ctx: typer.Context) -> None:
    _help_without_command(ctx)


def _help_without_command(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit


@app.command(context_settings=PASS_ON, epilog=EPILOG)
def sample(
    ctx: typer.Context,
    model: Model = None,
    dataset: Dataset = None,
    half: Half = False,
    device: Device = None,
    seed: Seed = None,
    out: Out = None,
) -> None:
    """Read the calibration text and keep a sample of keys and values.

    An interrupted run continues where it stopped.

    Example: million sample --model /models/Llama-3.1-8B --dataset my.txt sample.tokens=200000
    """
    _run("sample", ctx, text="data")


@app.command("train-codebook", context_settings=PASS_ON, epilog=EPILOG)
def train_codebook(
    ctx: typer.Context,
    model: Model = None,
    dataset: Dataset = None,
    subspaces: Subspaces = None,
    nbits: Nbits = None,
    half: Half = False,
    device: Device = None,
    seed: Seed = None,
    out: Out = None,
) -> None:
    """Train codebooks from the sample; take the sample first if there is none.

    Example: million train-codebook --model /models/Llama-3.1-8B quantizer=pq-3bit
    """
    _run("train-codebook", ctx, text="data")


@app.command("eval", context_settings=PASS_ON, epilog=EPILOG)
def evaluate(
    ctx: typer.Context,
    model: Model = None,
    dataset: Dataset = None,
    codebook: Codebook = None,
    paged: Paged = False,
    page_size: PageSize = None,
    extended_residual: ExtendedResidual = None,
    max_pages: MaxPages = None,
    subspaces: Subspaces = None,
    nbits: Nbits = None,
    half: Half = False,
    device: Device = None,
    seed: Seed = None,
    strict: Strict = False,
    out: Out = None,
) -> None:
    """Measure the cost of quantization: perplexity and KL, recall, or LongBench.

    Without a codebook one is trained first.

    Examples: million eval --paged task=passkey; million eval --dataset wikitext2 quantizer=pq-2bit
    """
    _run("eval", ctx)


@app.command(context_settings=PASS_ON, epilog=EPILOG)
def bench(
    ctx: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            help="speed: one cache beside the dense one (default); kernel: attention alone; e2e: prompts and "
            "steps of several models and caches.",
            metavar="[speed|kernel|e2e]",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    codebook: Codebook = None,
    paged: Paged = False,
    page_size: PageSize = None,
    extended_residual: ExtendedResidual = None,
    max_pages: MaxPages = None,
    subspaces: Subspaces = None,
    nbits: Nbits = None,
    half: Half = False,
    device: Device = None,
    seed: Seed = None,
    strict: Strict = False,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Time by stage.")] = False,
    out: Out = None,
) -> None:
    """Time the first and the following tokens, beside the dense cache.

    Examples: million bench --paged --breakdown bench.context=4096; million bench kernel bench.heads=[32/8];
    million bench e2e bench.budget_s=400
    """
    if what is not None:  # an override unless it names a benchmark; Hydra's parser refuses anything else
        ctx.args.insert(0, f"bench={what}" if what in BENCHES.own else what)
    _run("bench", ctx)


@app.command(context_settings=PASS_ON, epilog=EPILOG)
def run(
    ctx: typer.Context,
    model: Model = None,
    dataset: Dataset = None,
    codebook: Codebook = None,
    paged: Paged = False,
    page_size: PageSize = None,
    extended_residual: ExtendedResidual = None,
    max_pages: MaxPages = None,
    subspaces: Subspaces = None,
    nbits: Nbits = None,
    half: Half = False,
    device: Device = None,
    seed: Seed = None,
    strict: Strict = False,
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Time by stage.")] = False,
    out: Out = None,
) -> None:
    """Chain stages (baseline, sample, train, evaluate, bench) in one job, or several with --multirun.

    Examples: million run experiment=demo --multirun cache=dense,contiguous,paged;
    million run stages=[sample,train,evaluate,bench] quantizer=pq-3bit
    """
    _run("run", ctx)


@app.command(context_settings=PASS_ON, epilog=EPILOG)
def generate(
    ctx: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue or, with --chat, to answer; - reads standard input."),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", help="Read the prompt from a file.", metavar="FILE")
    ] = None,
    model: Model = None,
    codebook: Codebook = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to generate, at most.", min=1)] = 64,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Apply the tokenizer's chat template (default: if there is one and the prompt is plain).",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 is greedy; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", "--top_p", help="Draw among the tokens that hold this probability.")
    ] = 1.0,
    draw_seed: Annotated[
        int, typer.Option("--seed", help="Of the drawn tokens; the codebook's is the override seed=.", min=0)
    ] = 0,
    paged: Paged = False,
    page_size: PageSize = None,
    extended_residual: ExtendedResidual = None,
    max_pages: MaxPages = None,
    subspaces: Subspaces = None,
    nbits: Nbits = None,
    half: Half = False,
    device: Device = None,
    strict: Strict = False,
    out: Out = None,
) -> None:
    """Continue a prompt, or answer it with an instruct model, with any cache.

    The model's own generation settings (penalties, temperature, ...) are named on stderr, not applied.

    Examples: million generate --paged "The history of the city begins";
    million generate --model /models/Llama-3.1-8B-Instruct --temperature 0.7 --top-p 0.9 "Who wrote Faust?"
    """
    from million_cli.hydra_app import compose
    from million_cli.pipelines.given import refuse_unread, take_from_codebook

    if prompt is not None and prompt_file is not None:  # then it is the first override
        ctx.args.insert(0, prompt)
        prompt = None
    arguments = _arguments(ctx)
    config = compose(arguments)
    refuse_unread(config, arguments)
    take_from_codebook(config, arguments)
    from million_cli.pipelines.generate import Generation
    from million_cli.pipelines.generate import generate as pipeline
    from million_cli.pipelines.prompt import read_prompt

    generation = Generation(tokens, chat, temperature, top_p, draw_seed)
    pipeline(config, read_prompt(prompt, prompt_file), generation)


@app.command(context_settings=PASS_ON, epilog="Overrides: report.run=all, report.page=false, out=FOLDER.")
def report(
    ctx: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="CSVs, or folders of them (default: the latest run under --out).", metavar="[CSV]..."
        ),
    ] = None,
    codebook: Annotated[
        list[str] | None, typer.Option("--codebook", help="A codebook, to show its errors (repeatable).")
    ] = None,
    out: Out = None,
) -> None:
    """Make one HTML page and PNG files of any result CSVs, under OUT/report.

    Figures: quality against bits, loss by position, recall, task scores, speed, time by stage, codebook
    errors; each with its table, command and commit.

    Example: million report results/ --codebook outputs/codebooks/mine.safetensors
    """
    from million_cli.hydra_app import compose
    from million_cli.pipelines.report import report as pipeline

    overrides = [word for word in files or [] if "=" in word and not Path(word).exists()]
    config = compose([*([f"out={quote(out)}"] if out else []), *overrides, *ctx.args])
    config.report.files = [word for word in files or [] if word not in overrides]
    config.report.codebooks = codebook or []
    pipeline(config)


@app.command()
def doctor() -> None:
    """Show installed versions, what works on this machine, and why the rest does not."""
    from million_cli.doctor import diagnose

    raise typer.Exit(diagnose())


@kernels.command("build")
def kernels_build(
    arch: Annotated[
        str | None, typer.Option("--arch", help="Compute capabilities, e.g. 80,90 (default: this machine's).")
    ] = None,
) -> None:
    """Compile the CUDA kernels ahead of their first use.

    Example: million kernels build --arch 90
    """
    from million_cli.ops.build import KernelsUnavailable, build, parse_architectures

    try:
        for library in build(parse_architectures(arch) if arch else None):
            print(library)
    except KernelsUnavailable as error:
        raise UserError(str(error)) from error


def main() -> NoReturn:
    """Entry point.

    Exit codes: 0; 1 for our mistake, with a traceback; 2 for the user's, in one line; 128 + the number of the
    signal that stopped the process, also of SIGPIPE when standard output is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal without the character still shows the rest
    try:
        with stopping():
            code = _invoke()
            if sys.stdout is not None:
                sys.stdout.flush()  # at exit, Python would report a full disk in several lines
        sys.exit(code)
    except UserError as error:
        message, code = str(error), 2
    except typer.BadParameter.__base__ as error:  # type: ignore[misc]  # click's UsageError, wherever it lives
        message, code = error.format_message(), 2
    except Stopped as error:
        message, code = "interrupted", error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        message, code = "interrupted", 130
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        message, code = reason(error), 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2
        _discard_stdout()
    with suppress(OSError):  # the terminal may be gone
        print(f"million: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _invoke() -> int:
    """Run the command line; gives its exit code.

    Not through Typer's own entry, which turns a closed pipe and an interruption into exit codes of its own.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("million", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def _discard_stdout() -> None:
    """Drop what standard output still buffers, so that Python does not fail once more at exit."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _run(verb: str, ctx: typer.Context, text: str = "task") -> None:
    from million_cli.hydra_app import run

    raise typer.Exit(run(verb, _arguments(ctx, text)))


def _arguments(ctx: typer.Context, text: str = "task") -> list[str]:
    """The command's options as overrides, before the user's own overrides (the last one wins)."""
    options = {name: value for name, value in ctx.params.items() if value is not None and value is not False}
    overrides: list[str] = []
    uniform = ["quantizer.bits=null"]  # the same codes in all layers, no budget
    for name, value in options.items():
        match name:
            case "model":
                overrides += model_overrides(value)
            case "dataset":
                overrides += dataset_overrides(value, text)
            case "paged":
                overrides.append("cache=paged")
            case "page_size" | "extended_residual" | "max_pages":
                overrides.append(f"cache.{name}={value}")
            case "subspaces":
                overrides += [f"quantizer.{side}.M={value}" for side in ("keys", "values")] + uniform
            case "nbits":
                overrides += [f"quantizer.{side}.nbits={value}" for side in ("keys", "values")] + uniform
            case "half":
                overrides.append("model.dtype=float16")
            case "breakdown":
                overrides.append("bench.breakdown=true")
            case "strict":
                overrides.append("strict=true")
            case "out" | "codebook" | "device":
                overrides.append(f"{name}={quote(value)}")
            case "seed":
                overrides.append(f"seed={value}")
    return [*overrides, *ctx.args]


def model_overrides(value: str) -> list[str]:
    from million_cli.conf import conf_folder

    if (conf_folder() / "model" / f"{value}.yaml").is_file():
        return [f"model={value}"]
    return ["model=folder", f"model.path={quote(value)}"]


def dataset_overrides(value: str, node: str) -> list[str]:
    from million_cli.text import DATASETS

    if value in DATASETS:
        return [f"{node}.dataset={value}"]
    return [f"{node}.path={quote(value)}"]


def quote(value: str) -> str:
    """Quote a value so that Hydra's override grammar reads it back unchanged."""
    # In quotes a backslash is literal, except before a quote; "${" would be an interpolation.
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f"'{value}'"
