"""FedExP: a server step that is the longer the more the clients' changes disagree.

Jhunjhunwala, Wang & Joshi 2023, "FedExP: Speeding up federated averaging via extrapolation", algorithm 1.

    D = sum_i p_i D_i                     with D_i = y_i - x, what client i changed
    eta = max(1, sum_i p_i |D_i|^2 / (2 (|D|^2 + epsilon)))
    x <- x + eta D

Symbols: x server model, y_i client model, p_i = w_i / sum w the aggregator's weights (1 / M in the paper), eta the
server's step, epsilon a small number. Clients that agree give eta = 1, which is federated averaging. Long steps
oscillate: the model that is evaluated is the mean of the last two, as the paper advises; clients go on from the last.
Cost in floats: D + 1 up, D down, none kept.
"""

from typing import NamedTuple

from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_number, check_plan
from atoll.cohort import Cohort
from atoll.local import Plan
from atoll.spec import record
from atoll.vectors import Aggregate, Update


class State(NamedTuple):
    """Server memory."""

    vector: Tensor  # [D] model x
    before: Tensor  # [D] the model of the round before


def fedexp(plan: Plan, *, epsilon: float = 1e-3, average: bool = True) -> Algorithm:
    """Federated averaging whose server extrapolates by what clients disagree.

    Args:
        plan: local training.
        epsilon: keeps the step short when the mean change is tiny, above 0, in squared units of the update.
        average: the model that is evaluated is the mean of the last two; False: the last.
    """
    check_plan(plan)
    epsilon = check_number("epsilon", epsilon, strict=True)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        trained = cohort.sgd(start, plan)
        lengths = cohort.shared(trained.minus(start)).square().sum(dim=1, keepdim=True)
        return cohort.update(trained, start, sums=cohort.weights.to(lengths) * lengths), memory

    def step(state: State, aggregate: Aggregate) -> State:
        spread = aggregate.sums[0] / aggregate.weight
        change = aggregate.mean * (aggregate.divisor / aggregate.weight)  # the mean of those that took part
        eta = (spread / (2 * (change.square().sum() + epsilon))).clamp(min=1.0)
        return State(state.vector + eta * aggregate.mean, state.vector)

    return Algorithm(
        record("fedexp", plan=plan, epsilon=epsilon, average=average),
        init=lambda vector: State(vector, vector),
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        model=lambda state: (state.vector + state.before) / 2 if average else state.vector,
        sums=lambda size: 1,
        scalars=True,
        plans=(plan,),
    )
