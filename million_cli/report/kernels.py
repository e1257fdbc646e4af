"""The attention kernels alone: time against context, and speed over the best dense attention by case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from million_cli.report.exhibit import Exhibit, Row, by, grid, join, number, origin, slug, to_float
from million_cli.report.speed import log_times
from million_cli.report.style import DENSE, MARKERS, PALETTE, context_axis, tokens

SHAPE = ("q_heads", "kv_heads", "head_dim", "batch", "dtype")
COLUMNS = (
    ("case", "heads, batch", str),
    ("impl", "kernel", str),
    ("context", "context", lambda cell: tokens(float(cell))),
    ("median_us", "µs", number(".1f")),
    ("tb_per_s", "TB/s", number(".2f")),
    ("ratio_to_best_dense", "dense / this", number(".2f")),
    ("rel_err", "error e-4", number(".2f", 1e4)),
)


def exhibits(rows: Sequence[Row]) -> list[Exhibit]:
    """An exhibit for each GPU: time, and speed-up over dense attention."""
    found = []
    for (device,), members in by(rows, "device").items():
        cases = [row for row in members if _is_timed(row)]
        for row in cases:
            row["case"] = case(row)
            row["series"] = series(row)
        cases = list({(row["case"], row["series"], row["context"]): row for row in cases}.values())
        ours = [row for row in cases if not is_dense(row)]
        if not ours:
            continue
        best = max(ours, key=lambda row: float(row["ratio_to_best_dense"]))
        found.append(
            Exhibit(
                section="Speed against context",
                kind="kernel",
                name=slug("kernels", device),
                title=f"Attention kernels alone, {device}",
                words=(
                    "Left: one decode step of attention; dashed is the best of torch's kernels in 16 bits. "
                    "Right: how many times faster than it, by case; the line is equal speed."
                ),
                alt=(
                    f"Kernel times against context and speed-up by case on {device}. Largest speed-up "
                    f"{float(best['ratio_to_best_dense']):.2f}: {best['series']}, {best['case']}, "
                    f"{tokens(float(best['context']))}. "
                    f"Cases: {join(list(dict.fromkeys(row['case'] for row in ours)))}."
                ),
                paint=lambda figure, cases=cases: paint(figure, cases),  # type: ignore[misc]
                size=(9.6, max(3.6, 1.0 + 0.27 * len(ours))),
                table=grid(ours, COLUMNS),
                data=cases,
                origin=origin(members),
            )
        )
    return found


def _is_timed(row: Row) -> bool:
    """Whether a row is of decode attention and has all that its place in the figure needs."""
    needed = ["q_heads", "kv_heads", "head_dim", "context", "median_us", "ratio_to_best_dense"]
    if row.get("m_keys") or row.get("m_values"):
        needed += ["m_keys", "m_values"]
    return all(row.get(key) for key in needed)


def case(row: Row) -> str:
    """Heads and batch; also dtype and head_dim where they are not float16 and 128."""
    rest = [row[key] for key, usual in (("dtype", "float16"), ("head_dim", "128")) if row.get(key) != usual]
    return ", ".join([f"{row['q_heads']}/{row['kv_heads']}", f"batch {row['batch']}", *filter(None, rest)])


def series(row: Row) -> str:
    """The kernel with its bits, and its layout where that is not in the name."""
    if is_dense(row):
        return "dense"
    sides = [8 * float(row[key]) / float(row["head_dim"]) for key in ("m_keys", "m_values")]
    bits = f"{sides[0]:g} bits" if sides[0] == sides[1] else f"{sides[0]:g}+{sides[1]:g} bits"
    layout = "" if row.get("layout", "fragment") == "fragment" else row["layout"]
    return ", ".join(filter(None, [row["impl"], layout, bits]))


def is_dense(row: Row) -> bool:
    """Whether a kernel reads keys and values as they are."""
    return not row.get("m_keys")


def paint(figure: Any, rows: Sequence[Row]) -> None:
    """Time against context of the shapes measured at several; a bar of speed-up for each of our kernels."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    contexts: set[float] = set()
    shapes = by(rows, "case")
    colours = {name: PALETTE[index % 10] for index, (name,) in enumerate(shapes)}
    for (name,), members in shapes.items():
        dense: dict[float, float] = {}
        for row in members:
            if is_dense(row):
                context = float(row["context"])
                dense[context] = min(float(row["median_us"]), dense.get(context, float("inf")))
        if len(dense) < 2:
            continue
        contexts |= set(dense)
        left.plot(
            sorted(dense),
            [dense[c] for c in sorted(dense)],
            color=colours[name],
            linestyle="--",
            linewidth=1.2,
        )
        for index, ((kernel,), line) in enumerate(
            by([r for r in members if not is_dense(r)], "series").items()
        ):
            points = sorted((float(row["context"]), float(row["median_us"])) for row in line)
            if len(points) < 2:
                continue
            left.plot(
                *zip(*points, strict=True),
                color=colours[name],
                marker=MARKERS[index],
                markersize=5,
                linewidth=1.5,
                label=f"{name}: {kernel}",
            )
    if contexts:
        context_axis(left, contexts)
        log_times(left)
        left.legend(loc="upper left", fontsize=7.5)
    left.set_title("time (µs), dashed: best dense")
    ours = [row for row in rows if not is_dense(row) and to_float(row["ratio_to_best_dense"]) is not None]
    names = [
        f"{row['case']}, {tokens(float(row['context']))}, {row['series'].removeprefix('million ')}"
        for row in ours
    ]
    ratios = [float(row["ratio_to_best_dense"]) for row in ours]
    bars = right.barh(range(len(ours)), ratios, color=[colours[row["case"]] for row in ours], height=0.7)
    right.bar_label(bars, fmt="%.2f", padding=3, fontsize=7.5)
    right.set_yticks(range(len(ours)), names, fontsize=7.5)
    right.axvline(1, **DENSE)
    right.invert_yaxis()
    right.set_xlim(0, 1.15 * max(ratios))
    right.grid(axis="y", visible=False)
    right.set_title("times faster than the best dense kernel")
