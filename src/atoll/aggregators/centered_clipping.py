"""Centred clipping. Karimireddy, He & Jaggi 2021, "Learning from history for Byzantine robust optimization".

v <- v + mean_i (x_i - v) min(1, tau / |x_i - v|),  some times; v of the round before is where it begins
"""

from typing import Any

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling
from atoll.aggregators.rows import FAR, Rows, distances_from
from atoll.errors import invalid
from atoll.spec import record


def centered_clipping(*, radius: float, iterations: int = 1) -> Aggregator:
    """The mean of what is left of the rows when each is clipped to a ball around the round before's result; unweighted.

    Bears fewer than half of the clients being malicious: f of n move the centre by at most iterations * radius * f / n
    in a round beside what the others do. The centre is carried from round to round and checkpointed; on a plain matrix
    it is nought.

    Args:
        radius: tau, in units of the update: about the distance honest updates have from their mean.
        iterations: how often the centre moves in a round.
    """
    if isinstance(radius, bool) or not 0 < radius < float("inf"):
        raise invalid("radius", radius, "a finite number above 0")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise invalid("iterations", iterations, "an integer of at least 1")

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        centre = state.double()
        share = torch.zeros(len(rows), dtype=torch.float64)
        for _ in range(iterations):
            # A row at the centre is left where it is: nothing is divided by nought.
            share = radius / distances_from(rows, centre).clamp(min=radius) / len(rows)
            moved = torch.empty_like(centre)
            for a, block in rows.blocks():
                old = centre[a : a + block.shape[1]]
                new = old.clone()
                for row, part in zip(block, share.tolist(), strict=True):
                    new.add_((row.double() - old).clamp_(-FAR, FAR), alpha=part)
                moved[a : a + block.shape[1]] = new
            centre = moved
        row = centre.to(rows.dtype)
        return Ruling(row, share, row)

    return Aggregator(
        record("centered_clipping", radius=radius, iterations=iterations),
        rule,
        "uniform",
        bears=lambda count: (count - 1) // 2,
        init=lambda row: row,
    )
