"""The ways in which `million bench e2e` serves a case: our engine with each cache, and transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache

from million_cli.bench.cases import Case, Runner
from million_cli.bench.fill import fill
from million_cli.engine.dense import DenseCache, DenseSteps
from million_cli.engine.engine import Compile, Engine
from million_cli.engine.joined import part_projections
from million_cli.hf.cache import DynamicPQCache, PagedPQCache, PQCache
from million_cli.hf.models import fingerprint
from million_cli.hf.select import COMPILED, Kernels
from million_cli.pq.codebook import Codebook, CodebookMeta, ProductQuantizer
from million_cli.pq.transform import Transform
from million_cli.spec import CodeSpec, PQSpec
from million_cli.tasks.base import Scalar

BITS = {"4bit": (2, 2), "3bit": (2, 4), "2bit": (4, 4)}
"""Dimensions of a subspace of keys and of values, 8-bit codes."""
MIXED = "4bit-mixed"
"""4 bits on average as budgets spend them: the last eighth of the layers has 8, the first quarter 2."""


def layer_codes(bits: str, layers: int, head_dim: int) -> list[PQSpec] | None:
    """Codes of each layer for a name of `BITS` or `MIXED`; None for another."""
    if bits == MIXED:
        fine = layers // 8
        both = [(4, 4)] * (2 * fine) + [(2, 2)] * (layers - 3 * fine) + [(1, 1)] * fine
    elif bits in BITS:
        both = [BITS[bits]] * layers
    else:
        return None
    return [PQSpec(*(CodeSpec(head_dim, head_dim // dsub, 8) for dsub in pair)) for pair in both]


def random_codebook(model: PreTrainedModel, specs: Sequence[PQSpec], seed: int) -> Codebook:
    """Random centroids and rotations, a layer and KV head: right for times and memory, useless otherwise.

    As in trained codebooks, keys and values have one each: queries and outputs pass through a matrix.
    """
    print_ = fingerprint(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    L, Hkv, D = len(print_.layers), print_.num_kv_heads, print_.head_dim

    def side(codes: tuple[CodeSpec, ...]) -> ProductQuantizer:
        options: dict[str, Any] = {"generator": generator, "device": model.device}
        centroids = tuple(torch.randn(Hkv, of.M, of.C, of.dsub, **options) for of in codes)
        rotation = torch.linalg.qr(torch.randn(L * Hkv, D, D, **options))[0].view(L, Hkv, D, D)
        return ProductQuantizer(codes, "head", centroids, Transform.rotation(rotation.contiguous()))

    meta = CodebookMeta(
        fingerprint=print_,
        calibration="none: random",
        calibration_sha256="",
        tokens=0,
        samples=0,
        seed=seed,
        trainer="random",
        seeding="none",
        iterations=0,
        key_rotation="random",
        value_rotation="random",
        key_metric="none",
        value_metric="none",
        key_error=[],
        value_error=[],
    )
    keys, values = (tuple(codes) for codes in zip(*((of.keys, of.values) for of in specs), strict=True))
    return Codebook(side(keys), side(values), meta)


class EngineRunner:
    """Our engine with a cache of ours, or transformers' forward with one of transformers'."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._new_tokens = 0

    @property
    def cache(self) -> Any:
        return self.engine.cache

    def expect(self, new_tokens: int) -> None:
        """Steps that a prompt will be followed by."""
        self._new_tokens = new_tokens

    def prefill(self, ids: Tensor) -> None:
        self.engine.prefill(ids, new_tokens=self._new_tokens)

    def fill(self, batch: int, length: int) -> None:
        fill(self.engine, batch, length, self._new_tokens)

    def warm(self, steps: int) -> None:
        self.engine.step()
        self.engine.capture(steps)
        self.engine.step()

    def step(self) -> None:
        self.engine.step()

    def reset(self) -> None:
        self.engine.reset()

    def facts(self) -> dict[str, Scalar]:
        engine, cache = self.engine, self.cache
        facts: dict[str, Scalar] = {"detail": engine.mode}
        if isinstance(engine.steps, DenseSteps):
            facts["detail"] = f"{engine.mode}, sdpa {engine.steps.attention}, a graph a length"
        if isinstance(cache, PQCache):
            parts = cache.memory()
            facts["detail"] = f"{engine.mode}, {cache.backend}"
            facts["cache_bytes"] = parts["total"]
            facts["code_bytes"] = parts["key_codes"] + parts["value_codes"]
            facts["window_bytes"] = parts["window"]
            facts["block_table_bytes"] = parts["block_table"]
            facts["pool_reserved_bytes"] = parts["pool_reserved"]
            facts["codebook_bytes"] = parts["codebooks"]
            facts["codebook"] = "random"
        elif isinstance(cache, DenseCache):
            facts["cache_bytes"] = cache.memory()["total"]
        else:
            facts["cache_bytes"] = _bytes_of(cache)
        facts["note"] = "; ".join([*engine.notes, *map(str, getattr(cache, "fallbacks", ()))])
        return facts


