"""The coordinate-wise trimmed mean. Yin, Chen, Ramchandran & Bartlett 2018, "Byzantine-robust distributed learning".

With the values of a coordinate in ascending order v_1 <= ... <= v_n and f = drop:

    (v_{f+1} + ... + v_{n-f}) / (n - 2 f)
"""

from typing import Any

from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, malicious
from atoll.aggregators.rows import Rows, average, by_columns
from atoll.spec import record


def trimmed_mean(*, drop: int | float) -> Aggregator:
    """The mean of every coordinate without its `drop` smallest and `drop` largest values, unweighted.

    Bears `drop` malicious clients: every coordinate stays within the range of the others'. Needs 2 drop + 1 clients.

    Args:
        drop: a number of clients, or a fraction of the cohort in [0, 0.5), rounded up.
    """
    expected = malicious("drop", drop)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        f = expected(len(rows))
        return Ruling(by_columns(rows, lambda ordered: average(ordered[f : len(ordered) - f])))

    return Aggregator(
        record("trimmed_mean", drop=drop),
        rule,
        "uniform",
        least=lambda count: 2 * expected(count) + 1,
        bears=expected,
        needs=f" (2 drop + 1, drop={drop})",
        spared=lambda count, found: trimmed_mean(drop=max(expected(count) - found, 0)),
    )
