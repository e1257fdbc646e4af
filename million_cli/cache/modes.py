"""Tensors that outlive a call are ordinary tensors, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from million_cli.errors import UserError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def plain_no_grad(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `function` without gradients and outside `torch.inference_mode`.

    A tensor made inside inference mode can never be changed outside it, so a cache that was filled there
    could not be used anywhere else.
    """

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


def refuse_gradients(keys: Tensor, values: Tensor) -> None:
    """Refuse gradients through codes, which have none.

    Raises:
        UserError: gradients are enabled and keys or values require them.
    """
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise UserError(
            "a PQ cache carries no gradients: call the model under torch.no_grad() or torch.inference_mode()"
        )
