"""`million bench`: one cache beside the dense one, both under the decode engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from million_cli.bench.cases import AUTO, Case, resolve_compile
from million_cli.bench.comparison import Comparison
from million_cli.bench.guard import clear
from million_cli.bench.implementations import DENSE, Implementation
from million_cli.bench.measure import Row
from million_cli.bench.models import dense_elements
from million_cli.bench.stages import Share
from million_cli.errors import UserError
from million_cli.progress import progress
from million_cli.tasks.base import check_context

MEMORY = (
    "backend", "bits_nominal", "cache_bytes", "code_bytes", "window_bytes", "block_table_bytes",
    "pool_reserved_bytes", "codebook_bytes",
)  # fmt: skip


@dataclass
class Config:
    """The settings of `million bench`.

    Attributes:
        context: tokens of the prompt.
        new_tokens: decode steps timed in each round.
        batch: sequences at once.
        rounds: measurements of both caches; every round reverses the order.
        compile: how the engine's steps are compiled, as for `million bench e2e`.
        breakdown: also time a step by stage.
    """

    name: str = "speed"
    context: int = 1024
    new_tokens: int = 64
    batch: int = 1
    rounds: int = 3
    compile: str = AUTO
    breakdown: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "new_tokens", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)}: accepted are integers from 1")


@dataclass(frozen=True)
class Measured:
    """Columns of the record, and how a step is divided, by implementation (empty without `breakdown`)."""

    metrics: Row
    stages: Mapping[str, Sequence[Share]]


def measure(model: PreTrainedModel, cache: Implementation, config: Config, seed: int) -> Measured:
    """Times of a cache and of the dense one, on the same random tokens.

    Returns:
        ttft_ms (median over rounds), tpot_ms and tpot_p90_ms (median and 90th percentile of all steps), the
        same with `_dense_ms`, tpot_ratio (dense / cache; above 1 is faster than dense), tokens_per_s, and the
        bytes of the caches after the last step; cache_ratio is of dense K and V in 16 bits.

    Raises:
        UserError: context and new tokens are more than the model takes, or an unknown `compile`.
    """
    check_context("bench.context+new_tokens", config.context + config.new_tokens, model)
    impls = tuple({impl.name: impl for impl in (DENSE, cache)}.values())
    case = Case(config.context, impls, batch=config.batch)
    runs = len(impls) * (config.rounds + config.breakdown)
    with progress(runs, "timing", "run") as bar:

        def guard(case: Case, impl: Implementation, run: Callable[[], Row]) -> Row:
            clear(model.device)
            row: Row = {"status": "ok", **run()}
            bar.update()
            return row

        compile = resolve_compile(config.compile, model.device)
        comparison = Comparison(model, config.new_tokens, config.rounds, compile, seed, guard)
        rows = comparison.speed(case)
        stages = comparison.stages(case)[1] if config.breakdown else {}
    ours, dense = rows[cache.name], rows[DENSE.name]
    times: Row = {}
    for name in ("ttft", "tpot", "tpot_p90"):
        times[f"{name}_ms"], times[f"{name}_dense_ms"] = ours[f"{name}_ms"], dense[f"{name}_ms"]
    tokens = config.batch * (config.context + config.new_tokens + 2)  # two steps warm up
    memory: Row = {name: ours[name] for name in MEMORY if ours.get(name) is not None}
    memory |= {"cache_tokens": tokens, "dense_bytes": dense["cache_bytes"]}
    if "cache_bytes" in memory:
        memory["cache_ratio"] = float(ours["cache_bytes"] or 0) / (2 * dense_elements(model.config, tokens))
    return Measured(
        {
            "context": config.context,
            "batch": config.batch,
            **times,
            "tpot_ratio": float(dense["tpot_ms"] or 0) / float(ours["tpot_ms"] or 1),
            "tokens_per_s": ours["tokens_per_s"],
            "engine": ours["detail"],
            **memory,
        },
        stages,
    )
