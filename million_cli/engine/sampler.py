"""From logits to the next token, on the device and without waiting, so that a CUDA graph can hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0, else a draw from the softmax of logits / temperature.

    Attributes:
        top_k: draw among the k most likely tokens; 0 is all.
        top_p: draw among the fewest most likely tokens whose probabilities sum to p; 1 is all.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature}: accepted are 0 (greedy) and above")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: accepted are 0 (all) and above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: accepted are numbers above 0 up to 1 (all)")

    def __call__(self, logits: Tensor) -> Tensor:
        """logits `[B, V]` -> token ids `[B]` int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p < 1:
            ordered = probabilities.sort(-1, descending=True).values
            kept = ordered.cumsum(-1) - ordered < self.top_p  # the first one always
            least = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        # The largest of p / e with e exponential is a draw from p (Gumbel's trick in another form).
        noise = torch.empty_like(scores).exponential_()
        return (probabilities / noise).argmax(-1)
