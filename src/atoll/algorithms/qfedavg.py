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
High powers leave the range of numbers: all losses are divided by c, the mean loss of the round before (1 in the first
round), which changes d_i's and h_i's factors alike and not the step. A first round that leaves the range all the same
only measures c.
Cost in floats: D + 3 up, D + 1 down, none kept; one more forward over a client's examples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory
from atoll.algorithms.checks import check_number, check_plain, check_plan
from atoll.cohort import Cohort
from atoll.errors import DataError, InvalidArgument, NonFiniteError
from atoll.local import Plan
from atoll.spec import record
from atoll.vectors import Aggregate, Update

LEAST = 1e-10
"""Losses below this count as this: with q below 1 the power of a loss of nought is infinite."""


ROOM = 2.0**20
"""Clients' numbers stay this many times below the largest one, so that they can be added up."""


class State(NamedTuple):
    """Server memory, and what clients receive."""

    vector: Tensor  # [D] model x
    reference: Tensor  # [1] mean loss c of the last round; 0 before there is one


def qfedavg(plan: Plan, *, q: float, lipschitz: float | None = None) -> Algorithm:
    """Federated averaging that is fair to clients with a large loss.

    Args:
        plan: local training with plain sgd, as L is the reciprocal of its rate.
        q: how much fairness, at least 0 (the paper uses 0.001 to 15).
        lipschitz: L; default 1 / lr, which a plan with a schedule does not have.

    Raises:
        InvalidArgument: local training that is not plain sgd, or has a schedule where L is not given.
        DataError: in a round, when a client's loss is negative.
        NonFiniteError: in a round, when losses raised to the power q leave the range of numbers.
    """
    check_plan(plan)
    q = check_number("q", q)
    if lipschitz is not None:
        lipschitz = check_number("lipschitz", lipschitz, strict=True)
    check_plain("qfedavg", plan, "its server step is found from L = 1 / lr, the length of a plain step")
    if lipschitz is None and plan.schedule is not None:
        raise InvalidArgument(
            "qfedavg takes L = 1 / lr from the plan, whose schedule makes lr another one in every round: "
            "give lipschitz=, or leave schedule= out."
        )
    constant = 1 / plan.lr if lipschitz is None else lipschitz

    def local(message: State, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        loss = cohort.loss(start).double()
        if bool((loss < 0).any()):
            worst = cohort.clients[int(loss[:, 0].argmin())]
            raise DataError(
                f"the mean loss of client {worst!r} is {float(loss.min()):g}: qfedavg raises losses to the power "
                f"q={q:g} and needs them to be at least 0. Choose another loss, or fedavg."
            )
        loss = loss.clamp(min=LEAST)
        trained = cohort.sgd(start, plan)
        change = constant * cohort.shared(trained.minus(start))
        length = torch.linalg.vector_norm(change, dim=1, keepdim=True, dtype=torch.float64)
        given = message.reference.double()
        reference = torch.where(given > 0, given, 1.0)
        ratio, weights = loss / reference, cohort.weights.to(loss)
        power = ratio**q
        height = weights * (q * ratio ** (q - 1) / reference * length**2 + constant * power)
        most = torch.finfo(start.dtype).max / ROOM
        within = (height < most) & (weights * power * length < most) & (power < most)
        outside = torch.isfinite(loss) & torch.isfinite(length) & ~within
        sums = torch.cat((torch.where(outside, 0.0, height), weights * loss, outside.double()), dim=1)
        update = cohort.update(trained, start, sums=sums.to(start))
        return update.replace(mean=torch.where(outside, 0.0, power).to(start) * change), memory

    def step(state: State, aggregate: Aggregate) -> State:
        height, loss, outside = aggregate.sums / aggregate.weight
        renewed = loss[None].clamp(min=LEAST)
        fine = not float(outside) and bool(torch.isfinite(height))
        if not fine and float(state.reference):
            raise NonFiniteError(
                f"round {aggregate.round + 1}: losses raised to the power q={q:g} leave the range of "
                f"{str(state.vector.dtype).removeprefix('torch.')} (their mean is {float(loss):g}, and was "
                f"{float(state.reference):g} in the round before). Lower q, or lr if losses grow. "
                "The model of the round before is kept."
            )
        if not fine or not float(height):  # nothing but the mean loss can be told
            return State(state.vector, renewed)
        return State(state.vector + aggregate.mean / height, renewed)

    return Algorithm(
        record("qfedavg", plan=plan, q=q, lipschitz=constant),
        init=lambda vector: State(vector, vector.new_zeros(1)),
        broadcast=lambda state: state,
        local=local,
        step=step,
        sums=lambda size: 3,
        scalars=True,
        plans=(plan,),
    )
