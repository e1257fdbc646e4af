"""Measurements that may fail: a failure becomes a row, and memory is freed in any case."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from million_cli.bench.measure import Row

logger = logging.getLogger("million")

KEPT_BYTES = 4 << 30
"""Bytes that a measurement may leave allocated: the first to need codebooks makes them."""


def guarded(measure: Callable[[], Row], device: torch.device) -> Row:
    """The row of a measurement with its `status` and, on a GPU, its peak memory; see `failure`."""
    clear(device)
    before = 0
    on_gpu = device.type == "cuda"
    if on_gpu:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        row: Row = {"status": "ok", **measure()}
    except Exception as error:
        row = failure(error)
    if on_gpu and row["status"] == "ok":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    clear(device)
    if on_gpu and torch.cuda.memory_allocated(device) - before > KEPT_BYTES:
        torch._dynamo.reset()  # compiled code may hold on to the cache that it was compiled with
        clear(device)
    return row


def failure(error: BaseException) -> Row:
    """The row of a measurement that gave no figures."""
    text = str(error).strip().splitlines()
    note = f"{type(error).__name__}: {text[0][:300] if text else ''}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return {"status": "oom", "note": note}
    if isinstance(error, ImportError):
        return {"status": "unavailable", "note": note}
    logger.warning("%s", note, exc_info=error)
    return {"status": "error", "note": note}


def clear(device: torch.device) -> None:
    """Free the memory of a measurement."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            logger.warning("the GPU no longer answers")


def device_works(device: torch.device) -> bool:
    """Whether the process can still use its device: after some CUDA errors it cannot."""
    if device.type != "cuda":
        return True
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True
