"""SCAFFOLD: local training corrected by control variates, so that clients do not drift apart.

Karimireddy, Kale, Mohri, Reddi, Stich & Suresh 2020, "SCAFFOLD: Stochastic controlled averaging for federated
learning", algorithm 1 (lines in brackets).

    y_i <- y_i - eta (g_i(y_i) - c_i + c)                                   [10]
    c_i+ = gradient of f_i at x                       (option I)            [12]
    c_i+ = c_i - c + (x - y_i) / sum of eta           (option II)           [12]
    x <- x + server(mean over the cohort of (y_i - x))                      [16, 17]
    c <- c + (1/N) sum over the cohort of (c_i+ - c_i)                      [17]

Symbols: x server model, y_i client model, c and c_i server's and client's variates, N clients in the *population*.
A stage that changes updates (clip_norm) or a robust rule changes the server's c but not what clients keep: the
correction is then approximate.
The fixed point is the optimum of the unweighted mean of the clients' losses, whatever the aggregator's weights.
Cost in floats: 2 D up, 2 D down, D kept by each client.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory
from atoll.algorithms.checks import check_plan
from atoll.cohort import Cohort
from atoll.errors import InvalidArgument, invalid
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Aggregate, Update


class State(NamedTuple):
    """Server memory."""

    vector: Tensor  # [D] model x
    variate: Tensor  # [D] control variate c
    server: Any


class Message(NamedTuple):
    """What clients receive."""

    vector: Tensor  # [D] model x
    variate: Tensor  # [D] control variate c


def scaffold(plan: Plan, *, option: Literal[1, 2] = 2, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging without client drift, under full and partial participation.

    Args:
        plan: local training with plain sgd: the formula of option II is wrong under momentum, weight decay or Adam,
            and so is the correction itself.
        option: how a client renews its variate: 1 from the gradient at the received model (one more pass over its
            data), 2 from the steps it took.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    optimizer = server or sgd()
    if option not in (1, 2):
        raise invalid("option", option, "1 or 2")
    if not plan.plain:
        raise InvalidArgument(
            "scaffold corrects plain sgd steps; with momentum, weight_decay, clip or adam its variates are wrong: "
            "use local_sgd(lr=...) without these, and server=atoll.server.sgd(momentum=...) for momentum."
        )

    def init(vector: Tensor) -> State:
        return State(vector, torch.zeros_like(vector), optimizer.init(vector))

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start, own = cohort.rows(message.vector), memory["variate"]
        trained = cohort.sgd(start, plan, shift=message.variate - own)
        if option == 1:
            renewed = cohort.gradient(start)
            return cohort.update(trained, start, sums=renewed - own), {"variate": renewed}
        still = trained.rates <= 0
        learnt = (trained.minus(start) / -trained.rates.masked_fill(still, 1.0)).sub_(message.variate)
        if bool(still.any()):  # who took no step, or none at a rate, has learnt nothing: its variate stays
            learnt.masked_fill_(still, 0.0)
        return cohort.update(trained, start, sums=learnt), {"variate": own + learnt}

    def step(state: State, aggregate: Aggregate) -> State:
        vector, server_state = optimizer.step(state.server, state.vector, aggregate.mean)
        return State(vector, state.variate + aggregate.sums / aggregate.population, server_state)

    return Algorithm(
        record("scaffold", plan=plan, option=option, server=optimizer),
        init=init,
        broadcast=lambda state: Message(state.vector, state.variate),
        client_init=lambda vector, buffers: {"variate": torch.zeros_like(vector)},
        local=local,
        step=step,
        sums=lambda size: size,
        plans=(plan,),
    )
