"""Work of one layer beside the compute of the next: on a GPU, a second stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class SideStream:
    """Runs work beside the current stream and lets later work on the same layer wait for it.

    On a CPU the work runs at once.  Nothing here makes the host wait.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._done: dict[int, tuple[torch.device, torch.cuda.Event]] = {}

    def __reduce__(self) -> tuple[type[SideStream], tuple[()]]:
        """Streams are not copied: a copy of a cache finds its codes written and starts its own."""
        self.wait()
        return SideStream, ()

    def run(self, layer: int, work: Callable[[], None], inputs: Sequence[Tensor]) -> None:
        """Launch `work` once everything launched so far is done.

        Args:
            layer: names the work for `wait`; the layer's earlier work has been waited for.
            inputs: tensors that `work` reads and the caller may drop before it ends.
        """
        device = inputs[0].device
        if device.type != "cuda":
            work()
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            work()
        for tensor in inputs:
            tensor.record_stream(stream)  # so that its memory is not given away before
        self._done[layer] = (device, stream.record_event())

    def wait(self, layer: int | None = None) -> None:
        """Let the current stream wait for a layer's work, or for all of it."""
        for key in list(self._done) if layer is None else [layer]:
            if key in self._done:
                device, event = self._done.pop(key)
                torch.cuda.current_stream(device).wait_event(event)
