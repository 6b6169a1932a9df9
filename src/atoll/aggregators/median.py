"""The coordinate-wise median. Yin, Chen, Ramchandran & Bartlett 2018, "Byzantine-robust distributed learning"."""

import torch
from torch import Tensor

from atoll.aggregators.base import Aggregator
from atoll.spec import record


def median() -> Aggregator:
    """The median of every coordinate, unweighted; of an even number of clients the midpoint of the middle two.

    Bears fewer than half of the clients being malicious. The rule acts on the averaged and the summed part together;
    the summed part becomes the number of clients times its median.
    """

    def rule(rows: Tensor, weights: Tensor) -> Tensor:
        ordered = rows.sort(dim=0).values
        low, high = ordered[(len(rows) - 1) // 2], ordered[len(rows) // 2]
        # Halving first keeps the sum of two huge values finite.
        return torch.where(low == high, low, low / 2 + high / 2)

    return Aggregator(record("median"), rule, "uniform")
