"""The weighted mean, streamed in float64: one sum in memory whatever the cohort."""

from typing import Literal

from atoll.aggregators.base import Aggregator, check_weights
from atoll.errors import invalid
from atoll.spec import record
from atoll.vectors import Weights


def mean(
    *,
    weights: Literal["examples", "uniform"] | Weights = "examples",
    denominator: Literal["realised", "expected"] = "realised",
) -> Aggregator:
    """Average updates by weight.

    Args:
        weights: "examples" (McMahan et al. 2017), "uniform", or callable(examples [1, 1], [client]) -> weight [1, 1],
            called for one client at a time, as at a site.
        denominator: divide by the weight of the clients that took part ("realised"), or by the expected cohort size
            ("expected"; needs weights="uniform"), which does not depend on who was drawn.
    """
    check_weights(weights)
    if denominator not in ("realised", "expected"):
        raise invalid("denominator", denominator, '"realised" or "expected"')
    if denominator == "expected" and weights != "uniform":
        raise invalid("denominator", denominator, '"realised" unless weights="uniform"', 'Set weights="uniform".')
    return Aggregator(record("mean", weights=weights, denominator=denominator), None, weights, denominator)
