"""What coding one side of one layer does to the model's predictions, measured on calibration text."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from million_cli.codecs.simulated import SimulatedCache
from million_cli.pipelines.sample import calibration_windows
from million_cli.pipelines.session import Session
from million_cli.pq import LayerPQ, decode, encode
from million_cli.progress import progress
from million_cli.tasks.perplexity import Comparison, read_at_once


class Measure:
    """The KL divergence of the next-token distribution from the dense model's, by what is coded.

    Calling it with a side ("keys" or "values"), the position of a full-attention layer and a quantizer gives
    the mean over about `tokens` predictions, in nats, when these vectors alone are coded behind the window.

    Args:
        session: of the job, with the model and the calibration text.
        tokens: of whole windows, at least one, spread evenly over text and code.  Random repetitions are left
            out: what they ask for is another mix, and worse on all else.
    """

    def __init__(self, session: Session, tokens: int) -> None:
        self._session, self._tokens = session, tokens

    def __call__(self, side: str, layer: int, pq: LayerPQ) -> float:
        model = self._session.model
        coder, exact = _Coder(side, pq.to(model.device)), _Coder("", pq)
        codecs = [coder if i == layer else exact for i in range(len(self._session.fingerprint.layers))]
        comparison = Comparison()
        for ids, expected in self._dense:
            cache = SimulatedCache(model, codecs, self._session.config.cache.window(), prefill="quantized")
            with torch.inference_mode():
                comparison.add(expected, read_at_once(model, ids[:, :-1], cache), ids[:, 1:])
        self._bar.update(1)
        return float(comparison.metrics()["kl_e3"] or 0.0) / 1e3

    @cached_property
    def _bar(self) -> tqdm[Any]:
        return progress(2 * len(self._session.fingerprint.layers), "measuring layers", "side")

    @cached_property
    def _dense(self) -> list[tuple[Tensor, Tensor]]:
        """Windows `[B, T]` and the dense model's logits `[B, T - 1, V]` on them."""
        model, config = self._session.model, self._session.config
        windows = calibration_windows(self._session, repeats=False)
        wanted = max(1, min(len(windows), self._tokens // windows.shape[1]))
        at = ((torch.arange(wanted) + 0.5) * len(windows) / wanted).long()
        batches = windows[at].to(model.device).split(config.sample.batch)
        with torch.inference_mode():
            return [
                (ids, read_at_once(model, ids[:, :-1], DynamicCache(config=model.config))) for ids in batches
            ]


class _Coder:
    """A codec that codes one side; the other, and any with side "", stays as it is."""

    bits = 16.0

    def __init__(self, side: str, pq: LayerPQ) -> None:
        self._side, self._pq = side, pq

    def keys(self, pages: Tensor) -> Tensor:
        return self._coded(pages) if self._side == "keys" else pages

    def values(self, pages: Tensor) -> Tensor:
        return self._coded(pages) if self._side == "values" else pages

    def _coded(self, pages: Tensor) -> Tensor:
        x = pages.flatten(2, 3)  # [B, Hkv, T, D]
        return decode(encode(x, self._pq), self._pq, x.dtype).view_as(pages)
