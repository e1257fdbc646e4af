"""Where the time of a decode step goes, by stage, without slowing the step down.

Hooks on the model's modules and on the cache mark when one stage ends and the next begins; a stage is the
time between two marks, so the stages sum to the step by construction.  On a GPU a mark is an event on the
stream, read after the last step: nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

STAGES = (
    "embedding",
    "projections",
    "rope",
    "cache append",
    "attention",
    "output projection",
    "MLP",
    "head",
    "other",
)
"""In the order of a step; `other` is norms, residual sums, sampling and what the host does between."""

# Last part of a module's name -> its stage, and the stage that follows it.
MODULES = {
    "embed_tokens": ("embedding", "other"),
    "rotary_emb": ("rope", "other"),
    "q_proj": ("projections", "rope"),
    "k_proj": ("projections", "rope"),
    "v_proj": ("projections", "rope"),
    "qkv_proj": ("projections", "rope"),
    "o_proj": ("output projection", "other"),
    "mlp": ("MLP", "other"),
    "lm_head": ("head", "other"),
}


class StageClock:
    """A context manager; inside it, marks accumulate while the model runs with the cache."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.on_gpu = model.device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> StageClock:
        for name, module in self.model.named_modules():
            stages = MODULES.get(name.rpartition(".")[2])
            if stages is not None:
                self._hook(module, *stages)
        update = self.cache.update

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark("cache append")
            result = update(*args, **kwargs)
            self.mark("attention")
            return result

        self.cache.update = timed  # type: ignore[method-assign]
        self._undo.append(lambda: self.cache.__dict__.pop("update"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in self._undo:
            undo()

    def mark(self, stage: str) -> None:
        """From now on time belongs to `stage`."""
        assert stage in STAGES
        self._marks.append((stage, self._now()))

    def stop(self) -> None:
        """End the last stage."""
        self._marks.append(("", self._now()))

    def totals_ms(self) -> dict[str, float]:
        """Milliseconds of every stage since the first mark, in the order of `STAGES`."""
        if self.on_gpu:
            torch.cuda.synchronize(self.model.device)
        totals = dict.fromkeys(STAGES, 0.0)
        for (stage, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[stage] += start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
        return totals

    def _hook(self, module: nn.Module, during: str, after: str) -> None:
        before = module.register_forward_pre_hook(lambda *_: self.mark(during))
        behind = module.register_forward_hook(lambda *_: self.mark(after))
        self._undo += [before.remove, behind.remove]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        return event
