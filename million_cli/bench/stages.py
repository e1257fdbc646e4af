"""Which stage of a decode step each kernel belongs to, from the kernels' order alone.

Kernels that multiply by weights have the same names wherever they are used, and compiled steps fuse the rest,
so a name says little.  The order says it: in each layer projections come before attention, the output
projection is the first product after it, the MLP's follow.  Names tell only products, attention, append and
the like; which name is which is data (`KINDS`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

STAGES = (
    "embedding",
    "projections",
    "rope",
    "rotation",
    "append",
    "flush/encode",
    "attention kernel",
    "merge",
    "output projection",
    "MLP",
    "norms",
    "head",
    "sampling",
    "host gap",
)
"""In the order of a step.  `host gap` is when nothing runs."""

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

`skip` is the second half of a product and counts with what came before it.
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

    From one layer's attention to the next one's there are its output projection, its MLP and the next one's
    projections; behind the last one the head takes the place of the projections, and is one product.  The
    difference tells how many projections there are.  What else is multiplied ahead of the first layer's is
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
            stages.append("attention kernel")
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


class Share(NamedTuple):
    """What a kernel takes of a step, as the mean over steps."""

    stage: str
    kernel: str
    launches: float
    us: float


def shares(steps: Sequence[Sequence[Kernel]]) -> list[Share]:
    """Where the time of a step goes, by stage and kernel, in the order of `STAGES`, longest first.

    Args:
        steps: the kernels of successive steps, each from its first kernel on, plus one more step (or just its
            first kernel) that ends the last.

    Returns:
        Rows whose sum is the mean time from one step's first kernel to the next's, exactly: where kernels
        overlap the later one counts from the end of the earlier.  The time when nothing runs has no kernel.
    """
    assert len(steps) >= 2
    totals: dict[tuple[str, str], float] = {("host gap", ""): 0.0}
    launches: Counter[tuple[str, str]] = Counter()
    for step, following in pairwise(steps):
        end = following[0].start_us
        clock = step[0].start_us
        for kernel, stage in zip(step, stages_of([kind_of(k.name) for k in step]), strict=True):
            totals["host gap", ""] += max(0.0, kernel.start_us - clock)
            begin = max(clock, kernel.start_us)
            clock = max(clock, min(kernel.start_us + kernel.duration_us, end))
            key = stage, kernel.name
            launches[key] += 1
            totals[key] = totals.get(key, 0.0) + max(0.0, clock - begin)
        totals["host gap", ""] += max(0.0, end - clock)
    count = len(steps) - 1
    rows = [Share(*key, launches[key] / count, total / count) for key, total in totals.items()]
    return sorted(rows, key=lambda row: (STAGES.index(row.stage), -row.us))


def breakdown(rows: Sequence[Share]) -> dict[str, float]:
    """Microseconds of each stage of a step, every name in `STAGES`."""
    return {stage: sum(row.us for row in rows if row.stage == stage) for stage in STAGES}


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
