"""The geometric median: the point of least summed distance to the rows.

Pillutla, Kakade & Harchaoui 2022, "Robust aggregation for federated learning" (RFA), algorithm 2 (smoothed Weiszfeld).

    beta_i = 1 / max(nu, |v - x_i|);  v <- sum_i beta_i x_i / sum_i beta_i,  until v stands still

v is a weighted mean of the rows, so every distance follows from their inner products: the iteration costs n^2 a
step, and the rows are read three times in all.
"""

from typing import Any

from torch import Tensor

from atoll.aggregators.base import Aggregator, Ruling
from atoll.aggregators.rows import Geometry, Rows
from atoll.errors import invalid
from atoll.spec import record

STEPS = 100_000
"""Steps after which the iteration is given up as it is."""


def geometric_median(*, smoothing: float = 1e-6, tolerance: float = 1e-10) -> Aggregator:
    """The point whose distances to all rows have the least sum, unweighted.

    Bears fewer than half of the clients being malicious: with f of n it stays within 2 (n - f) / (n - 2 f) honest radii
    of any centre.

    Args:
        smoothing: nu, in units of the least median distance of a row from the others.
        tolerance: a step this short ends the iteration, in the same units.
    """
    for name, value in (("smoothing", smoothing), ("tolerance", tolerance)):
        if isinstance(value, bool) or not 0 < value < 1:
            raise invalid(name, value, "a number above 0 and below 1")

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        geometry = Geometry(rows)
        share = weiszfeld(geometry, smoothing, tolerance)
        return Ruling(geometry.sum(share).to(rows.dtype), share)

    return Aggregator(
        record("geometric_median", smoothing=smoothing, tolerance=tolerance),
        rule,
        "uniform",
        bears=lambda count: (count - 1) // 2,
    )


def weiszfeld(geometry: Geometry, smoothing: float, tolerance: float) -> Tensor:
    """Weights [n] of the rows in their geometric median."""
    products, own = geometry.products, geometry.products.diagonal()
    away = geometry.squared.sort(dim=1).values[:, len(own) // 2].sqrt()
    unit = float(away.min())
    if not unit:  # at least half of the rows are the same one
        share = (own == 0).double()  # relative to that row
        return share / share.sum()
    # Where several points are medians (rows in pairs, on a line) the start decides; it does not single out a row.
    share = 1 / away
    share /= share.sum()
    for _ in range(STEPS):
        toward = products @ share
        apart = (own - 2 * toward + share @ toward).clamp(min=0).sqrt()
        renewed = 1 / apart.clamp(min=smoothing * unit)
        renewed /= renewed.sum()
        step = renewed - share
        share = renewed
        if float((step @ products @ step).clamp(min=0)) <= (tolerance * unit) ** 2:
            break
    return share
