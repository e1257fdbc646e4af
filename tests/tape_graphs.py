"""`Graphs` for a CPU that behave as CUDA graphs do: a tape of operations over the tensors of the capture.

What Python decides while a step is captured is decided for good; replaying runs the same operations over the
same tensors.  Capturing leaves all tensors as they were, and raises where the host would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from million_cli.hf.step import _step

aten = torch.ops.aten
HOST_READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.item,
    aten.lift_fresh,  # torch.tensor of Python's numbers: a copy that waits
    aten.masked_select,
    aten.nonzero,
    aten.unique2 if hasattr(aten, "unique2") else aten._unique2,
}


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}  # storages that were there before
        self._own: set[int] = set()
        self._keep: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in HOST_READS:
            raise RuntimeError(f"{func} waits for the device")
        if func is torch.ops.million.step.default:
            with self:
                return _step(*args, **kwargs)
        schema = func._schema
        written = [
            (args[i] if i < len(args) else kwargs.get(argument.name))
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for tensor in tree_leaves(written):
            self._save(tensor)
        out = func(*args, **kwargs)
        new = _storages(out) - _storages((args, kwargs))
        if written or new:  # else a view
            self._own |= set() if written else new
            self.operations.append((func, args, kwargs, None if written else out))
        self._keep.append(out)  # so that no storage is used twice
        return out

    def _save(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own and place not in self._saved:
            flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._saved[place] = flat, flat.clone()

    def undo(self) -> None:
        for flat, before in self._saved.values():
            flat.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if out is not None:
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def _storages(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)}


class TapeGraphs:
    """Attributes: captured and replayed, counts."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, launch: Callable[[], None]) -> Tape:
        tape = Tape()
        try:
            with tape:
                launch()
        finally:
            tape.undo()
        self.captured += 1
        return tape
