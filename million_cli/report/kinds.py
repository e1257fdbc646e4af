"""The kinds of rows a report reads, and the numbers that each must or may have.

A row with a bad cell (text where a number belongs, a number out of range, nothing where one is needed) is
left out, and a line says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from million_cli.report.exhibit import to_float
from million_cli.tables import SCHEMA

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("million")

Range = tuple[float, float]
ANY: Range = (-1e18, 1e18)
COUNT: Range = (0.0, 1e18)
POSITIVE: Range = (math.nextafter(0.0, 1.0), 1e18)
SHARE: Range = (0.0, 1.0)


@dataclass(frozen=True)
class Kind:
    """Columns of a kind of rows.

    Attributes:
        texts: columns that the table must have.
        required: columns whose cells must be numbers within these ranges.
        optional: the same, but a cell may be empty and the column may be missing.
    """

    texts: tuple[str, ...] = ()
    required: Mapping[str, Range] = field(default_factory=dict)
    optional: Mapping[str, Range] = field(default_factory=dict)


QUALITY = {
    **dict.fromkeys(("perplexity_change_percent", "kl_e3"), ANY),
    **dict.fromkeys(
        ("kl_se_e3", "perplexity", "perplexity_dense", "cache_bytes", "dense_bytes", "cache_ratio"), COUNT
    ),
    **dict.fromkeys(("top1_agreement", "recall", "recall_dense", "recall_low", "recall_high"), SHARE),
}
TIMES = {
    **dict.fromkeys(("context", "tpot_ms", "tpot_p90_ms", "ttft_ms"), POSITIVE),
    **dict.fromkeys(("batch", "tokens_per_s", "cache_bytes", "peak_bytes", "largest_batch", "bits"), COUNT),
}
SCORES = {"score": ANY, "dense": ANY, "bits": COUNT}
KINDS: dict[str, Kind] = {
    "job": Kind(
        texts=("run", "verb", "status"),
        optional={
            **QUALITY,
            **TIMES,
            **dict.fromkeys(("tpot_dense_ms", "tpot_p90_dense_ms", "ttft_dense_ms"), POSITIVE),
            **dict.fromkeys(("ruler_average", "ruler_average_dense"), ANY),
            **dict.fromkeys(("longbench_average", "longbench_average_dense"), ANY),
            **dict.fromkeys(("lm_eval_average", "lm_eval_average_dense"), ANY),
            **dict.fromkeys(("bits_nominal", "duration_s"), COUNT),
        },
    ),
    "passkey": Kind(
        required={"length": COUNT, "depth": SHARE, "recall": SHARE, "recall_dense": SHARE},
        optional={"recall_n": (1, 1e18), "recall_low": SHARE, "recall_high": SHARE, "bits": COUNT},
    ),
    "positions": Kind(
        required={
            "first": COUNT,
            "last": COUNT,
            "kl_e3": ANY,
            "perplexity": COUNT,
            "perplexity_dense": COUNT,
        },
        optional={"kl_se_e3": COUNT, "perplexity_change_percent": ANY, "bits": COUNT},
    ),
    "drift": Kind(
        required={
            "first": COUNT,
            "last": COUNT,
            "kl_e3": ANY,
            "perplexity": COUNT,
            "perplexity_dense": COUNT,
        },
        optional={
            "kl_se_e3": COUNT,
            "perplexity_change_percent": ANY,
            "top1_agreement": SHARE,
            "bits": COUNT,
        },
    ),
    "ruler": Kind(
        texts=("task",),
        required={"length": COUNT, "score": (0.0, 100.0), "dense": (0.0, 100.0)},
        optional={**dict.fromkeys(("difference", "difference_low", "difference_high"), ANY), "bits": COUNT},
    ),
    "longbench": Kind(texts=("task",), optional=SCORES),
    "lm_eval": Kind(texts=("task",), optional=SCORES),
    "breakdown": Kind(texts=("stage",), optional={"context": POSITIVE, "ms": COUNT}),
    "kernel": Kind(
        texts=("impl",),
        optional={
            **dict.fromkeys(("q_heads", "kv_heads", "head_dim", "context", "median_us", "p90_us"), POSITIVE),
            **dict.fromkeys(("m_keys", "m_values", "batch", "ratio_to_best_dense", "tb_per_s"), COUNT),
            "rel_err": COUNT,
        },
    ),
    "e2e": Kind(texts=("impl",), required={"context": POSITIVE}, optional=TIMES),
    # The data of figures, which a report writes: rows of several files in common terms.
    "quality": Kind(texts=("quantizer",), optional={**QUALITY, "bits": COUNT}),
    "scores": Kind(texts=("suite", "task"), optional=SCORES),
    "speed": Kind(texts=("impl",), required={"context": POSITIVE}, optional=TIMES),
    "largest": Kind(texts=("impl",), required={"context": POSITIVE}, optional=TIMES),
    # Read but not drawn: single answers and kernels, and the data of figures.
    "drift_answers": Kind(),
    "ruler_samples": Kind(),
    "longbench_samples": Kind(),
    "lm_eval_samples": Kind(),
    "breakdown_kernels": Kind(),
    "failures": Kind(),
    "codebook": Kind(),
}
"""By the cell `kind` of a row.  A task's table has the kind that the task names it by."""


def checked(path: Path, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Kind -> its usable rows; logs the reason for all others."""
    found: dict[str, pd.DataFrame] = {}
    for (cell, schema), rows in frame.groupby(["kind", "schema"], sort=False):
        name = str(cell)
        kind = KINDS.get(name)
        missing = [column for column in (*kind.texts, *kind.required) if column not in rows] if kind else []
        if kind is None:
            _left_out(path, len(rows), f"kind {name!r}; accepted are {', '.join(KINDS)}")
        elif schema != str(SCHEMA):
            _left_out(path, len(rows), f"schema {schema!r}; this version reads {SCHEMA}")
        elif missing:
            _left_out(path, len(rows), f"no column {', '.join(missing)}, which rows of kind {name} have")
        else:
            found[name] = _usable(path, rows, kind)
    return found


def _usable(path: Path, frame: pd.DataFrame, kind: Kind) -> pd.DataFrame:
    """The rows of `frame` whose numbers are numbers."""
    for columns, is_needed in ((kind.required, True), (kind.optional, False)):
        for column, (low, high) in columns.items():
            if column not in frame:
                continue
            numbers = frame[column].map(to_float).astype(float)
            bad = ~numbers.between(low, high)
            if not is_needed:
                bad &= frame[column] != ""
            if bad.any():
                cells = ", ".join(repr(cell[:40]) for cell in frame.loc[bad, column].unique()[:3])
                low_text = "above 0" if low == POSITIVE[0] else f"from {low:g}"
                _left_out(
                    path,
                    int(bad.sum()),
                    f"{column} is {cells}; accepted are numbers {low_text} to {high:g}",
                )
                frame = frame[~bad]
    return frame


def _left_out(path: Path, rows: int, why: str) -> None:
    logger.warning("%s: %d row%s left out: %s", path, rows, "" if rows == 1 else "s", why)
