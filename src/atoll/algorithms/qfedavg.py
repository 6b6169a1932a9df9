"""q-FedAvg: clients with a larger loss count for more, so that the model serves all more equally.

Li, Sanjabi, Beirami & Smith 2020, "Fair resource allocation in federated learning", algorithm 2, for the objective
sum_i p_i F_i(x)^(q + 1) / (q + 1).

    d_i = L (x - y_i)                                    after local steps from x to y_i
    h_i = q F_i(x)^(q - 1) |d_i|^2 + L F_i(x)^q
    x <- x - sum_i p_i F_i(x)^q d_i / sum_i p_i h_i

Symbols: x server model, y_i client model, F_i the client's mean loss on its training examples, L = 1 / lr the
Lipschitz constant by which the step is found, p_i the aggregator's weights. The paper draws clients with probability
p_i and adds them up unweighted; here all are weighted, which is the same objective. With q = 0 it is federated
averaging; large q tends to the best worst client.
Cost in floats: D + 1 up, D down, none kept; one more forward over a client's examples.
"""

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_number, check_plain, check_plan
from atoll.cohort import Cohort
from atoll.errors import DataError
from atoll.local import Plan
from atoll.spec import record
from atoll.vectors import Aggregate, Update

LEAST = 1e-10
"""Losses below this count as this: with q below 1 the power of a loss of nought is infinite."""


def qfedavg(plan: Plan, *, q: float, lipschitz: float | None = None) -> Algorithm:
    """Federated averaging that is fair to clients with a large loss.

    Args:
        plan: local training with plain sgd, as L is the reciprocal of its rate.
        q: how much fairness, at least 0 (the paper uses 0.001 to 15).
        lipschitz: L; default 1 / lr.

    Raises:
        InvalidArgument: local training that is not plain sgd.
        DataError: in a round, when a client's loss is negative.
    """
    check_plan(plan)
    check_number("q", q)
    if lipschitz is not None:
        check_number("lipschitz", lipschitz, strict=True)
    check_plain("qfedavg", plan, "its server step is found from L = 1 / lr, the length of a plain step")
    constant = 1 / plan.lr if lipschitz is None else lipschitz

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        loss = cohort.loss(start)
        if bool((loss < 0).any()):
            worst = cohort.clients[int(loss[:, 0].argmin())]
            raise DataError(
                f"the mean loss of client {worst!r} is {float(loss.min()):g}: qfedavg raises losses to the power "
                f"q={q:g} and needs them to be at least 0. Choose another loss, or fedavg."
            )
        loss = loss.clamp(min=LEAST)
        trained = cohort.sgd(start, plan)
        change = constant * cohort.shared(trained.minus(start))
        lengths = change.square().sum(dim=1, keepdim=True)
        height = q * loss ** (q - 1) * lengths + constant * loss**q
        update = cohort.update(trained, start, sums=cohort.weights.to(height) * height)
        return update.replace(mean=loss**q * change), memory

    def step(state: Message, aggregate: Aggregate) -> Message:
        return Message(state.vector + aggregate.mean / (aggregate.sums[0] / aggregate.weight))

    return Algorithm(
        record("qfedavg", plan=plan, q=q, lipschitz=constant),
        init=Message,
        broadcast=lambda state: state,
        local=local,
        step=step,
        sums=lambda size: 1,
        scalars=True,
        plans=(plan,),
    )
