"""The number of tokens of each sequence, on every device that holds layers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from million_cli.cache.modes import plain_no_grad


class DeviceLengths:
    """One int32 tensor `[B]` a device, shared by its layers and changed in place: its address stays.

    All sequences have the same length.  The host keeps the number that each tensor holds, so it never reads
    from a device.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, tuple[Tensor, int]] = {}

    @plain_no_grad
    def hold(self, device: torch.device, batch: int, length: int) -> Tensor:
        """The tensor `[batch]` of a device, all `length`."""
        lengths, held = self._held.get(device, (None, -1))
        if lengths is None or lengths.shape[0] != batch:
            lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        elif held != length:
            lengths.fill_(length)
        self._held[device] = (lengths, length)
        return lengths

    def on(self, device: torch.device) -> Tensor:
        """The tensor of a device, whatever it holds."""
        return self._held[device][0]

    def advance(self, tokens: int) -> None:
        """Launches have added `tokens` to every tensor."""
        self._held = {device: (lengths, held + tokens) for device, (lengths, held) in self._held.items()}

    def tensors(self) -> list[Tensor]:
        return [lengths for lengths, _ in self._held.values()]

    @property
    def nbytes(self) -> int:
        return sum(lengths.nbytes for lengths in self.tensors())

    def forget(self) -> None:
        """Drop all tensors."""
        self._held = {}
