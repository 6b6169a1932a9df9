"""The mean around the median. Xie, Koyejo & Gupta 2018, "Generalized Byzantine-tolerant SGD", definition 4.

For every coordinate: the mean of the n - f values nearest to its median.
"""

from typing import Any

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, malicious
from atoll.aggregators.rows import Rows, average, by_columns, middle
from atoll.spec import record


def meamed(*, byzantine: int | float) -> Aggregator:
    """The mean of the values nearest to the median of every coordinate, without the `byzantine` farthest; unweighted.

    Bears `byzantine` malicious clients: no value it averages is farther from the median than the farthest of the
    others' is. Needs 2 byzantine + 1 clients. Of two values equally far from the median the smaller counts as nearer.

    Args:
        byzantine: a number of clients, or a fraction of the cohort in [0, 0.5), rounded up.
    """
    expected = malicious("byzantine", byzantine)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        keep = len(rows) - expected(len(rows))
        return Ruling(by_columns(rows, lambda ordered: around(ordered, middle(ordered), keep)))

    return Aggregator(
        record("meamed", byzantine=byzantine),
        rule,
        "uniform",
        least=lambda count: 2 * expected(count) + 1,
        bears=expected,
        needs=f" (2 byzantine + 1, byzantine={byzantine})",
        spared=lambda count, found: meamed(byzantine=max(expected(count) - found, 0)),
    )


def around(ordered: Tensor, centre: Tensor, keep: int) -> Tensor:
    """The mean of the `keep` values of sorted columns [n, b] that are nearest to a centre [b].

    They stand side by side: the window moves on while the value it would gain is nearer than the one it would lose.
    """
    first = torch.zeros(ordered.shape[1], dtype=torch.int64, device=ordered.device)
    for start in range(len(ordered) - keep):
        gained, lost = ordered[start + keep].double() - centre, ordered[start].double() - centre
        first += ((gained <= 0) | (gained.abs() < lost.abs())) & (first == start)
    places = first + torch.arange(keep, device=ordered.device)[:, None]
    return average(ordered.gather(0, places))
