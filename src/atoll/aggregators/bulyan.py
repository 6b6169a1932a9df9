"""Bulyan over Krum. El Mhamdi, Guerraoui & Rouault 2018, "The hidden vulnerability of distributed learning in
Byzantium".

    1. n - 2 f times: take the row Krum prefers among those that are left
    2. of what was taken, for every coordinate: the mean of the n - 4 f values nearest to the median
"""

from typing import Any

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, malicious
from atoll.aggregators.krum import nearest
from atoll.aggregators.meamed import around
from atoll.aggregators.rows import Geometry, Rows, by_columns, middle
from atoll.spec import record


def bulyan(*, byzantine: int | float) -> Aggregator:
    """Krum's favourites one after the other, then the mean around their median in every coordinate; unweighted.

    Bears `byzantine` malicious clients: in every coordinate no value it averages is farther from the median than the
    honest ones that were taken, so that a row that is near in distance but far in one coordinate gains nothing. Needs
    4 byzantine + 3 clients. The rows that were taken have equal shares, the others none.

    Args:
        byzantine: a number of clients, or a fraction of the cohort in [0, 0.25), rounded up.
    """
    expected = malicious("byzantine", byzantine, 0.25)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        f, squared = expected(len(rows)), Geometry(rows).squared
        left, taken = list(range(len(rows))), list[int]()
        while len(taken) < len(rows) - 2 * f:
            among = torch.tensor(left, device=squared.device)
            best = nearest(squared[among][:, among], f, 1) if len(left) > 1 else torch.tensor([True])
            taken.append(left.pop(int(best.to(torch.uint8).argmax())))
        pick = torch.zeros(len(taken), len(rows), dtype=torch.float64, device=squared.device)
        pick[torch.arange(len(taken)), torch.tensor(sorted(taken))] = 1.0
        keep = len(taken) - 2 * f
        row = by_columns(rows.mixed(pick), lambda ordered: around(ordered, middle(ordered), keep))
        return Ruling(row, pick.sum(dim=0) / len(taken))

    return Aggregator(
        record("bulyan", byzantine=byzantine),
        rule,
        "uniform",
        least=lambda count: 4 * expected(count) + 3,
        bears=expected,
        needs=f" (4 byzantine + 3, byzantine={byzantine})",
        spared=lambda count, found: bulyan(byzantine=max(expected(count) - found, 0)),
    )
