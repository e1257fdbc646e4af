"""Recall of facts by depth and length: heat maps, the dense cache's first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from million_cli.intervals import wilson
from million_cli.report.exhibit import Exhibit, Row, by, grid, join, number, origin, slug, to_float
from million_cli.report.style import draw, tokens

TOTALS = (
    ("label", "cache", str),
    ("bits", "bits", number(".1f")),
    ("recall", "recall %", number(".1f", 100)),
    ("interval", "95 % interval", number("")),
    ("questions", "questions", number(".0f")),
    ("difference", "less than dense, in 100", number("+.1f", 100)),
)
CELLS = (
    ("label", "quantizer", str),
    ("length", "length", number(".0f")),
    ("depth", "depth", number(".2f")),
    ("recall", "recall %", number(".1f", 100)),
    ("recall_low", "from", number(".1f", 100)),
    ("recall_high", "to", number(".1f", 100)),
    ("recall_dense", "dense %", number(".1f", 100)),
    ("recall_n", "questions", number(".0f")),
)
Map = dict[tuple[int, float], float]
"""(length, depth) -> share of questions answered."""


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each model, text and number of facts: heat maps beside the dense one."""
    found = []
    for (model, text, facts), members in by(rows, "model", "text", "facts").items():
        cells = {
            label: list({(row["length"], row["depth"]): row for row in group}.values())
            for (label,), group in by(members, "label").items()
        }
        totals = [*_totals(cells)]
        task = "passkey" if facts in ("", "1") else f"one of {facts} facts"
        said = join([f"{row['label'] or 'the cache'} {100 * float(row['recall']):.1f} %" for row in totals])
        where = ", ".join(filter(None, [model, task, f"text: {text}" if text else ""]))
        maps = heat_maps(cells)
        wide = min(4, len(maps))
        found.append(
            Exhibit(
                section="Recall by depth and length",
                kind="passkey",
                name=slug("recall", model, text, facts and f"{facts}-facts"),
                title=where,
                words=(
                    "Facts stand in a natural text; one is asked for at its end. Depth 0 is the start of the "
                    "text, 1 its end. A cell is the share of questions answered; intervals are Wilson's."
                ),
                alt=f"Heat maps of recall by depth and length, {where}: {said}.",
                paint=lambda figure, maps=maps: paint(figure, maps),  # type: ignore[misc]
                size=(max(4.2, 2.0 + 2.1 * wide), 0.7 + 2.4 * -(-len(maps) // wide)),
                table=grid(totals, TOTALS),
                data=members,
                origin=origin(members),
                details=grid([row for group in cells.values() for row in group], CELLS),
            )
        )
    return found


def _totals(cells: dict[str, list[Row]]) -> list[Row]:
    """A row for the dense cache and each quantizer: recall over all cells, its interval, the difference."""
    totals = []
    for label, rows in cells.items():
        sizes = [int(to_float(row.get("recall_n")) or 1) for row in rows]
        n = sum(sizes)
        counted = all(row.get("recall_n") for row in rows)
        right, right_dense = (
            round(sum(float(row[key]) * size for row, size in zip(rows, sizes, strict=True)), 6)
            for key in ("recall", "recall_dense")
        )
        for name, bits, count in (("dense", "", right_dense), (label, rows[0].get("bits", ""), right)):
            low, high = wilson(round(count), n)
            totals.append(
                {
                    "label": name,
                    "bits": bits,
                    "recall": repr(count / n),
                    "interval": f"{100 * low:.1f} – {100 * high:.1f}" if counted else "",
                    "questions": str(n) if counted else "",
                    "difference": "" if name == "dense" else repr((right_dense - count) / n),
                }
            )
    # Quantizers that were asked the same questions share one row of the dense cache.
    return list({tuple(row.values()): row for row in totals}.values())


def heat_maps(cells: dict[str, list[Row]]) -> dict[str, Map]:
    """Title -> cells, the dense cache first."""
    maps: dict[str, Map] = {"dense": {}}
    for label, rows in cells.items():
        own = maps.setdefault(label or "cache", {})
        for row in rows:
            place = (int(float(row["length"])), float(row["depth"]))
            own[place] = float(row["recall"])
            maps["dense"][place] = float(row["recall_dense"])
    return maps


def paint(figure: Any, maps: dict[str, Map]) -> None:
    """A heat map a cache on shared axes, from 0 to 1, with the percentage in each cell."""
    lengths = sorted({length for cells in maps.values() for length, _ in cells})
    depths = sorted({depth for cells in maps.values() for _, depth in cells})
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    grid_of_axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes in grid_of_axes.flat[len(maps) :]:
        axes.set_axis_off()
    for axes, (title, cells) in zip(grid_of_axes.flat, maps.items(), strict=False):
        values = [[cells.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="YlOrRd_r", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if value == value:
                    colour = "white" if value < 0.4 else "#222222"
                    size = 8 if len(lengths) <= 5 else 6.5
                    axes.text(
                        x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=size
                    )
        axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_title(title if len(title) <= 26 else title[:25] + "…")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.supxlabel("length of the text (tokens)", fontsize=9)
    figure.supylabel("depth of the fact", fontsize=9)
    bar = figure.colorbar(image, ax=grid_of_axes.ravel().tolist(), shrink=0.9, pad=0.02)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.outline.set_visible(False)


def picture(rows: Sequence[Row], label: str) -> Any:
    """The figure of one measurement's table, beside the dense cache."""
    return draw(lambda figure: paint(figure, heat_maps({label: list(rows)})), 6.2, 3.1)
