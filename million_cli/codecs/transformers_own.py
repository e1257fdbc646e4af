"""The quantisers of transformers' QuantizedCache: quanto and hqq, each an optional package.

transformers quantises the whole text again whenever its residual is full, and a prefill sees exact tokens.
Here its layers only quantise and dequantise; pages and window are ours, so that all methods are alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from million_cli.codecs.codec import Groups, Shape
from million_cli.errors import UserError


class _TransformersCodec:
    """One of transformers' quantised layers, given one page at a time."""

    Config = Groups
    _layer: type[QuantizedLayer]
    _name: str
    _package: str
    _axis: int

    def __init__(self, config: Groups, shape: Shape, seed: int) -> None:
        options: dict[str, Any] = {"axis_key": self._axis, "axis_value": self._axis}
        try:
            self._quantiser = self._layer(config.nbits, q_group_size=config.group, **options)
        except ImportError as error:
            raise UserError(
                f"quantizer.kind={self._name} needs a package that is missing: pip install {self._package}"
            ) from error
        except ValueError as error:
            raise UserError(f"quantizer.codec.nbits={config.nbits}: {str(error).splitlines()[0]}") from error
        if shape.page_size * shape.head_dim % config.group:
            raise UserError(
                f"quantizer.codec.group={config.group}: accepted are divisors of a page of {shape.page_size} "
                f"tokens and {shape.head_dim} dimensions"
            )
        self.bits = config.nbits + 32 / config.group  # a scale and a shift of 16 bits a group

    def keys(self, pages: Tensor) -> Tensor:
        layer, parts = self._quantiser, []
        for page in pages.unbind(2):
            layer.lazy_initialization(page, page)
            parts.append(layer._dequantize(layer._quantize(page.contiguous(), axis=self._axis)))
        return pages.new_empty(0) if not parts else _stacked(parts, pages)

    values = keys


def _stacked(parts: list[Tensor], like: Tensor) -> Tensor:
    import torch

    return torch.stack([part.to(like.dtype) for part in parts], dim=2).view_as(like)


class Quanto(_TransformersCodec):
    """`QuantizedCache(backend="quanto")` with its defaults.

    Raises:
        UserError: not installed, or nbits other than 2 and 4.
    """

    _layer, _name, _package, _axis = QuantoQuantizedLayer, "quanto", "optimum-quanto", 0


class Hqq(_TransformersCodec):
    """`QuantizedCache(backend="hqq")` along its axis 1.

    Raises:
        UserError: not installed, or nbits that it does not have.
    """

    _layer, _name, _package, _axis = HQQQuantizedLayer, "hqq", "hqq", 1
