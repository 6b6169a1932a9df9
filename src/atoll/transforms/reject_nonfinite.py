"""Updates that are not finite are left out, and the round goes on."""

from collections.abc import Sequence

from torch import Tensor

from atoll.spec import record
from atoll.transforms.base import Transform, as_it_is


def reject_nonfinite() -> Transform:
    """Leave a client out of a round whose update, loss, weight or memory holds a NaN or an infinity, and say so.

    A deployment does this always, and so does every robust rule. In a simulation under the mean such a client ends the
    run, because it usually means that training diverged; with this stage it is left out as in a deployment.
    """

    def judge(rows: Tensor, finite: Tensor) -> Sequence[str]:
        return ["" if fine else "the update or loss is not finite" for fine in finite.tolist()]

    return Transform(record("reject_nonfinite"), as_it_is, lossless=True, judge=judge)
