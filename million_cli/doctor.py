"""`million doctor`: installed versions, what works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator

from million_cli.errors import UserError
from million_cli.registry import BENCHES, CACHES, CODECS, TASKS
from million_cli.results import git_commit, version

PACKAGES = (
    "million",
    "torch",
    "transformers",
    "datasets",
    "hydra-core",
    "safetensors",
    "pandas",
    "matplotlib",
)

Line = tuple[str, str]


def diagnose() -> int:
    """Print the findings.  Returns 0 if the torch path works, else 1."""
    for lines in (_versions, _folders, names, _optional, _devices):
        for name, finding in lines():
            print(f"{name:<14}{finding}", flush=True)
    try:
        tokens = self_test()
    except Exception:
        traceback.print_exc()
        print(f"{'self-test':<14}FAILED: the torch path does not work")
        return 1
    print(f"{'self-test':<14}ok: sampled, trained, generated {tokens} tokens with a paged cache")
    return 0


def self_test() -> int:
    """Sample, train and generate with a random model of two layers on the CPU.

    Returns:
        The number of generated tokens.
    """
    import torch

    from million_cli import PagedPQCache
    from million_cli.calibration.sampling import SamplingCache, read_text
    from million_cli.hf.models import random_model
    from million_cli.pq import Setup, train_codebook
    from million_cli.recipe import Recipe
    from million_cli.spec import WindowSpec

    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = random_model({**shape, **heads})
    ids = torch.arange(96)[None] % 64
    cache = SamplingCache(model, samples=96)
    read_text(model, cache, ids)
    recipe = Recipe().override(
        "train.iterations=2", "quantizer.bits=null", "quantizer.keys.nbits=4", "quantizer.values.nbits=4"
    )
    codebook = train_codebook(
        *cache.samples(),
        cache.fingerprint,
        Setup(recipe),
        calibration="self-test",
        calibration_sha256="",
        tokens=96,
    )
    paged = PagedPQCache(model, codebook, WindowSpec(page_size=16, residual=32))
    output = model.generate(ids, past_key_values=paged, max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert paged.memory()["key_codes"] > 0
    return int(output.shape[1]) - ids.shape[1]


def _versions() -> Iterator[Line]:
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for package in PACKAGES:
        found = version(package)
        commit = f" ({git_commit()})" if package == "million" and git_commit() else ""
        yield package, found + commit


def _folders() -> Iterator[Line]:
    from million_cli.conf import conf_folder

    try:
        yield "conf", str(conf_folder())
    except UserError as error:
        yield "conf", f"missing: {error}"
    from million_cli.ops.build import KernelsUnavailable, source_folder

    try:
        yield "kernels", str(source_folder())
    except KernelsUnavailable as error:
        yield "kernels", f"missing: {error}"


def names() -> Iterator[Line]:
    """The names that configurations accept; names of other packages are followed by their package."""
    for what, registry in (("caches", CACHES), ("codecs", CODECS), ("tasks", TASKS), ("benchmarks", BENCHES)):
        origins = [(name, registry.package(name)) for name in registry.names]
        names = (name if package == "million" else f"{name} ({package})" for name, package in origins)
        yield what, ", ".join(names)


def _optional() -> Iterator[Line]:
    faiss = [name for name in ("faiss-cpu", "faiss-gpu") if version(name) != "not installed"]
    if len(faiss) == 2:
        yield "faiss", "faiss-cpu and faiss-gpu cannot be installed together: remove one"
    elif importlib.util.find_spec("faiss") is None:
        yield (
            "faiss",
            "not installed: train.trainer=faiss needs the extra `cpu` or `gpu`; torch trains without it",
        )
    else:
        yield "faiss", f"{faiss[0]} {version(faiss[0])}" if faiss else "found"
    compiler = shutil.which("g++")
    if importlib.util.find_spec("pykeops") is None:
        yield "pykeops", "not installed: the torch codec is used"
    elif compiler is None:
        yield "pykeops", f"{version('pykeops')}, unusable: it needs g++, which is not on PATH"
    else:
        yield "pykeops", version("pykeops")
    yield "g++", compiler or "not on PATH"


def _devices() -> Iterator[Line]:
    import torch

    from million_cli.ops.build import status

    yield "cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    kernels = status()
    yield "nvcc", kernels.compiler
    yield "cuda", kernels.devices
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        )
    yield (
        "compiled",
        kernels.library if kernels.ready else f"{kernels.library}; all caches use the torch path",
    )
