"""FedDyn: every client's loss is bent by a linear term it learns, until all local optima are the optimum of the whole.

Acar, Zhao, Navarro, Mattina, Whatmough & Saligrama 2021, "Federated learning based on dynamic regularization",
algorithm 1.

    y_i ~ argmin f_i(y) - <l_i, y> + alpha / 2 |y - x|^2     by steps  y_i <- y_i - eta (g_i - l_i + alpha (y_i - x))
    l_i <- l_i - alpha (y_i - x)
    h <- h - (alpha / N) sum over the cohort of (y_i - x)
    x <- mean over the cohort of y_i - h / alpha

Symbols: x server model, y_i client model, l_i the client's term, h the server's, N clients in the *population*. The
mean is unweighted as in the paper, whatever the aggregator's weights; h follows from it, so that it costs nothing more
to send. A stage that changes updates (clip_norm) or a robust rule changes the server's h but not what clients keep.
The fixed point is the optimum of the unweighted mean of the clients' losses.
Cost in floats: D up, D down, D kept by each client and by the server.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_number, check_plain, check_plan, check_pull
from atoll.cohort import Cohort
from atoll.local import Plan
from atoll.spec import record
from atoll.vectors import Aggregate, Update


class State(NamedTuple):
    """Server memory."""

    vector: Tensor  # [D] model x
    term: Tensor  # [D] h


def feddyn(plan: Plan, *, alpha: float) -> Algorithm:
    """Federated averaging with a dynamic regulariser on every client.

    Args:
        plan: local training with plain sgd. The nearer it comes to the local optimum, the sooner the terms are right;
            momentum and Adam are refused: what a client learns of its slope is then not what its steps saw.
        alpha: strength of the pull, above 0 (the paper uses 0.001 to 0.1). Small values learn fast and are less stable.
    """
    check_plan(plan)
    check_number("alpha", alpha, strict=True)
    alpha = check_pull("alpha", alpha, plan)
    check_plain(
        "feddyn", plan, "alpha (y_i - x) is then not what the local gradients left over",
        "Put weight decay into the loss.",
    )  # fmt: skip

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start, term = cohort.rows(message.vector), memory["term"]
        trained = cohort.sgd(start, plan, anchor=message.vector, pull=alpha, shift=-term)
        update = cohort.update(trained, start, weight=torch.ones_like(cohort.weights))
        return update, {"term": torch.sub(term, trained.minus(start), alpha=alpha)}

    def step(state: State, aggregate: Aggregate) -> State:
        # The sum over the cohort, whatever it was divided by; every client weighs one.
        term = torch.sub(state.term, aggregate.mean, alpha=alpha * aggregate.divisor / aggregate.population)
        return State(state.vector + aggregate.mean - term / alpha, term)

    return Algorithm(
        record("feddyn", plan=plan, alpha=alpha),
        init=lambda vector: State(vector, torch.zeros_like(vector)),
        broadcast=lambda state: Message(state.vector),
        client_init=lambda vector, buffers: {"term": torch.zeros_like(vector)},
        local=local,
        step=step,
        plans=(plan,),
    )
