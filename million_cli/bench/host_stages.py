"""The spans of decode steps on a CPU, from the times of calls to modules and to the cache.

Hooks on the model's modules mark the start of a span.  A stand-in for the cache marks its `update`: the time
inside is `append` (encoding included), the time from there to the output projection is `attention`.  Where
the attention operation itself appends, as in the dense engine, `attention` includes the append.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from million_cli.bench.spans import Span
from million_cli.hf.models import attention_modules

MODULES = {
    "embed_tokens": ("embedding", "norms"),
    "rotary_emb": ("rope", "norms"),
    "q_proj": ("projections", "rope"),
    "k_proj": ("projections", "rope"),
    "v_proj": ("projections", "rope"),
    "qkv_proj": ("projections", "rope"),
    "o_proj": ("output projection", "norms"),
    "mlp": ("MLP", "norms"),
    "lm_head": ("head", "sampling"),
}
"""Last part of a module's name -> the stage of its call, and of what follows it."""


class StageClock:
    """A context manager; inside it, the spans of every step of the model are added to `steps`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.steps: list[list[Span]] = []
        self._open: tuple[str, str, float] | None = None
        self._undo = ExitStack()

    def __enter__(self) -> StageClock:
        for name, module in self.model.named_modules():
            last = name.rpartition(".")[2]
            if last in MODULES:
                self._hook(module, last, *MODULES[last])
        for _, module in attention_modules(self.model):
            hook = module.register_forward_pre_hook(self._stand_in, with_kwargs=True)
            self._undo.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def step(self, step: Callable[[], object]) -> None:
        """Run a step; time before the embedding belongs to no span."""
        self.steps.append([])
        step()
        self._close()

    def mark(self, stage: str, name: str) -> None:
        """Time from now on belongs to `stage`."""
        self._close()
        self._open = stage, name, 1e6 * time.perf_counter()

    def _close(self) -> None:
        if self._open is not None:
            stage, name, start_us = self._open
            self.steps[-1].append(Span(stage, name, start_us, 1e6 * time.perf_counter() - start_us))
        self._open = None

    def _hook(self, module: nn.Module, name: str, during: str, after: str) -> None:
        before = module.register_forward_pre_hook(lambda *_: self.mark(during, name))
        behind = module.register_forward_hook(lambda *_: self.mark(after, f"after {name}"))
        self._undo.callback(before.remove)
        self._undo.callback(behind.remove)

    def _stand_in(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {k: MarkedCache(v, self) if isinstance(v, Cache) else v for k, v in kwargs.items()}


class MarkedCache:
    """Stands for a cache in an attention layer, and marks its `update`."""

    def __init__(self, cache: Cache, clock: StageClock) -> None:
        self._cache, self._clock = cache, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._clock.mark("append", "cache update")
        result = self._cache.update(*args, **kwargs)
        self._clock.mark("attention", "attention")
        return result


def host_spans(step: Callable[[], object], steps: int, model: PreTrainedModel) -> list[list[Span]]:
    """The spans of successive steps of a model that is not compiled."""
    with StageClock(model) as clock:
        for _ in range(steps):
            clock.step(step)
    return clock.steps
