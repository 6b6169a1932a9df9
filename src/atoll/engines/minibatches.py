"""Which examples a local step sees, for many clients at once."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from atoll.engines.base import orders
from atoll.local import Plan


def minibatches(
    plan: Plan,
    step: int,
    key: tuple[int, str, int],
    clients: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    totals: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows that take this step, grouped by pass and true batch size: their numbers [k], and their examples' [k, b].

    Args:
        plan: whose minibatches.
        step: the local step, from 0.
        key: seed, purpose and round of keyed randomness.
        clients: their keys, [C].
        sizes: their numbers of examples, [C].
        totals: local steps they do in all, [C].
    """
    seed, purpose, round = key
    number, place = np.divmod(step, plan.steps_per_pass(sizes))
    size = sizes if plan.batch_size is None else np.minimum(plan.batch_size, sizes)
    begin = place * size
    count = np.minimum(begin + size, sizes) - begin
    active = step < totals
    for pass_number, width in sorted(set(zip(number[active].tolist(), count[active].tolist(), strict=True))):
        members = np.flatnonzero(active & (number == pass_number) & (count == width))
        order = orders(plan, seed, purpose, round, pass_number, clients[members], sizes[members])
        yield members, np.take_along_axis(order, begin[members, None] + np.arange(width), axis=1)
