"""From logits to the next token, on the device and without waiting, so that a CUDA graph can hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0, else a draw from the softmax of logits / temperature.

    Attributes:
        top_k: draw among the k most likely tokens; 0 is all.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: accepted are 0 (greedy) and above")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: accepted are 0 (all) and above")

    def __call__(self, logits: Tensor) -> Tensor:
        """logits `[B, V]` -> token ids `[B]` int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        # The largest of p / e with e exponential is a draw from p (Gumbel's trick in another form).
        noise = torch.empty_like(scores).exponential_()
        return (scores.softmax(-1) / noise).argmax(-1)
