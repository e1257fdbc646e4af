"""Budgets of bits: the codes of each layer for a given mean over all layers."""

from __future__ import annotations

from collections.abc import Sequence

from million_cli.errors import UserError
from million_cli.pq.codebook import ProductQuantizer
from million_cli.pq.transform import Transform


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[int], budget: int) -> list[int]:
    """The choice of each item with the least sum of costs, with a sum of sizes of at most `budget`.

    costs[i][j] is the cost of choice j for item i, sizes[j] the size of choice j.  Exact, by dynamic
    programming over the sums of sizes; among equal costs the smaller sum wins.

    Raises:
        UserError: the smallest choices exceed the budget.

    >>> allocate([[9.0, 1.0], [3.0, 2.0], [8.0, 4.0]], sizes=[1, 2], budget=5)
    [1, 0, 1]
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by sum of sizes
    for item in costs:
        extended: dict[int, tuple[float, list[int]]] = {}
        for total, (cost, choices) in best.items():
            for j, size in enumerate(sizes):
                if total + size > budget:
                    continue
                candidate = cost + item[j]
                if total + size not in extended or candidate < extended[total + size][0]:
                    extended[total + size] = (candidate, [*choices, j])
        best = extended
    if not best:
        raise UserError(f"a budget of {budget / len(costs):g} is below the smallest choice, {min(sizes)}")
    return min((cost, total, choices) for total, (cost, choices) in best.items())[2]


def assemble(parts: Sequence[tuple[Sequence[int], ProductQuantizer]]) -> ProductQuantizer:
    """Assemble one side from parts: each is the positions of some layers and their quantizer.

    A single part of all layers is returned as it is; otherwise the scope must be layer or head.
    """
    if len(parts) == 1:
        return parts[0][1]
    placed = {at: side.layer(i) for positions, side in parts for i, at in enumerate(positions)}
    layers = [placed[at] for at in range(len(placed))]
    transforms = [layer.transform for layer in layers]
    return ProductQuantizer(
        tuple(layer.spec for layer in layers),
        parts[0][1].scope,
        tuple(layer.centroids for layer in layers),
        None if None in transforms else Transform.stack([t for t in transforms if t is not None]),
    )
