"""Updates that are too long are left out. Sun, Kairouz, Suresh & McMahan 2019, "Can you really backdoor federated
learning?", bounds them; a server need not take what an honest client, which clips, would never send.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Transform, as_it_is


def norm_bound(bound: float) -> Transform:
    """Leave a client out of a round whose row, as the server reads it, is longer than a bound, and say so.

    What clients promise with `clip_norm(c)` the server enforces with `norm_bound` behind it, which also bounds the
    sum's sensitivity. `aggregators.norm_bound` shortens such rows instead of refusing them.

    Args:
        bound: largest L2 norm of a row (averaged part, averaged buffers and summed part together), above 0; leave room
            for what stages such as `quantize` add by rounding.
    """
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise invalid("bound", bound, "a finite number above 0")
    # A row that was clipped to the very bound may be longer by rounding.
    most = bound * (1 + 1e-6)

    def judge(rows: Tensor, finite: Tensor) -> Sequence[str]:
        return [_reason(norm) for norm in rows.double().norm(dim=1).tolist()]

    def _reason(norm: float) -> str:
        if not math.isfinite(norm):
            return "its norm is not finite"
        return "" if norm <= most else f"its norm {norm:g} is above the bound of {bound:g}"

    return Transform(
        record("norm_bound", bound=bound),
        as_it_is,
        lossless=True,
        bound=lambda before: most if before is None else min(before, most),
        judge=judge,
    )
