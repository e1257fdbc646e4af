"""The residual window: the newest tokens of one layer, exact, in a preallocated ring."""

from __future__ import annotations

import torch
from torch import Tensor


class ResidualWindow:
    """Keys and values `[B, Hkv, R, D]` in the model's dtype, as they came; position t is in slot t mod R.

    Nothing is shifted: a token is written once and overwritten R tokens later.  The store knows which
    positions are valid.
    """

    def __init__(self, like: Tensor, residual: int) -> None:
        """A ring for `residual` tokens; all else (sizes, dtype, device) as in `like [B, Hkv, _, D]`."""
        B, Hkv, _, D = like.shape
        # Zeros, not garbage: a compiled reader may load slots that it then masks.
        self.keys = like.new_zeros(B, Hkv, residual, D)
        self.values = like.new_zeros(B, Hkv, residual, D)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def _runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Slots of the positions start .. stop - 1 in order, as at most two runs [first, last)."""
        R = self.keys.shape[2]
        assert 0 <= start <= stop <= start + R, (start, stop, R)
        first, n = start % R, stop - start
        head = min(n, R - first)
        return [run for run in ((first, first + head), (0, n - head)) if run[0] < run[1]]

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store `[B, Hkv, n, D]` (n <= R) as the tokens start .. start + n - 1."""
        done = 0
        for first, last in self._runs(start, start + keys.shape[2]):
            n = last - first
            self.keys[:, :, first:last] = keys[:, :, done : done + n]
            self.values[:, :, first:last] = values[:, :, done : done + n]
            done += n

    def read(self, start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the tokens start .. stop - 1, in order, each as 0 to 2 slices of the ring."""
        runs = self._runs(start, stop)
        return [self.keys[:, :, a:b] for a, b in runs], [self.values[:, :, a:b] for a, b in runs]

    def gather(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, stop - start, D]` of the tokens start .. stop - 1, in order.

        A slice of the ring where they lie in one run, so good until the next write.
        """
        keys, values = self.read(start, stop)
        if len(keys) == 1:
            return keys[0], values[0]
        nothing = [self.keys[:, :, :0]]
        return torch.cat(keys or nothing, dim=2), torch.cat(values or nothing, dim=2)

    def take(self, indices: Tensor) -> None:
        """Replace sequence i by a copy of sequence indices[i], in place if the batch keeps its size."""
        indices = indices.to(self.keys.device)
        keys, values = self.keys.index_select(0, indices), self.values.index_select(0, indices)
        if keys.shape == self.keys.shape:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