class StaticRunner:
    """transformers' static cache with the forward that `generate` would compile for it.

    The loop around it is the shortest there is: positions and the next token stay on the device, and the mask
    is made inside the compiled forward, so that nothing of `generate`'s own host time counts.  The model is
    as transformers has it, each projection a product of its own.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        part_projections(model)
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._config = CompileConfig(dynamic=False)

    def prefill(self, ids: Tensor) -> None:
        with torch.no_grad():
            logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self._begin(logits[:, -1].argmax(-1)[:, None], ids.shape[1])

    def fill(self, batch: int, length: int) -> None:
        config = self.model.config.get_text_config(decoder=True)
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        nothing = torch.zeros(
            batch, config.num_key_value_heads, 0, D, dtype=self.model.dtype, device=self.model.device
        )
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:
            layer.lazy_initialization(nothing, nothing)
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(length)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=self.model.device)
        self._begin(token, length)

    def _begin(self, token: Tensor, length: int) -> None:
        self._token = token
        self._position = torch.full_like(token, length)

    def warm(self, steps: int) -> None:
        for _ in range(4):  # compiled, warmed up, recorded, replayed
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        output = self.model.get_compiled_call(self._config)(
            input_ids=self._token,
            position_ids=self._position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._token = output.logits[:, -1].argmax(-1)[:, None]
        self._position = self._position + 1

    def reset(self) -> None:
        self.cache.reset()

    def facts(self) -> dict[str, Scalar]:
        return {"cache_bytes": _bytes_of(self.cache), "detail": "reduce-overhead"}


WARM_STEPS = 4
"""Steps beyond those timed that a runner may take."""


def make_runner(
    impl: str,
    model: PreTrainedModel,
    case: Case,
    new_tokens: int,
    compile: Compile,
    codebook: Codebook | None,
    kernels: Kernels = COMPILED,
) -> Runner:
    """A runner for one case.

    Args:
        codebook: for PQ caches.

    Raises:
        ImportError: a package that the implementation needs is missing.
    """
    total = case.context + new_tokens + WARM_STEPS
    if impl.startswith("transformers"):
        model.set_attn_implementation("sdpa")
    if impl == "transformers-static":
        return StaticRunner(model, total)
    cache: Cache
    if impl == "transformers-dynamic":
        cache = DynamicCache(config=model.config)
    elif impl.startswith("transformers-"):
        cache = QuantizedCache(impl.removeprefix("transformers-"), model.config, nbits=4)
    elif impl == "dense":
        cache = DenseCache(model, total)
    else:
        assert codebook is not None
        store = PagedPQCache if impl.startswith("paged") else DynamicPQCache
        cache = store(model, codebook, kernels=kernels)
    runner = EngineRunner(Engine(model, cache, compile=compile))
    runner.expect(new_tokens + WARM_STEPS)
    return runner


def _bytes_of(cache: Cache) -> int:
    """Bytes of all tensors that the layers of a cache hold, of whatever class they are."""
    found = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in _tensors(value):
                found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            return [value]
        return [t for name in inner()[0] for t in _tensors(getattr(value, name))]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    return []
