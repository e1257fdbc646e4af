"""Progress bars on stderr: live on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, description: str, unit: str, shown: bool = True) -> tqdm[Any]:
    """A bar to `update(n)`, as a context manager; without `shown` it is silent."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit in ("tok", "B"),
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
        **({} if shown else {"disable": True}),  # otherwise TQDM_DISABLE decides
    )
