"""The coordinate-wise median. Yin, Chen, Ramchandran & Bartlett 2018, "Byzantine-robust distributed learning"."""

from typing import Any

from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling
from atoll.aggregators.rows import Rows, by_columns, middle
from atoll.spec import record


def median() -> Aggregator:
    """The median of every coordinate, unweighted; of an even number of clients the midpoint of the middle two.

    Bears fewer than half of the clients being malicious: every coordinate stays within the range of the others'. The
    rule acts on the averaged and the summed part together; the summed part becomes the number of clients times its
    median.
    """

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        return Ruling(by_columns(rows, middle))

    return Aggregator(record("median"), rule, "uniform", bears=lambda count: (count - 1) // 2)
