"""The spans of decode steps on a GPU: the kernels that a profiler records, each with its stage.

A kernel's name does not tell its stage: all products by weights have the same names, and compiled steps fuse
other kernels.  The order tells it: in each layer the projections come before attention, the output projection
is the first product after it, and the MLP's products follow.  Names tell only the kind of a kernel: product,
attention, append and so on (`KINDS`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from million_cli.bench.spans import Span

KINDS: Mapping[str, str] = {
    "skip": r"splitk_?reduce|splitKreduce|reduce_kernel.*splitk",
    "encode": r"encode_kernel|grid_kernel",
    "append": r"append_kernel|index_copy|indexcopy|index_put",
    "rotation": r"rotat(e|ion)_kernel|rotate_",
    "merge": r"merge_kernel|splitkv_combine|flash.*combine",
    "attention": r"mma_decode|lookup_decode|flash_fwd|flash_attn|fmha|sdpa|attention",
    "sampling": r"argmax|arg_max|ArgMax|exponential|softmax",
    "embedding": r"embedding|vectorized_gather|indexSelect|gather_kernel",
    "product": r"gemm|gemv|cutlass|xmma|cublas|nvjet|s16816|triton_tem|splitk|matmul|"
    r"triton_(red|per)_fused.*_mm(_|$)",
}
"""Kind -> what a kernel's name must match, tried in this order; any other kernel is `small`.

`skip` is the second half of a product and counts with the kernel before it.
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel as a profiler recorded it, in microseconds."""

    name: str
    start_us: float
    duration_us: float


def kind_of(name: str) -> str:
    """The kind of a kernel, a key of `KINDS` or `small`."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "small"


def stages_of(kinds: Sequence[str]) -> list[str]:
    """The stage of each kernel of one whole step, given the kinds in order.

    Between the attention of two layers there are an output projection, an MLP and the next layer's
    projections.  After the last attention there is the head, one product, instead of projections.  The
    difference tells how many projections there are.  Other products before the first layer's projections are
    `rope` (positions times frequencies).
    """
    products = [i for i, kind in enumerate(kinds) if kind == "product"]
    attentions = [i for i, kind in enumerate(kinds) if kind == "attention"]
    if not attentions or not products:
        return ["embedding" if kind == "embedding" else "norms" for kind in kinds]
    # A step of several attention launches a layer (a split one) has them in a row, without products between.
    firsts = [
        at for n, at in enumerate(attentions) if not n or any(attentions[n - 1] < p < at for p in products)
    ]
    ends = [*firsts[1:], len(kinds)]
    inside = [[p for p in products if first < p < end] for first, end in zip(firsts, ends, strict=True)]
    ahead = [p for p in products if p < firsts[0]]
    projections = len(inside[0]) - (len(inside[-1]) - 1) if len(firsts) > 1 else len(ahead)
    stage_of_product: dict[int, str] = {}
    for place, p in enumerate(ahead):
        stage_of_product[p] = "projections" if place >= len(ahead) - projections else "rope"
    for n, of_layer in enumerate(inside):
        last = n + 1 == len(firsts)
        tail = 1 if last else projections
        for place, p in enumerate(of_layer):
            if place == 0:
                stage_of_product[p] = "output projection"
            elif place >= len(of_layer) - tail:
                stage_of_product[p] = "head" if last else "projections"
            else:
                stage_of_product[p] = "MLP"
    stages: list[str] = []
    before, attended = "embedding", False  # the latest product's stage, and whether attention came after it
    for i, kind in enumerate(kinds):
        if kind == "product":
            before, attended = stage_of_product[i], False
            stages.append(before)
        elif kind == "attention":
            attended = True
            stages.append("attention")
        elif kind == "skip":
            stages.append(stages[-1] if stages else "norms")
        elif kind == "append" and not attended and before == "projections":
            stages.append("append")
        elif kind in ("encode", "rotation", "merge"):
            stages.append({"encode": "flush/encode"}.get(kind, kind))
        elif before == "embedding":
            stages.append("embedding" if kind == "embedding" else "norms")
        elif before in ("projections", "rope"):
            stages.append("merge" if attended else "rope")
        elif before == "output projection":
            stages.append("norms")
        elif before == "MLP":
            following = next((stage_of_product[p] for p in products if p > i), "head")
            stages.append("MLP" if following == "MLP" else "norms")
        else:
            stages.append("sampling")
    return stages


def split_steps(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """Cut a record of kernels into steps of equally many, the same launches each time.

    Args:
        kernels: of `count` steps, in any order.

    Raises:
        ValueError: the kernels are not whole steps, so the profiler has lost some.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.start_us)
    if not ordered or len(ordered) % count:
        raise ValueError(f"{len(ordered)} kernels recorded over {count} steps")
    size = len(ordered) // count
    steps = [ordered[i * size : (i + 1) * size] for i in range(count)]
    if any(kind_of(a.name) != kind_of(b.name) for step in steps for a, b in zip(steps[0], step, strict=True)):
        raise ValueError("the kernels of the steps differ")
    return steps


def staged(steps: Sequence[Sequence[Kernel]]) -> list[list[Span]]:
    """The spans of whole steps."""
    return [
        [
            Span(stage, kernel.name, kernel.start_us, kernel.duration_us)
            for kernel, stage in zip(step, stages_of([kind_of(k.name) for k in step]), strict=True)
        ]
        for step in steps
    ]


def kernel_spans(step: Callable[[], object], steps: int, device: torch.device) -> list[list[Span]]:
    """The spans of successive steps, replayed on a GPU.

    Raises:
        ValueError: the profiler has lost kernels.
    """
    return staged(split_steps(profile(step, steps, device), steps))


def profile(step: Callable[[], object], steps: int, device: torch.device) -> list[Kernel]:
    """The kernels of `steps` steps, without copies from the host: those bring the ids of new pages."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    kernels = [event for event in record.events() if event.device_type == DeviceType.CUDA]
    return [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in kernels
        if not event.name.startswith(("Memcpy HtoD", "Context", "Stream"))
    ]
