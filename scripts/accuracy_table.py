"""The columns of a results CSV that tell quality against bits, one row a measurement, least KL first.

    python scripts/accuracy_table.py outputs/results.csv results/reference-accuracy.csv

The text is that of the file or data set which the measurement read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from million_cli.results import read_rows, write_rows

COLUMNS = (
    "bits_nominal",
    "kl_e3",
    "kl_se_e3",
    "perplexity",
    "perplexity_dense",
    "perplexity_change_percent",
    "top1_agreement",
    "recall",
    "recall_dense",
    "tokens",
    "key_error",
    "value_error",
    "samples",
    "commit",
    "started",
    "duration_s",
    "torch",
    "device",
    "command",
)
SETTINGS = {
    "scope": "config.quantizer.scope",
    "key_rotation": "config.quantizer.keys.rotation",
    "value_rotation": "config.quantizer.values.rotation",
    "key_metric": "config.quantizer.keys.metric",
    "value_metric": "config.quantizer.values.metric",
    "budget_bits": "config.quantizer.bits",
    "widths": "config.quantizer.widths",
    "code_share": "config.sample.code",
    "repeats_share": "config.sample.repeats",
    "alternations": "config.train.alternations",
}


def table(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One line a finished measurement of quality."""
    lines = []
    for row in rows:
        if row.get("status") == "ok" and row.get("kl_e3"):
            is_pq = row["config.quantizer.kind"] == "pq"
            settings = {name: row.get(key, "") if is_pq else "" for name, key in SETTINGS.items()}
            if not settings["budget_bits"]:
                settings["widths"] = ""  # nothing to choose
            text = Path(row.get("config.task.path") or row["config.task.dataset"]).name
            measured = {column: row.get(column, "") for column in COLUMNS}
            lines.append({"quantizer": row["config.quantizer.name"], "text": text, **settings, **measured})
    return sorted(lines, key=lambda line: (line["text"], float(line["kl_e3"])))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_rows(target, table(read_rows(source)[1]))
