"""The signs of a projection's matrix, however its weights are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

ROWS = COLUMNS = 64  # of the projection's matrix that are read
# Knuth's multiplicative hash, and another odd factor, spread the choice whatever the shape.
_ROW_FACTOR, _COLUMN_FACTOR = 2_654_435_761, 2_246_822_519


@torch.no_grad()
def sign_bits(projection: nn.Module, dtype: torch.dtype) -> bytes:
    """Signs of 64 x 64 elements of the matrix that a linear map applies, a byte each.

    A plain weight is read.  Any other map (quantised or packed weights, adapters that are not merged) is
    applied to unit vectors, and each result, less the bias, is a column of its matrix.  Both give the same
    bytes for the same map.  Signs of plain weights survive every cast between floating-point types; a sum of
    weight and adapter may cross zero in a cast, and then counts as another map.

    Args:
        projection: a linear map with `in_features`, or transformers' Conv1D.
        dtype: dtype of the unit vectors.
    """
    weight: Any = getattr(projection, "weight", None)
    if (
        type(projection) in (nn.Linear, Conv1D)
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
    ):
        matrix = weight.detach().T if isinstance(projection, Conv1D) else weight.detach()
        height, width = matrix.shape
        rows, columns = _chosen(height, width, matrix.device)
        found = matrix[rows][:, columns]
    else:
        found = _asked(projection, dtype)
    return torch.signbit(found).to(torch.uint8).cpu().numpy().tobytes()


def _asked(projection: Any, dtype: torch.dtype) -> Tensor:
    """Elements `[ROWS, COLUMNS]` of the map, by applying it to unit vectors."""
    width = int(projection.in_features)
    device = next(projection.parameters()).device
    _, columns = _chosen(1, width, device)
    units = torch.zeros(len(columns), width, device=device, dtype=dtype)
    units[torch.arange(len(columns), device=device), columns] = 1
    silent = {
        name: torch.zeros_like(parameter)
        for name, parameter in projection.named_parameters()
        if name.rpartition(".")[2] == "bias"
    }
    answers: Tensor = functional_call(projection, silent, (units,))
    rows, _ = _chosen(answers.shape[-1], 1, device)
    return answers[:, rows].T


def _chosen(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of rows and columns; all of them in small matrices."""
    rows = torch.arange(min(ROWS, height), device=device) * _ROW_FACTOR % height
    columns = torch.arange(min(COLUMNS, width), device=device) * _COLUMN_FACTOR % width
    return rows, columns
