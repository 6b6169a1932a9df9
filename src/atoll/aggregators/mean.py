"""The weighted mean, streamed in float64: one sum in memory whatever the cohort."""

import math
from typing import Literal

from atoll.aggregators.base import CAP, Aggregator, check_weights
from atoll.errors import invalid
from atoll.spec import record
from atoll.vectors import Weights


def mean(
    *,
    weights: Literal["examples", "uniform"] | Weights = "examples",
    denominator: Literal["realised", "expected"] = "realised",
    cap: float = CAP,
    clip: float | None = None,
) -> Aggregator:
    """Average updates by weight.

    Args:
        weights: "examples" (McMahan et al. 2017), "uniform", or callable(examples [1, 1], [client]) -> weight [1, 1],
            called for one client at a time, as at a site.
        denominator: divide by the weight of the clients that took part ("realised"), or by the expected cohort size
            ("expected"; needs weights="uniform" or a clip), which does not depend on who was drawn.
        cap: largest weight a client may have. In a simulation, where weights are true, a client above it is refused
            before any work; a site, or an attacker, that claims more is left out of the round.
        clip: larger weights count as this. All are divided by it, so that a client weighs at most 1, and whoever claims
            more is left out; with denominator="expected" the mean is then shorter where most weigh less: make it up
            with the server's lr.
    """
    check_weights(weights)
    if denominator not in ("realised", "expected"):
        raise invalid("denominator", denominator, '"realised" or "expected"')
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < math.inf:
        raise invalid("cap", cap, "a finite number above 0, in units of the weights")
    if clip is not None:
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip < math.inf:
            raise invalid("clip", clip, "a finite number above 0, in units of the weights")
        if weights == "uniform":
            raise invalid("clip", clip, 'left out with weights="uniform"', "Everybody weighs 1.")
        if cap != CAP:
            raise invalid(
                "cap", cap, "left out with clip=", "Whatever is above clip counts as clip: nobody is refused."
            )
    if denominator == "expected" and weights != "uniform" and clip is None:
        raise invalid(
            "denominator", denominator, '"realised" unless weights="uniform" or clipped',
            'Set weights="uniform", or clip=.',
        )  # fmt: skip
    spec = record("mean", weights=weights, denominator=denominator, cap=float(cap), clip=clip)
    most = math.inf if weights == "uniform" else float(cap) if clip is None else 1.0
    return Aggregator(spec, None, weights, denominator, cap=most, clip=clip)
