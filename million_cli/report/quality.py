"""Quality against bits: KL and perplexity, with the Pareto front of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import Any

from million_cli.report.exhibit import Exhibit, Row, by, grid, number, origin, slug, to_float
from million_cli.report.style import DENSE, look

LEGEND_WIDTH = 125  # letters that fit beside one another
PANELS = (
    ("kl_e3", "KL from dense (10⁻³ nats a token)"),
    ("perplexity_change_percent", "change of perplexity (%)"),
    ("recall", "recall (share of questions)"),
    ("cache_ratio", "cache bytes / 16-bit dense"),
)
"""Column and axis; those that a third of the rows have are drawn."""
COLUMNS = (
    ("label", "quantizer", str),
    ("bits", "bits", number(".2f")),
    ("kl_e3", "KL e-3", number(".2f")),
    ("kl_se_e3", "±", number(".2f")),
    ("perplexity", "perplexity", number(".3f")),
    ("perplexity_change_percent", "change %", number("+.2f")),
    ("top1_agreement", "top-1 %", number(".1f", 100)),
    ("recall", "recall %", number(".1f", 100)),
    ("recall_dense", "dense %", number(".1f", 100)),
    ("cache_ratio", "bytes / 16-bit", number(".2f")),
)


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each model, text and window length: only numbers of the same tokens compare."""
    found = []
    for (model, text, context), members in by(rows, "model", "text", "context").items():
        latest = {row["label"]: row for row in members if to_float(row["bits"]) is not None}
        chosen = sorted(
            latest.values(), key=lambda row: (float(row["bits"]), to_float(row.get("kl_e3")) or 0.0)
        )
        if not panels(chosen):
            continue
        coded = [row for row in chosen if to_float(row.get("kl_e3"))]
        best = ", ".join(f"{row['label']} at {float(row['bits']):.2g} bits" for row in front(coded, "kl_e3"))
        where = f"{model}, text: {text}" if text else model
        window = f" in windows of {context} tokens" if context else ""
        found.append(
            Exhibit(
                section="Quality against bits",
                kind="quality",
                name=slug("quality", model, text, context),
                title=f"{where}{window}",
                words=(
                    "Bits count everything that grows with the text but the exact window: codes, scales and "
                    "zero points. KL is the mean divergence of the next-token distribution from the one with "
                    "the dense cache. The line joins what nothing else beats at as few bits (the Pareto "
                    "front); lower is better."
                ),
                alt=f"Scatter of quality against bits for {len(chosen)} quantizers of {where}. "
                f"On the Pareto front of KL: {best or 'none'}.",
                paint=lambda figure, chosen=chosen: paint(figure, chosen),  # type: ignore[misc]
                size=(9.6, (3.6 if len(panels(chosen)) < 3 else 5.9) + 0.19 * _legend_rows(chosen)),
                table=grid(chosen, COLUMNS),
                data=chosen,
                origin=origin(chosen),
            )
        )
    return found


def panels(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Panels that a third of the rows can fill, the dense cache's aside where there are others."""
    rows = _coded(rows)
    return [
        (key, name)
        for key, name in PANELS
        if 3 * sum(to_float(row.get(key)) is not None for row in rows) >= max(1, len(rows))
    ]


def _coded(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["label"] != "dense"] or list(rows)


def front(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows that no other row beats in `key` (lower is better) at as few bits, by bits."""
    best: list[Row] = []
    usable = [row for row in rows if to_float(row.get(key)) is not None]
    for row in sorted(usable, key=lambda row: (float(row["bits"]), float(row[key]))):
        if not best or float(row[key]) < float(best[-1][key]):
            best.append(row)
    return best


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Panels of points, a colour and marker a label, with the front where lower is better."""
    shown = panels(rows)
    columns = min(2, len(shown))
    coded = _coded(rows)
    handles: dict[str, Any] = {}
    for index, (key, name) in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // columns), columns, index + 1)
        points = [row for row in coded if to_float(row.get(key)) is not None]
        for row in points:
            style = look(coded.index(row))
            (handles[row["label"]],) = axes.plot(
                float(row["bits"]), float(row[key]), linestyle="", markersize=6.5, **style
            )
        if key in ("kl_e3", "perplexity_change_percent"):
            line = front(points, key)
            xs, ys = ([float(row[k]) for row in line] for k in ("bits", key))
            axes.plot(xs, ys, color="#999999", linewidth=1, zorder=1)
        values = [float(row[key]) for row in points]
        if key == "kl_e3" and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
        elif key == "perplexity_change_percent":
            axes.axhline(0, **DENSE)
            if max(values) > 5:
                axes.set_yscale("symlog", linthresh=1)
                axes.set_yticks(
                    ticks := [t for t in (-1, 0, 1, 3, 10, 30, 100, 1000) if t <= 2 * max(values)]
                )
                axes.set_yticklabels([str(tick) for tick in ticks])
                axes.set_yticks([], minor=True)
        elif key == "recall":
            for dense in {to_float(row.get("recall_dense")) for row in points} - {None}:
                axes.axhline(dense, **DENSE)
            axes.set_ylim(min(0.45, min(values) - 0.05), 1.04)
        elif key == "cache_ratio":
            axes.set_ylim(0, 1.15 * max(*values, 0.1))
        axes.set_xlabel("bits per stored element")
        axes.set_title(name)
        axes.margins(x=0.12, y=0.12)
    names = [fill(name, LEGEND_WIDTH) for name in handles]
    figure.legend(handles.values(), names, loc="outside lower left", ncols=_legend_columns(handles))


def _legend_columns(labels: Iterable[str]) -> int:
    """Columns of the legend below the panels, as many as its longest line leaves room for."""
    longest = max(min(len(label), LEGEND_WIDTH) for label in labels)
    return max(1, min(3, LEGEND_WIDTH // (longest + 6)))


def _legend_rows(rows: Sequence[Row]) -> int:
    labels = [row["label"] for row in rows]
    lines = sum(-(-len(label) // LEGEND_WIDTH) for label in labels)
    return -(-lines // _legend_columns(labels))
