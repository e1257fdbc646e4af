"""Launches that are captured once and replayed: CUDA graphs behind an interface that tests stand in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """One captured sequence of launches."""

    def replay(self) -> None:
        """Launch it again, over the tensors that were there when it was captured."""
        ...


class Graphs(Protocol):
    """Captures launches; what is captured by one object is never replayed at the same time."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        """Record what `launch` launches, without running it.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        ...


class CudaGraphs:
    """CUDA graphs of one device that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, launch: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device, e.g. those of a compiler.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            launch()
        return graph
