"""Launches that are captured once and replayed: CUDA graphs, behind an interface that tests implement too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """One captured sequence of launches."""

    def replay(self) -> None:
        """Launch it again, over the tensors of its capture."""
        ...


class Graphs(Protocol):
    """Captures launches; graphs of one object are never replayed at the same time."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        """Record the launches of `launch` without running them.

        Raises:
            RuntimeError: some operation cannot be captured.
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
