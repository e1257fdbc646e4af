"""The error of a codebook by layer and head, from its card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from million_cli.errors import UserError
from million_cli.report.exhibit import Exhibit, Grid, Origin, slug

SIDES = ("key", "value")
Errors = dict[str, list[list[float]]]
"""Side -> [L][Hkv] mean squared error over variance."""


def exhibit(path: Path) -> Exhibit:
    """Two heat maps, keys and values; only the card is read, not the tables.

    Raises:
        UserError: no such file, or no codebook with errors in its card.
    """
    card = read_card(path)
    meta = card["meta"]
    errors: Errors = {side: meta[f"{side}_error"] for side in SIDES}
    layers, heads = len(errors["key"]), len(errors["key"][0])
    worst = {
        side: max(
            (error, layer, head) for layer, line in enumerate(errors[side]) for head, error in enumerate(line)
        )
        for side in SIDES
    }
    said = "; ".join(
        f"{side}s {fmean(map(fmean, errors[side])):.4f} on average, " + _worst(worst[side]) for side in SIDES
    )
    recipe = meta.get("recipe", {})
    codes, train = recipe.get("quantizer", {}), recipe.get("train", {})
    sides = {side: card.get(f"{side}s", {}) for side in SIDES}
    lines = [
        ["bits an element", *(f"{_bits(sides[side])}" for side in SIDES)],
        ["scope", *(str(sides[side].get("scope", "–")) for side in SIDES)],
        ["rotation", *(str(codes.get(f"{side}s", {}).get("rotation", "–")) for side in SIDES)],
        ["mean error", *(f"{fmean(map(fmean, errors[side])):.4f}" for side in SIDES)],
        ["least", *(f"{min(map(min, errors[side])):.4f}" for side in SIDES)],
        ["largest", *(f"{worst[side][0]:.4f}" for side in SIDES)],
    ]
    data = [
        {
            "layer": str(layer),
            "head": str(head),
            **{f"{side}_error": repr(errors[side][layer][head]) for side in SIDES},
        }
        for layer in range(layers)
        for head in range(heads)
    ]
    versions = [f"{name} {version}" for name, version in meta.get("versions", {}).items()]
    told = {
        "trainer": train.get("trainer"),
        "tokens": meta.get("tokens"),
        "samples a head": meta.get("samples"),
        "held out": meta.get("held_out"),
        "seed": meta.get("seed"),
    }
    trained = ", ".join(f"{what} {value}" for what, value in told.items() if value is not None)
    judged = (
        f"{meta['held_out']} samples a head held out from training"
        if meta.get("held_out")
        else "the training samples"
    )

    def made(name: str) -> list[str]:
        return [str(meta[name])] if meta.get(name) else []

    return Exhibit(
        section="Error of codebooks",
        kind="codebook",
        name=slug("codebook", path.stem),
        title=path.name,
        words=(
            f"Mean squared error over variance on {judged}, by layer and KV head; 0 is exact, 1 "
            f"as bad as the mean. {_covered(meta)} Calibrated on "
            f"{meta.get('calibration', 'an unnamed text')} ({trained})."
        ),
        alt=f"Heat maps of the error of keys and values over {layers} layers and {heads} KV heads: {said}.",
        paint=lambda figure: paint(figure, errors),
        size=(7.4, min(7.5, 1.5 + 0.3 * layers)),
        table=Grid(["", "keys", "values"], lines, [False, True, True]),
        data=data,
        origin=Origin([str(path)], made("command"), made("commit"), [], versions),
    )


def read_card(path: Path) -> dict[str, Any]:
    """The card of a codebook file.

    Raises:
        UserError: as `exhibit`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no such codebook: {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        card: dict[str, Any] = json.loads(metadata["card"])
        errors = [card["meta"][f"{side}_error"] for side in SIDES]
        if not all(
            isinstance(part, dict)
            for part in (card, card.get("keys", {}), card.get("values", {}), card["meta"].get("versions", {}))
        ):
            raise ValueError("its parts are no objects")
        shapes = {tuple(len(line) for line in error) for error in errors}
        if len(shapes) != 1 or len(set(*shapes)) != 1 or not errors[0][0]:
            raise ValueError("it has no errors for each layer and head")
        if not all(math.isfinite(cell) for error in errors for line in error for cell in line):
            raise ValueError("its errors are no numbers")
    except (
        SafetensorError,
        OSError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise UserError(f"{path} is not a codebook with a readable card: {error}") from error
    return card


def paint(figure: Any, errors: Errors) -> None:
    """Layers downwards, heads across; numbers in the cells where they fit.  Each side has its own scale."""
    for axes, side in zip(figure.subplots(1, 2), SIDES, strict=True):
        values = errors[side]
        low, high = min(map(min, values)), max(map(max, values))
        image = axes.imshow(values, vmin=low, vmax=high, cmap="YlOrRd", aspect="auto")
        if len(values[0]) <= 8 and len(values) <= 16:
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    colour = "white" if value > low + 0.6 * (high - low) else "#222222"
                    axes.text(x, y, f"{value:.4f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(0, len(values[0]), max(1, len(values[0]) // 8)))
        axes.set_yticks(range(0, len(values), max(1, len(values) // 12)))
        axes.set_xlabel("KV head")
        axes.set_ylabel("layer")
        axes.set_title(f"{side}s: error over variance")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02).outline.set_visible(False)


def _covered(meta: dict[str, Any]) -> str:
    positions = meta.get("positions")
    return f"For {'every position' if positions is None else f'the first {positions} positions'} of a text."


def _bits(side: dict[str, Any]) -> str:
    """Mean over the layers of a side, whose codes may differ."""
    try:
        return f"{fmean(s['M'] * s['nbits'] / s['head_dim'] for s in side['specs']):g}"
    except (KeyError, TypeError, ValueError):
        return "–"


def _worst(found: tuple[float, int, int]) -> str:
    error, layer, head = found
    return f"worst {error:.4f} in layer {layer}, head {head}"
