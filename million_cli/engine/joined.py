"""Projections of the same input as one product, in compiled steps.

A decode step reads every weight once, and small matrices are read at a lower bandwidth than large ones (on
an H200 at 2.6 TB/s for 32 MiB, where the memory gives 4.4).  So the weights of a layer's query, key and value
projections, and those of its gate and up projections, are laid one after another in memory.  Each module
keeps its own weight, now a view, and works as before.  Only under `torch.compile` does the first module
multiply by all weights; each module then takes its part of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linear maps that a parent module applies to the same input."""


class Group:
    """Weights of maps of one input, and, while a model is traced, that input and the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.used = True
        self.input: Tensor | None = None
        self.product: Tensor | None = None

    def multiply(self, input: Tensor, last: bool) -> Tensor:
        """The product of all maps, made once for an input; forgotten after the `last` map."""
        product = self.product
        if self.input is not input or product is None:
            product = F.linear(input, self.weight, self.bias)
        self.input, self.product = (None, None) if last else (input, product)
        return product


class JoinedLinear(nn.Linear):
    """A linear map whose weight is the rows `start:start + out_features` of its group's.

    Args:
        like: the map to replace; its parameters become views of the group's tensors.
    """

    def __init__(self, like: nn.Linear, group: Group, start: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.group, self.rows = group, slice(start, start + like.out_features)
        self.last = self.rows.stop == group.weight.shape[0]
        like.weight.data = group.weight[self.rows]
        if like.bias is not None:
            assert group.bias is not None
            like.bias.data = group.bias[self.rows]
        self.weight, self.bias = like.weight, like.bias
        self.train(like.training)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        if self.group.used and torch.compiler.is_compiling():
            return self.group.multiply(input, self.last)[..., self.rows]
        return super().forward(input)

    @property
    def is_view(self) -> bool:
        """Whether the weight is still a view of the group's: moving a model gives it new weights."""
        rows = self.group.weight[self.rows]
        return self.weight.device == rows.device and self.weight.data_ptr() == rows.data_ptr()


def join_projections(model: nn.Module) -> int:
    """Join the projections of all layers for compiled steps; those joined already stay as they are.

    Parameters keep their identity and values; one group's memory is needed twice for a moment.  Modules that
    are not plain linear maps (quantized, adapted, hooked) or have no plain weights stay as they are.

    Returns:
        The number of groups that are joined.
    """
    count = 0
    for parent, names in _groups(model):
        maps = [getattr(parent, name) for name in names]
        if not all(isinstance(one, JoinedLinear) and one.is_view for one in maps):
            if not _alike(maps):
                continue
            with torch.no_grad():
                weight = torch.cat([one.weight.data for one in maps])
                bias = None if maps[0].bias is None else torch.cat([one.bias.data for one in maps])
                group = Group(weight, bias)
            start = 0
            for name, one in zip(names, maps, strict=True):
                setattr(parent, name, JoinedLinear(one, group, start))
                start += one.out_features
        getattr(parent, names[0]).group.used = True
        count += 1
    return count


def part_projections(model: nn.Module) -> None:
    """Undo `join_projections`: compiled code uses each projection by itself again."""
    for module in model.modules():
        if isinstance(module, JoinedLinear):
            module.group.used = False


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    for parent in list(model.modules()):
        for names in GROUPS:
            if all(isinstance(getattr(parent, name, None), nn.Linear) for name in names):
                yield parent, names


def _alike(maps: Sequence[nn.Linear]) -> bool:
    """Whether the maps are plain and can be one product."""
    first = maps[0]
    return all(
        type(one) in (nn.Linear, JoinedLinear)
        and not one._forward_hooks
        and not one._forward_pre_hooks
        and type(one.weight) is nn.Parameter
        and type(one.weight.data) is Tensor
        and one.in_features == first.in_features
        and (one.weight.dtype, one.weight.device) == (first.weight.dtype, first.weight.device)
        and (one.bias is None) == (first.bias is None)
        for one in maps
    )
