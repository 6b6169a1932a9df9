"""Minimum-diameter averaging. El Mhamdi, Guerraoui, Guirguis, Hoang & Rouault 2020, "Genuinely distributed Byzantine
machine learning"; the subset is Rousseeuw's 1985.

The mean of the n - f rows whose largest distance from each other is least.
"""

from typing import Any

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, malicious
from atoll.aggregators.krum import selected
from atoll.aggregators.rows import Geometry, Rows
from atoll.spec import record


def mda(*, byzantine: int | float) -> Aggregator:
    """The mean of the tightest n - byzantine rows, unweighted.

    Bears `byzantine` malicious clients: what it averages lies no farther apart than the honest rows do, and holds at
    least one of them. Needs 2 byzantine + 1 clients. The search is exact; its time grows like 2^byzantine at worst.

    Args:
        byzantine: a number of clients, or a fraction of the cohort in [0, 0.5), rounded up.
    """
    expected = malicious("byzantine", byzantine)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        dropped = tightest(Geometry(rows).squared, expected(len(rows)))
        return selected(rows, ~dropped)

    return Aggregator(
        record("mda", byzantine=byzantine),
        rule,
        "uniform",
        least=lambda count: 2 * expected(count) + 1,
        bears=expected,
        needs=f" (2 byzantine + 1, byzantine={byzantine})",
        spared=lambda count, found: mda(byzantine=max(expected(count) - found, 0)),
    )


def tightest(squared: Tensor, drop: int) -> Tensor:
    """Which `drop` rows to leave out so that the diameter of the rest is least: squared distances [n, n] -> bool [n].

    For a diameter, every pair of rows farther apart must lose one of the two: a vertex cover of at most `drop` rows.
    The least diameter for which there is one is found by bisection over the distances there are.
    """
    count = len(squared)
    distances = sorted({0.0, *squared.triu(1).flatten().tolist()})
    low, high = 0, len(distances) - 1
    best = _cover(squared, distances[high], drop) or 0
    while low < high:
        half = (low + high) // 2
        found = _cover(squared, distances[half], drop)
        if found is None:
            low = half + 1
        else:
            best, high = found, half
    dropped = torch.tensor([bool(best >> i & 1) for i in range(count)], device=squared.device)
    # Any rows may be left out to make up the number; those farthest from the rest are.
    spare = squared[:, ~dropped].sum(dim=1).masked_fill(dropped, -torch.inf).sort(descending=True, stable=True).indices
    dropped[spare[: drop - int(dropped.sum())]] = True
    return dropped


def _cover(squared: Tensor, diameter: float, budget: int) -> int | None:
    """At most `budget` rows, as bits, that take one of every pair that is farther apart; None where there are none."""
    far = [sum(1 << j for j, apart in enumerate(row) if apart) for row in (squared > diameter).tolist()]

    def search(gone: int, budget: int) -> int | None:
        degrees = [0 if gone >> i & 1 else (far[i] & ~gone).bit_count() for i in range(len(far))]
        most = max(degrees, default=0)
        if not most:
            return gone
        # Each row that is left out ends as many pairs as it is in.
        if sum(degrees) > 2 * budget * most:
            return None
        row = degrees.index(most)
        found = search(gone | 1 << row, budget - 1)
        if found is not None:
            return found
        others = far[row] & ~gone
        return search(gone | others, budget - most) if most <= budget else None

    return search(0, budget)
