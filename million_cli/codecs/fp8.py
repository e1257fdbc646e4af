"""FP8: every element cast to float8 e4m3 (1 sign, 4 exponent, 3 mantissa bits), without scales."""

from __future__ import annotations

import torch
from torch import Tensor

from million_cli.codecs.codec import NoSettings, Shape

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8:
    """The `fp8` cache of inference engines with their default scale of 1; beyond +-448 it saturates."""

    Config = NoSettings
    bits = 8.0

    def __init__(self, config: NoSettings, shape: Shape, seed: int) -> None:
        pass

    def keys(self, pages: Tensor) -> Tensor:
        return pages.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(pages.dtype)

    values = keys
