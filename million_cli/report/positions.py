"""Loss by position in the window: does it grow with distance?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from million_cli.report.exhibit import Exhibit, Row, by, grid, join, number, origin, slug, to_float
from million_cli.report.style import DENSE, draw, look

COLUMNS = (
    ("label", "quantizer", str),
    ("first", "from", str),
    ("last", "to", str),
    ("kl_e3", "KL e-3", number(".2f")),
    ("kl_se_e3", "±", number(".2f")),
    ("perplexity", "perplexity", number(".2f")),
    ("perplexity_dense", "dense", number(".2f")),
    ("perplexity_change_percent", "change %", number("+.2f")),
)
ENDS = (
    ("label", "quantizer", str),
    ("early", "KL e-3, 2nd quarter", number("")),
    ("late", "last quarter", number("")),
    ("growth", "ratio", number(".2f")),
)


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each model, text and length of windows or answers: a line for each quantizer."""
    found = []
    for (model, text, what, context), members in by(rows, "model", "text", "what", "context").items():
        lines = _lines(members)
        ends = [end for label, line in lines.items() if (end := growth(label, line))]
        of = f"{what or 'windows'} of {context} tokens" if context else ""
        where = ", ".join(filter(None, [model, f"text: {text}" if text else "", of]))
        ratios = [f"{float(e['growth']):.2f} with {e['label'] or 'codes'}" for e in ends if e["growth"]]
        answer = (
            f"KL of the last quarter of the window over that of the second: {join(ratios)}." if ratios else ""
        )
        found.append(
            Exhibit(
                section="Loss by position in the context",
                kind="positions",
                name=slug("positions", model, text, what, context),
                title=where,
                words=(
                    "Each window is read from its first token; the position is that of the predicting token. "
                    "The newest tokens are exact, so the first positions lose nothing. Bars are standard "
                    f"errors over windows. {answer}"
                ),
                alt=f"KL and perplexity by position in the window, {where}. {answer}",
                paint=lambda figure, lines=lines: paint(figure, lines),  # type: ignore[misc]
                size=(7.6, 3.2),
                table=grid(ends, ENDS),
                data=members,
                origin=origin(members),
                details=grid([row for line in lines.values() for row in line], COLUMNS),
            )
        )
    return found


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label -> its buckets in order, of the latest measurement."""
    lines: dict[str, dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(row["label"], {})[int(float(row["first"]))] = row
    return {label: [line[first] for first in sorted(line)] for label, line in lines.items()}


def growth(label: str, line: Sequence[Row]) -> Row | None:
    """KL of the second and the last quarter of the window, and their ratio; None of fewer than four buckets.

    The first quarter is left out: much of it is the exact window.  The standard error of a quarter takes its
    buckets as independent.
    """
    if len(line) < 4:
        return None
    quarter = len(line) // 4
    means, texts = [], []
    for part in (line[quarter : 2 * quarter], line[-quarter:]):
        mean = sum(float(row["kl_e3"]) for row in part) / quarter
        errors = [to_float(row.get("kl_se_e3")) for row in part]
        spread = sum(error**2 for error in errors if error is not None) ** 0.5 / quarter
        means.append(mean)
        texts.append(f"{mean:.2f} ± {spread:.2f}" if None not in errors else f"{mean:.2f}")
    ratio = repr(means[1] / means[0]) if means[0] > 0 else ""
    return {"label": label, "early": texts[0], "late": texts[1], "growth": ratio}


def paint(figure: Any, lines: dict[str, list[Row]]) -> None:
    """KL on the left, perplexity on the right with the dense cache's as a dashed line."""
    left, right = figure.subplots(1, 2)
    dense: dict[int, float] = {}
    for index, (label, line) in enumerate(lines.items()):
        middles = [(float(row["first"]) + float(row["last"])) / 2 for row in line]
        style = {**look(index), "markersize": 4, "linewidth": 1.3}
        errors = [to_float(row.get("kl_se_e3")) or 0.0 for row in line]
        left.errorbar(middles, [float(row["kl_e3"]) for row in line], errors, label=label, capsize=2, **style)
        right.plot(middles, [float(row["perplexity"]) for row in line], **style)
        dense.update(zip(middles, (float(row["perplexity_dense"]) for row in line), strict=True))  # type: ignore[arg-type]
    right.plot(list(dense), list(dense.values()), label="dense", **DENSE)
    left.set_title("KL from dense (10⁻³ nats a token)")
    right.set_title("perplexity")
    for axes in (left, right):
        axes.set_xlabel("position in the window (tokens)")
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)


def picture(rows: Sequence[Row], label: str) -> Any:
    """The figure of one measurement's table."""
    parts = by(rows, "context")
    lines = {
        label if len(parts) == 1 else f"{label}, {context} tokens": line for (context,), line in parts.items()
    }
    return draw(lambda figure: paint(figure, lines), 7.6, 3.2)
