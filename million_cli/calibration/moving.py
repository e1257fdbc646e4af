"""Samples taken before RoPE, turned to the positions that codes are made for.

A calibration text is short and a served one long.  So keys, and the gradients behind their Fisher
information, are sampled as they would be at position 0 (`hf.rotary.Rotary.to_origin`), and turned to drawn
positions before training, over the model's whole context; where keys are coded relative to the origin of
their block (see `pq.rebase`), to the positions inside it.  The first tokens of a text stay at its start
(`information.FIRST_TOKENS`).

Letters: L layers, Hkv KV heads, n samples, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.calibration.information import FIRST_TOKENS
from million_cli.hf.rotary import Rotary
from million_cli.pq.rebase import Layout, Rebase, turn
from million_cli.pq.samples import LayerSamples

_INFORMATION_DRAWS = 4096


@dataclass(frozen=True)
class Positions:
    """Which positions keys are turned to.

    Attributes:
        rotary: of the model.
        rebases: of each layer; empty without blocks.
        longest: tokens of the longest text.
        seed: of the draws.
        moved: whether keys leave the places where they were read.
    """

    rotary: Rotary
    rebases: Sequence[Rebase | None]
    longest: int
    seed: int
    moved: bool = True

    def draw(self, layer: int, n: int) -> Tensor:
        """Radians, float64 `[n, pairs]` on the CPU, by which a layer's n samples are turned.

        Without blocks, positions are drawn denser towards the start, as L u^2 with uniform u: every text has
        the early ones.  Where angles depend on the length of the text (dynamic, longrope), each length gets
        its share.
        """
        generator = torch.Generator().manual_seed((self.seed << 16) + layer)
        lengths = self.rotary.lengths(self.longest)
        parts = []
        for i, length in enumerate(lengths):
            share = n * (i + 1) // len(lengths) - n * i // len(lengths)
            uniform = torch.rand(share, generator=generator, dtype=torch.float64)
            positions = (length * (uniform if self.rebases or not self.moved else uniform**2)).long()
            angles = self.rotary.angles(layer, positions, length).cpu()
            rebase = self.rebases[layer] if self.rebases else None
            if rebase is not None:
                origins = positions // rebase.every * rebase.every
                angles = angles - origins.double()[:, None] * rebase.frequencies
            parts.append(angles)
        return torch.cat(parts)[torch.randperm(n, generator=generator)]

    def layout(self, layer: int) -> Layout | None:
        """The pairs that a layer turns, None if it turns none."""
        layout = self.rotary.layouts[layer]
        return None if layout == "still" else layout

    def information(self, F: Tensor) -> Tensor:
        """Fisher information of keys at position 0, `[L, Hkv, D, D]`, as its mean over the positions."""
        turned = []
        for layer, of_layer in enumerate(F):
            layout = self.layout(layer)
            if layout is None:
                turned.append(of_layer)
                continue
            angles = self.draw(layer, _INFORMATION_DRAWS)
            turned.append(mean_turned(of_layer, angles, layout))
        return torch.stack(turned)


@dataclass(frozen=True)
class MovedKeys:
    """Keys `[L, Hkv, n, D]` at position 0, turned to drawn positions on a device, a layer at a time."""

    keys: LayerSamples
    sources: Sequence[Tensor]  # [L] of [n], where the tokens were read
    positions: Positions
    device: torch.device

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Tensor:
        keys, layout = self.keys[i].to(self.device), self.positions.layout(i)
        if layout is None:
            return keys
        angles, source = self.positions.draw(i, keys.shape[-2]), self.sources[i]
        first = source < (FIRST_TOKENS if self.positions.moved else self.positions.longest)
        angles[first] = self.positions.rotary.angles(i, source[first], self.positions.longest)
        angles = angles.to(self.device)
        return turn(keys, angles.cos(), angles.sin(), layout)


def mean_turned(F: Tensor, angles: Tensor, layout: Layout) -> Tensor:
    """Mean of R F R^T over rotations R by `angles [draws, n]`; F float64 `[H, D, D]`.

    With x and y the two dimensions of a pair, R takes x to c x - s y and y to s x + c y, so each block of the
    mean is a sum of F's blocks times the means of products of cosines and sines.
    """
    D, n = F.shape[-1], angles.shape[-1]
    half = D // 2
    rest = torch.arange(2 * n, D)  # in pairs that are not turned
    if layout == "halves":
        order = torch.cat([torch.arange(n), rest[::2], torch.arange(n, 2 * n), rest[1::2]])
    else:
        order = torch.cat([torch.arange(0, D, 2), torch.arange(1, D, 2)])
    angles = torch.cat([angles, angles.new_zeros(len(angles), half - n)], 1)
    c, s = angles.cos(), angles.sin()
    cc, cs, ss = (a.T @ b / len(angles) for a, b in ((c, c), (c, s), (s, s)))
    sc = cs.T
    F = F[:, order][:, :, order]
    xx, xy, yx, yy = F[:, :half, :half], F[:, :half, half:], F[:, half:, :half], F[:, half:, half:]
    top = torch.cat([cc * xx - cs * xy - sc * yx + ss * yy, cs * xx + cc * xy - ss * yx - sc * yy], 2)
    bottom = torch.cat([sc * xx - ss * xy + cc * yx - cs * yy, ss * xx + sc * xy + cs * yx + cc * yy], 2)
    mean = torch.cat([top, bottom], 1)
    back = order.argsort()
    return mean[:, back][:, :, back]
