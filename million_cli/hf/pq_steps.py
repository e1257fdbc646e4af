"""Decode steps of a PQ cache by its compiled operations, all state on the device."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress

import torch
from torch import Tensor

from million_cli.hf.pq_cache import PQCache
from million_cli.hf.step import new_marker
from million_cli.ops.store_ops import KernelFailed


class PQSteps:
    """`Steps` of a PQ cache that kernels serve.

    Page ids and the device's block table are updated one page of tokens ahead, so most steps do nothing on
    the host.

    Args:
        cache: empty.
        device: where all its layers are.
    """

    def __init__(self, cache: PQCache, device: torch.device) -> None:
        assert steps_reason(cache) is None
        self.cache = cache
        self.marker = new_marker(self, device)
        self._expected = self._room = 0
        self._places: tuple[int, ...] = ()
        self._prepared: Hashable = None

    def expect(self, length: int) -> None:
        self._expected = length
        self.cache.store.expect(length)

    def begin(self, first_valid: Tensor | None) -> None:
        self.cache.steps.begin()
        self._room = 0

    def ready(self) -> Hashable | None:
        store = self.cache.store
        store.prepare_steps()
        needed = store.length() + 1
        self.cache.check_positions(needed)
        if needed > self._room or not store.is_reserved(needed):
            ahead = store.length() + store.window.page_size
            self._room = max(needed, min(ahead, self._expected)) if self._expected else ahead
            if not self.cache.reserve(self._room):
                return None
            self._places = self.cache.steps.places()
        return self._places

    def prepare(self, key: Hashable) -> None:
        if key == self._prepared:
            return
        self._prepared, shape = key, self.cache.kv_shape
        with suppress(KernelFailed):  # the step itself will say so
            self.cache.steps.prime(shape.num_kv_heads * shape.group)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, first_valid: Tensor | None, scale: float
    ) -> Tensor:
        return self.cache.steps.step(layer, query, key, value, scale=scale, first_valid=first_valid)

    def advance(self) -> None:
        self.cache.steps.advance()

    def failed(self, error: KernelFailed) -> None:
        """Continue in torch, through the cache's layers.

        Raises:
            UserError: the cache is strict.
        """
        self.cache.kernel_failed(error)


def steps_reason(cache: PQCache) -> str | None:
    """The reason why a cache has no `PQSteps`, or None."""
    if cache.backend.compute != "kernel":
        return "no compiled kernels serve the cache"
    if cache.has_own_layers:
        return "layers with sliding windows or linear attention"
    return None
