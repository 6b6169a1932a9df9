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
    cap: float | None = None,
) -> Aggregator:
    """Average updates by weight.

    Args:
        weights: "examples" (McMahan et al. 2017), "uniform", or callable(examples [1, 1], [client]) -> weight [1, 1],
            called for one client at a time, as at a site.
        denominator: divide by the weight of the clients that took part ("realised"), or by the expected cohort size
            ("expected"; needs weights="uniform" or a cap), which does not depend on who was drawn.
        cap: larger weights count as this. All are divided by it, so that a client weighs at most 1; with
            denominator="expected" the mean is then shorter where most weigh less: make it up with the server's lr.
    """
    check_weights(weights)
    if denominator not in ("realised", "expected"):
        raise invalid("denominator", denominator, '"realised" or "expected"')
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < float("inf")):
        raise invalid("cap", cap, "a finite number above 0, in units of the weights")
    if cap is not None and weights == "uniform":
        raise invalid("cap", cap, 'left out with weights="uniform"', "Everybody weighs 1.")
    if denominator == "expected" and weights != "uniform" and cap is None:
        raise invalid(
            "denominator",
            denominator,
            '"realised" unless weights="uniform" or capped',
            'Set weights="uniform", or cap=.',
        )
    return Aggregator(
        record("mean", weights=weights, denominator=denominator, cap=cap), None, weights, denominator, cap=cap
    )
