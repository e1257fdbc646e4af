"""Lists of sequences as callers give them: `[n]` integers, each a sequence of the batch."""

from __future__ import annotations

from torch import Tensor

from million_cli.errors import UserError


def check_indices(indices: Tensor, batch: int) -> None:
    """Refuse what does not name sequences of a batch.

    On a GPU the device itself checks the range: looking here would make the host wait.

    Raises:
        UserError: no list of integers, an empty one, or a sequence that there is not.
    """
    if indices.ndim != 1 or not len(indices) or indices.is_floating_point() or indices.dtype.itemsize == 1:
        raise UserError(
            f"sequences {list(indices.shape)} of {indices.dtype}: accepted is a list of integers, not empty"
        )
    if indices.device.type == "cpu" and not (int(indices.min()) >= 0 and int(indices.max()) < batch):
        raise UserError(f"sequences {indices.tolist()}: this cache holds 0 to {batch - 1}")
