"""Nearest-neighbour mixing. Allouah, Farhadkhani, Guerraoui, Gupta, Pinot & Stephan 2023, "Fixing by mixing: a recipe
for optimal Byzantine ML under heterogeneity", algorithm 2.

    x_i <- mean of the n - f rows nearest to x_i, itself among them; then another rule
"""

from typing import Any

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, check_then, composed, malicious, spared
from atoll.aggregators.rows import Geometry, Rows
from atoll.spec import record


def nnm(*, byzantine: int | float, then: Aggregator) -> Aggregator:
    """Replace every row by the mean of its n - byzantine nearest ones, then apply another rule; unweighted.

    Honest rows that differ because their clients do come near each other, so that the rule behind has less to tell
    apart. Bears what `then` bears, at most `byzantine`. Needs 2 byzantine + 1 clients, or what `then` needs.

    Args:
        byzantine: a number of clients, or a fraction of the cohort in [0, 0.5), rounded up.
        then: the rule behind it, with the same number.
    """
    expected = malicious("byzantine", byzantine)
    check_then(then)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        near = Geometry(rows).squared.sort(dim=1, stable=True).indices[:, : len(rows) - expected(len(rows))]
        mix = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=near.device)
        mix.scatter_(1, near, 1 / near.shape[1])
        ruling = composed(then, rows.mixed(mix), weights, state)
        return ruling._replace(share=None if ruling.share is None else ruling.share @ mix)

    return Aggregator(
        record("nnm", byzantine=byzantine, then=then),
        rule,
        "uniform",
        least=lambda count: max(2 * expected(count) + 1, then.least(count)),
        bears=lambda count: min(expected(count), then.bears(count)),
        needs=f" (2 byzantine + 1, byzantine={byzantine}{'; then' + then.needs if then.needs else ''})",
        spared=lambda count, found: nnm(byzantine=max(expected(count) - found, 0), then=spared(then, count, found)),
        init=then.init,
        rooted=then.rooted,
    )
