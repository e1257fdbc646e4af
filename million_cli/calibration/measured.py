"""The divergence that coding one side of one layer causes, measured on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from million_cli.calibration.windows import batches
from million_cli.codecs.simulated import SimulatedCache
from million_cli.hf.models import fingerprint
from million_cli.pq import LayerPQ, decode, encode
from million_cli.pq.rebase import Rebase
from million_cli.progress import progress
from million_cli.spec import WindowSpec
from million_cli.tasks.perplexity import Comparison, read_at_once


class Measure:
    """Measures the KL divergence from the dense model when one side of one layer is coded.

    Calling it with a side ("keys" or "values"), the position of a full-attention layer and a quantizer gives
    the mean over all predictions, in nats, when these vectors alone are coded behind the window.

    Args:
        model: to measure.
        windows: gives the windows to read, `[T]` each, when the first measurement needs them.
        window: of the cache that is simulated.
        batch: windows at once.
        shown: whether a progress bar is.
        rebases: of each layer's keys, see `pq.rebase`; empty if they are coded where they lie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Callable[[], Sequence[Tensor]],
        window: WindowSpec,
        batch: int,
        shown: bool = True,
        rebases: Sequence[Rebase | None] = (),
    ) -> None:
        self._model, self._windows = model, windows
        self._window, self._batch, self._shown = window, batch, shown
        self._rebases = rebases
        self._layers = len(fingerprint(model).layers)

    def __call__(self, side: str, layer: int, pq: LayerPQ) -> float:
        if self._rebases and side == "keys":
            pq = replace(pq, rebase=self._rebases[layer])
        coder, exact = _Coder(side, pq.to(self._model.device)), _Coder("", pq)
        codecs = [coder if i == layer else exact for i in range(self._layers)]
        total = predictions = 0.0
        for ids, expected in self.dense:
            cache = SimulatedCache(self._model, codecs, self._window, prefill="quantized")
            comparison = Comparison()
            with torch.inference_mode():
                comparison.add(expected, read_at_once(self._model, ids[:, :-1], cache), ids[:, 1:])
            found = comparison.metrics()
            total += float(found["kl_e3"] or 0.0) * ids[:, 1:].numel()
            predictions += ids[:, 1:].numel()
        self._bar.update(1)
        return total / predictions / 1e3

    @cached_property
    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """The windows read, `[B, T]`, and the dense model's logits `[B, T - 1, V]` on them."""
        model = self._model
        with torch.inference_mode():
            return [
                (ids, read_at_once(model, ids[:, :-1], DynamicCache(config=model.config)))
                for ids in (part.to(model.device) for part in batches(self._windows(), self._batch))
            ]

    @cached_property
    def _bar(self) -> tqdm[Any]:
        return progress(2 * self._layers, "measuring layers", "side", self._shown)


class _Coder:
    """A codec that codes one side, and leaves the other as it is (both if `side` is "")."""

    bits = 16.0

    def __init__(self, side: str, pq: LayerPQ) -> None:
        self._side, self._plain = side, replace(pq, rebase=None)
        self.rebase = pq.rebase if side == "keys" else None

    def keys(self, pages: Tensor) -> Tensor:
        return self._coded(pages) if self._side == "keys" else pages

    def values(self, pages: Tensor) -> Tensor:
        return self._coded(pages) if self._side == "values" else pages

    def _coded(self, pages: Tensor) -> Tensor:
        x = pages.flatten(2, 3)  # [B, Hkv, T, D], keys relative to the origin of their block already
        return decode(encode(x, self._plain), self._plain, x.dtype).view_as(pages)
