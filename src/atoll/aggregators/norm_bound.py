"""Norm bounding. Sun, Kairouz, Suresh & McMahan 2019, "Can you really backdoor federated learning?".

x_i <- x_i min(1, c / |x_i|), then another rule
"""

from typing import Any

from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling, check_then, composed, spared
from atoll.aggregators.mean import mean
from atoll.aggregators.rows import Rows, distances_from
from atoll.errors import invalid
from atoll.spec import record


def norm_bound(bound: float | None = None, *, then: Aggregator | None = None) -> Aggregator:
    """Scale rows that are longer than a bound down to it, then apply another rule.

    It bounds what a malicious client can do in a round, to the bound's share of the mean, and removes nothing: a small
    steady push gets through. Before the mean, with the median of the norms as the bound, it bears fewer than half of
    the clients being malicious in this sense; before another rule, what that rule bears.

    Args:
        bound: largest L2 norm of a row; default the median of this round's norms.
        then: the rule behind it; default the unweighted mean.
    """
    if bound is not None and (isinstance(bound, bool) or not 0 < bound < float("inf")):
        raise invalid("bound", bound, "a finite number above 0, or None for the median of the norms")
    behind = mean(weights="uniform") if then is None else then
    check_then(behind)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        norms = distances_from(rows, rows.matrix.new_zeros(rows.length).double())
        limit = float(norms.sort().values[(len(norms) - 1) // 2]) if bound is None else bound
        factor = limit / norms.clamp(min=limit) if limit else (norms == 0).double()
        ruling = composed(behind, rows.mixed(factor.diag()), weights, state)
        return ruling._replace(share=None if ruling.share is None else ruling.share * factor)

    return Aggregator(
        record("norm_bound", bound=bound, then=behind),
        rule,
        "uniform",
        least=behind.least,
        bears=lambda count: (count - 1) // 2 if behind.averages else behind.bears(count),
        needs=behind.needs,
        spared=lambda count, found: norm_bound(bound, then=spared(behind, count, found)),
        init=behind.init,
        rooted=behind.rooted,
    )
