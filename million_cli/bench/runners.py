"""The loops that serve a case: our engine, and transformers' compiled static cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from million_cli.bench.fill import fill
from million_cli.bench.measure import Row
from million_cli.codecs import SimulatedCache
from million_cli.engine.dense import DenseCache, DenseSteps
from million_cli.engine.engine import Engine
from million_cli.engine.joined import part_projections
from million_cli.errors import UserError
from million_cli.hf.pq_cache import PQCache

WARM_STEPS = 4
"""Steps beyond those timed that a runner may take."""


class EngineRunner:
    """Our engine with any cache.

    Args:
        new_tokens: steps that will follow a prompt.
    """

    def __init__(self, engine: Engine, new_tokens: int) -> None:
        self.engine = engine
        self._new_tokens = new_tokens

    @property
    def cache(self) -> Any:
        return self.engine.cache

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

    def facts(self) -> Row:
        engine, cache = self.engine, self.cache
        _check_logits(engine.logits)
        facts: Row = {"detail": engine.mode}
        if isinstance(engine.steps, DenseSteps):
            facts["detail"] = f"{engine.mode}, sdpa {engine.steps.attention}, a graph a length"
        if isinstance(cache, PQCache):
            parts = cache.memory()
            facts["detail"] = f"{engine.mode}, {cache.backend}"
            facts["backend"] = str(cache.backend)
            facts["bits_nominal"] = cache.bits
            facts["cache_bytes"] = parts["total"]
            facts["code_bytes"] = parts["key_codes"] + parts["value_codes"]
            facts["window_bytes"] = parts["window"]
            facts["block_table_bytes"] = parts["block_table"]
            facts["pool_reserved_bytes"] = parts["pool_reserved"]
            facts["codebook_bytes"] = parts["codebooks"]
        elif isinstance(cache, DenseCache):
            facts["cache_bytes"] = cache.memory()["total"]
            facts["bits_nominal"] = 8 * cache.dtype.itemsize
        elif isinstance(cache, SimulatedCache):
            facts["bits_nominal"] = cache.bits  # its bytes mean nothing
        else:
            facts["cache_bytes"] = _bytes_of(cache)
        facts["note"] = "; ".join([*engine.notes, *map(str, getattr(cache, "fallbacks", ()))])
        return facts


class StaticRunner:
    """transformers' static cache with the forward that `generate` would compile for it.

    The loop does the least possible: positions and the next token stay on the device, and the compiled
    forward makes the mask, so none of `generate`'s own host time counts.  Each projection is a product of
    its own, as in transformers.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        part_projections(model)
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._config = CompileConfig(dynamic=False)
        self._logits: Tensor | None = None

    def prefill(self, ids: Tensor) -> None:
        with torch.no_grad():
            output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._logits = output.logits[:, -1]
        self._begin(self._logits.argmax(-1)[:, None], ids.shape[1])

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
        self._logits = output.logits[:, -1]
        self._token = self._logits.argmax(-1)[:, None]
        self._position = self._position + 1

    def reset(self) -> None:
        self.cache.reset()

    def facts(self) -> Row:
        _check_logits(self._logits)
        return {"cache_bytes": _bytes_of(self.cache), "detail": "reduce-overhead"}


def _check_logits(logits: Tensor | None) -> None:
    """Raise UserError if the newest logits hold NaN or infinity: times of such a decode are no result."""
    if logits is not None and not bool(logits.isfinite().all()):
        raise UserError(
            "the logits hold NaN or infinity, so nothing is timed; accepted are sound weights in a dtype "
            "that holds their activations"
        )


def _bytes_of(cache: Cache) -> int:
    """Bytes of all tensors that the layers of a cache hold, whatever their class."""
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
