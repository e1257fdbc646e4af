"""Lists of sequences as callers give them: `[n]` integers, each a sequence of the batch."""

from __future__ import annotations

from torch import Tensor

from million_cli.errors import UserError


def check_indices(indices: Tensor, batch: int) -> None:
    """Refuse indices that do not name sequences of a batch.

    On a GPU the device itself checks the range: reading it here would make the host wait.

    Raises:
        UserError: not a list of integers, an empty list, or an index out of range.
    """
    if indices.ndim != 1 or not len(indices) or indices.is_floating_point() or indices.dtype.itemsize == 1:
        raise UserError(
            f"sequences {list(indices.shape)} of {indices.dtype}: accepted is a list of integers, not empty"
        )
    if indices.device.type == "cpu" and not (int(indices.min()) >= 0 and int(indices.max()) < batch):
        raise UserError(f"sequences {indices.tolist()}: this cache holds 0 to {batch - 1}")
