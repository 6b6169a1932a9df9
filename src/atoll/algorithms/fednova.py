"""FedNova: averages what clients changed by step, so that those who take more steps do not pull the model their way.

Wang, Liu, Liang, Joshi & Poor 2020, "Tackling the objective inconsistency problem in heterogeneous federated
optimization", equations (6) and (9), with the step counts of section 4.

    y_i <- x, then local steps; the change is a weighted sum of gradients:  y_i - x = - sum_k a_ik g_ik
    d_i = (y_i - x) / |a_i|                                      normalised by its own amount of work
    x <- x + server((sum_i p_i |a_i|) (sum_i p_i d_i))           one common amount of work for all

|a_i| is the sum of a client's coefficients. For plain steps it is the sum of its learning rates (K eta for the paper's
tau_i = K); with momentum rho, and with a pull of strength mu towards x, an early gradient acts in later steps too:

    v <- rho v + 1 + mu s,    s <- s - eta v,    |a_i| = -s after the last step, from v = s = 0

which is the recursion of the local steps for a gradient of one. For a constant rate it is the paper's
eta (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho), and (1 - (1 - eta mu)^K) / mu.

Symbols: x server model, y_i client model, p_i = w_i / sum w the aggregator's weights. Equal amounts of work make it
federated averaging. Its fixed point on quadratics f_i = a_i / 2 (x - b_i)^2 has the weights p_i (1 - q_i) / K_i with
q_i = (1 - eta a_i)^K_i, instead of p_i (1 - q_i).
Cost in floats: D + 1 up, D down, none kept.
"""

import numpy as np
import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_plan, check_pull
from atoll.algorithms.fedavg import State
from atoll.cohort import Cohort
from atoll.errors import invalid
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Aggregate, Trained, Update


def fednova(plan: Plan, *, mu: float = 0.0, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging that is right for clients with unequal numbers of local steps.

    Args:
        plan: local training with sgd, with or without momentum; weight decay counts as a part of the loss.
        mu: strength of a pull towards the received model (the paper's proximal variant), at least 0.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    mu = check_pull("mu", mu, plan)
    optimizer = server or sgd()
    if plan.optimizer != "sgd":
        raise invalid(
            "optimizer", plan.optimizer, '"sgd" under fednova',
            "Steps of Adam are no fixed sum of gradients: use server=atoll.server.adam() for adaptive steps.",
        )  # fmt: skip

    if plan.clip is not None and mu:
        raise invalid(
            "clip", plan.clip, "left out under fednova with a pull",
            "A clipped step takes an unknown share of the pull: use mu=0, or fedprox.",
        )  # fmt: skip

    def init(vector: Tensor) -> State:
        return State(vector, optimizer.init(vector))

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        trained = cohort.sgd(start, plan, anchor=message.vector, pull=mu)
        work = _work(plan, mu, cohort.round, trained)
        update = cohort.update(trained, start, sums=(cohort.weights * work).to(start.dtype))
        # A client that took no step has changed nothing, and counts with a change of nought.
        return update.replace(mean=update.mean / work.to(start.dtype).clamp(min=torch.finfo(start.dtype).tiny)), memory

    def step(state: State, aggregate: Aggregate) -> State:
        common = aggregate.sums[0] / aggregate.weight
        return State(*optimizer.step(state.server, state.vector, common * aggregate.mean))

    return Algorithm(
        record("fednova", plan=plan, mu=mu, server=optimizer),
        init=init,
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        sums=lambda size: 1,
        scalars=True,
        plans=(plan,),
    )


def _work(plan: Plan, mu: float, round: int, trained: Trained) -> Tensor:
    """|a_i| of clients, [C, 1] float64: the sum of the coefficients their gradients have in what they changed."""
    if not plan.momentum and not mu:
        return trained.rates.double()
    steps = trained.steps[:, 0].long().cpu().numpy()
    rates = plan.rate(round, np.arange(int(steps.max(initial=0))))
    reached, velocity = [0.0], 0.0
    for rate in rates:
        velocity = plan.momentum * velocity + 1 - mu * reached[-1]
        reached.append(reached[-1] + float(rate) * velocity)
    return torch.from_numpy(np.array(reached)[steps]).to(trained.rates.device)[:, None]
