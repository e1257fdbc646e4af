"""Checkpoints whose weights are not exactly those of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from million_cli.errors import UserError


def refuse_incomplete(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly those that the model has.

    transformers draws missing weights at random and drops unexpected ones, with a warning at most.  Its
    report already leaves out tied weights and buffers that older versions saved.

    Args:
        name: of the model, for the message.
        report: transformers' loading report (`output_loading_info=True`).

    Raises:
        UserError: weights are missing, unexpected, of another shape or unreadable; the message names them.
    """
    faults = {
        "lacks": sorted(report["missing_keys"]),
        "has another shape for": sorted(key for key, *_ in report["mismatched_keys"]),
        "holds what the model has no place for:": sorted(report["unexpected_keys"]),
        "cannot be read:": [str(message).splitlines()[0] for message in report["error_msgs"]],
    }
    said = [f"{what} {_some(keys)}" for what, keys in faults.items() if keys]
    if said:
        raise UserError(
            f"model={name}: the checkpoint {'; it '.join(said)}; accepted is one with the model's weights"
        )


def _some(keys: Sequence[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
