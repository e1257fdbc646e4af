"""Uniform quantisation to integers with a minimum and a step a group, in two groupings.

An element x of a group with minimum m and maximum M becomes round((x - m) / s), s = (M - m) / (2^nbits - 1),
and comes back as m + s * code.  Minimum and step are stored in 16 bits each, and used as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from million_cli.codecs.codec import Groups, Shape
from million_cli.errors import UserError
from million_cli.pq.rotation import random_hadamard

_GROUP_BITS = 32  # a minimum and a step in float16
_LARGEST = torch.finfo(torch.float16).max


def uniform(x: Tensor, nbits: int) -> Tensor:
    """x [..., group], each group quantised by itself and brought back, in the dtype of x."""
    wide = x.float() if x.dtype != torch.float64 else x
    low, high = wide.aminmax(dim=-1, keepdim=True)
    low = _as_stored(low)
    step = _as_stored((high - low) / (2**nbits - 1))
    codes = ((wide - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**nbits - 1)
    return (low + codes * step).to(x.dtype)


def _as_stored(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST, _LARGEST).half().to(x.dtype)


class Kivi:
    """KIVI (Liu et al. 2024, arXiv:2402.02750): keys a channel in groups of tokens, values a token in groups
    of channels.  A group wider than the head is the whole head.

    Raises:
        UserError: groups that do not divide a page or the head.
    """

    Config = Groups

    def __init__(self, config: Groups, shape: Shape, seed: int) -> None:
        self._nbits, self._tokens = config.nbits, config.group
        self._channels = min(config.group, shape.head_dim)
        if shape.page_size % self._tokens or shape.head_dim % self._channels:
            raise UserError(
                f"quantizer.codec.group={config.group}: accepted are divisors of "
                f"cache.page_size={shape.page_size} that divide head_dim={shape.head_dim} or exceed it"
            )

    @property
    def bits(self) -> float:
        return self._nbits + _GROUP_BITS * (1 / self._tokens + 1 / self._channels) / 2

    def keys(self, pages: Tensor) -> Tensor:
        groups = pages.mT.unflatten(-1, (-1, self._tokens))
        return uniform(groups, self._nbits).flatten(-2).mT

    def values(self, pages: Tensor) -> Tensor:
        return uniform(pages.unflatten(-1, (-1, self._channels)), self._nbits).flatten(-2)


@dataclass
class PerTokenSettings(Groups):
    """`Groups`, and whether a random Hadamard rotation comes first."""

    group: int = 128
    hadamard: bool = False


class PerToken:
    """Keys and values a token in groups of channels.  A group wider than the head is the whole head.

    The rotation spreads outliers, as in QuaRot (Ashkboos et al. 2024, arXiv:2404.00456).

    Raises:
        UserError: groups that do not divide the head.
    """

    Config = PerTokenSettings

    def __init__(self, config: PerTokenSettings, shape: Shape, seed: int) -> None:
        self._nbits = config.nbits
        self._channels = min(config.group, shape.head_dim)
        if shape.head_dim % self._channels:
            raise UserError(
                f"quantizer.codec.group={config.group}: accepted are divisors of head_dim={shape.head_dim} "
                "and more"
            )
        self._rotation = random_hadamard(shape.head_dim, seed) if config.hadamard else None

    @property
    def bits(self) -> float:
        return self._nbits + _GROUP_BITS / self._channels

    def keys(self, pages: Tensor) -> Tensor:
        wide = torch.promote_types(pages.dtype, torch.float32)
        x = pages.to(wide)
        if self._rotation is not None:
            self._rotation = rotation = self._rotation.to(pages.device)
            x = x @ rotation.to(wide)
        x = uniform(x.unflatten(-1, (-1, self._channels)), self._nbits).flatten(-2)
        if self._rotation is not None:
            x = x @ self._rotation.to(wide).T
        return x.to(pages.dtype)

    values = keys
