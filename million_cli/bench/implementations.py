"""The implementations that benchmarks compare: our engine with each cache, and transformers' own caches.

An implementation is an object that makes a runner; `name` is for the record alone.  Only `IMPLEMENTATIONS`
turns a name into an implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from million_cli.bench.measure import Runner
from million_cli.bench.runners import WARM_STEPS, EngineRunner, StaticRunner
from million_cli.engine.dense import engine_cache
from million_cli.engine.engine import Compile, Engine
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.select import COMPILED, Kernels
from million_cli.pq.codebook import Codebook
from million_cli.spec import CodeSpec, PQSpec

WIDTHS = {4: (2, 2), 3: (2, 4), 2: (4, 4)}
"""Mean bits -> dimensions of a subspace of keys and of values, with 8-bit codes."""


@dataclass(frozen=True)
class Job:
    """The work of a runner: a prompt of `context` tokens and `new_tokens` steps after it.

    Attributes:
        codebook: set if `codes` of the implementation is not None.
    """

    model: PreTrainedModel
    context: int
    new_tokens: int
    compile: Compile
    codebook: Codebook | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and steps, warm-up included."""
        return self.context + self.new_tokens + WARM_STEPS


class Implementation(Protocol):
    """One way to serve a case.

    Attributes:
        ours: whether our engine runs the steps.
    """

    @property
    def name(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    def compiled(self, compile: Compile) -> str:
        """How its steps are compiled when the benchmark asks for `compile`."""
        ...

    def codes(self, layers: int, head_dim: int) -> list[PQSpec] | None:
        """The codes of each layer for a random codebook; None if it needs no codebook."""
        ...

    def runner(self, job: Job) -> Runner:
        """A runner for one job.

        Raises:
            ImportError: a package that the implementation needs is missing.
            UserError: it does not serve the model.
        """
        ...


class _Ours:
    """The common part of implementations by our engine."""

    ours: ClassVar[bool] = True

    def compiled(self, compile: Compile) -> str:
        return compile

    def codes(self, layers: int, head_dim: int) -> list[PQSpec] | None:
        return None


class _Theirs(_Ours):
    """The common part of transformers' caches: attention by sdpa, no compilation of the loop."""

    ours: ClassVar[bool] = False

    def compiled(self, compile: Compile) -> str:
        return "none"


@dataclass(frozen=True)
class PQ(_Ours):
    """Our engine with a PQ cache and random codebooks.

    Attributes:
        bits: mean bits of an element.
        mixed: bits differ by layer, as budgets allocate them: the last eighth of the layers has 8, the first
            quarter 2, the rest 4.
        kernels: the kernels that may serve the cache.
    """

    store: Literal["paged", "contiguous"]
    bits: int
    mixed: bool = False
    kernels: Kernels = COMPILED

    @property
    def name(self) -> str:
        return f"{self.store}-{self.bits}bit" + ("-mixed" if self.mixed else "")

    def codes(self, layers: int, head_dim: int) -> list[PQSpec]:
        widths = [WIDTHS[self.bits]] * layers
        if self.mixed:
            fine = layers // 8
            widths[: 2 * fine] = [(4, 4)] * (2 * fine)
            widths[layers - fine :] = [(1, 1)] * fine
        return [PQSpec(*(CodeSpec(head_dim, head_dim // dsub, 8) for dsub in pair)) for pair in widths]

    def runner(self, job: Job) -> Runner:
        assert job.codebook is not None
        cache_class = PagedPQCache if self.store == "paged" else DynamicPQCache
        return _engine_runner(job, cache_class(job.model, job.codebook, kernels=self.kernels))


@dataclass(frozen=True)
class Dense(_Ours):
    """Our engine with a dense cache."""

    name: ClassVar[str] = "dense"

    def runner(self, job: Job) -> Runner:
        return _engine_runner(job, engine_cache(job.model, job.length))


@dataclass(frozen=True)
class Given(_Ours):
    """Our engine with any cache.

    Attributes:
        make: makes an empty cache.
    """

    name: str
    make: Callable[[], Cache]

    def runner(self, job: Job) -> Runner:
        return _engine_runner(job, self.make())


@dataclass(frozen=True)
class Dynamic(_Theirs):
    """transformers' default cache in a plain loop."""

    name: ClassVar[str] = "transformers-dynamic"

    def runner(self, job: Job) -> Runner:
        job.model.set_attn_implementation("sdpa")
        return _engine_runner(job, DynamicCache(config=job.model.config))


@dataclass(frozen=True)
class Quantized(_Theirs):
    """transformers' quantized cache, 4 bits, in a plain loop."""

    backend: Literal["quanto", "hqq"]

    @property
    def name(self) -> str:
        return f"transformers-{self.backend}"

    def runner(self, job: Job) -> Runner:
        job.model.set_attn_implementation("sdpa")
        return _engine_runner(job, QuantizedCache(self.backend, job.model.config, nbits=4))


@dataclass(frozen=True)
class Static(_Theirs):
    """transformers' static cache with the forward that `generate` compiles for it."""

    name: ClassVar[str] = "transformers-static"

    def compiled(self, compile: Compile) -> str:
        return "reduce-overhead"

    def runner(self, job: Job) -> Runner:
        job.model.set_attn_implementation("sdpa")
        return StaticRunner(job.model, job.length)


def _engine_runner(job: Job, cache: Cache) -> EngineRunner:
    return EngineRunner(Engine(job.model, cache, compile=job.compile), job.new_tokens + WARM_STEPS)


DENSE, STATIC = Dense(), Static()
_ALL: tuple[Implementation, ...] = (
    DENSE,
    *(PQ("paged", bits) for bits in WIDTHS),
    PQ("contiguous", 4),
    PQ("paged", 4, mixed=True),
    Dynamic(),
    STATIC,
    Quantized("quanto"),
    Quantized("hqq"),
)
IMPLEMENTATIONS: dict[str, Implementation] = {implementation.name: implementation for implementation in _ALL}
