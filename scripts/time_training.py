"""Time the training of a codebook on synthetic samples, and the memory it takes.

    python scripts/time_training.py                            # 32 layers, 8 KV heads of 128; on a GPU if any
    python scripts/time_training.py --layers 2 --device cpu

Samples lie in a folder, a layer a file, as `million sample` leaves them: the host's memory is as in earnest.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from million_cli.calibration.samples import FORMAT, Samples
from million_cli.files import write_safetensors
from million_cli.pq import Setup, train_codebook
from million_cli.progress import progress
from million_cli.recipe import Recipe
from million_cli.spec import ModelFingerprint


def write_samples(folder: Path, fingerprint: ModelFingerprint, n: int) -> None:
    """Normal vectors with axes of very different variance and offset, in float16, and squared gradients."""
    shape = (fingerprint.num_kv_heads, n, fingerprint.head_dim)
    shards = {}
    for layer in fingerprint.layers:
        generator = torch.Generator().manual_seed(layer)
        scale = torch.logspace(0, -1.5, fingerprint.head_dim)
        tensors = {
            side: (torch.randn(shape, generator=generator) * scale + 1).half() for side in ("keys", "values")
        }
        shards[str(layer)] = f"layer-{layer:03d}.0.safetensors"
        for side in ("key", "value"):
            tensors[f"{side}_squares"] = torch.randn(shape[:2], generator=generator).square()
        write_safetensors(folder / shards[str(layer)], tensors)
    manifest = {
        "format": FORMAT,
        "generation": 0,
        "fingerprint": fingerprint.to_dict(),
        "samples": n,
        "seed": 0,
        "seen": n,
        "shards": shards,
        "progress": {},
        "at_origin": False,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def peak_memory() -> float:
    """The most that this process held, in GiB; getrusage would count what started it, too."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 2**20


def main(
    layers: Annotated[int, typer.Option(min=1, help="full-attention layers")] = 32,
    heads: Annotated[int, typer.Option(min=1, help="KV heads")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="dimensions of a head")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="vectors a layer and head")] = 32_768,
    bits: Annotated[
        float, typer.Option(min=0, max=8, help="a budget over 8, 4, 2 and 1 bits; 0 trains 4 everywhere")
    ] = 4.0,
    iterations: Annotated[int, typer.Option(min=1, help="of k-means")] = 25,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print seconds, and the peaks of host and device memory, of training in the Fisher metric."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"--device {device}: accepted are cpu and, where torch finds a GPU, cuda")
    if head_dim % 8:
        raise typer.BadParameter(f"--head-dim {head_dim}: accepted are multiples of 8, the widest code")
    fingerprint = ModelFingerprint("llama", layers, tuple(range(layers)), heads, head_dim, "")
    recipe = Recipe.named("pq-4bit", f"quantizer.bits={bits or 'null'}", f"train.iterations={iterations}")
    root = torch.randn(layers, heads, head_dim, head_dim, dtype=torch.float64)
    information = root @ root.mT / head_dim
    with tempfile.TemporaryDirectory() as name, progress(1, "training", "k-means") as bar:
        write_samples(Path(name), fingerprint, samples)

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        gathered = Samples(Path(name))
        keys, values = gathered.sides()
        began = time.monotonic()
        codebook = train_codebook(
            keys,
            values,
            fingerprint,
            Setup(recipe, device=device),
            information=(information, information),
            squares=gathered.squares(),
            calibration="synthetic",
            calibration_sha256="",
            tokens=samples,
            progress=tick,
        )
        seconds = time.monotonic() - began
    host = peak_memory()
    on_device = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    typer.echo(
        f"{name}: {layers} layers x {heads} heads x {head_dim}, {codebook.bits_per_element:g} bits, "
        f"{samples} samples: {seconds:.1f} s, host {host:.2f} GiB, device {on_device:.2f} GiB"
    )


if __name__ == "__main__":
    typer.run(main)
