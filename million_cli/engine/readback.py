"""Tokens from the device to the host, one step behind and without stopping the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Readback:
    """Copies of small tensors under way to the host, in order.

    Args:
        like: a tensor with the shape, dtype and device of the tensors to copy.
    """

    def __init__(self, like: Tensor) -> None:
        self._on_gpu = like.device.type == "cuda"
        self._like = like
        self._free: list[Tensor] = []
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Start to copy the content that `tensor` has at this point of the current stream."""
        if not self._on_gpu:
            self._sent.append((tensor.clone(), None))
            return
        # A buffer is used again only after it was received, so after its copy has ended.
        buffer = (
            self._free.pop()
            if self._free
            else torch.empty(self._like.shape, dtype=self._like.dtype, pin_memory=True)
        )
        buffer.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._like.device))
        self._sent.append((buffer, event))

    def receive(self) -> list[int]:
        """The content of the oldest copy; waits for it if need be."""
        buffer, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        values: list[int] = buffer.tolist()
        if event is not None:
            self._free.append(buffer)
        return values
