"""APFL: every client mixes the global model with one of its own, and may learn how much of each.

Deng, Kamani & Mahdavi 2020, "Adaptive personalized federated learning", algorithm 1 and equation (10). In every local
step, all three from one minibatch:

    m_i = alpha_i v_i + (1 - alpha_i) w_i                       the mixed model, before the step
    w_i <- w_i - eta g_i(w_i)                                   the local version of the global model
    v_i <- v_i - eta alpha_i g_i(m_i)                           the gradient of f_i(m_i) with respect to v_i
    alpha_i <- alpha_i - eta <g_i(m_i), v_i - w_i>              adaptive, kept in [0, 1]
    x <- x + server(mean over the cohort of (w_i - x))

Symbols: x server model, from which w_i starts in every round, v_i the client's own, alpha_i its share. A client uses
alpha_i v_i + (1 - alpha_i) x. v_i begins as the first model received: a client never seen uses the global one.
Cost in floats: D up, D down, D + B + 1 kept; two gradients a step, on the general path.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_number, check_plain, check_plan
from atoll.algorithms.fedavg import averaging
from atoll.algorithms.personal import Tally, kept, steps
from atoll.cohort import Cohort
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Personal, Update


def apfl(plan: Plan, *, alpha: float = 0.5, adaptive: bool = True, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging with a mixture of the global and an own model on every client.

    Args:
        plan: local training with plain sgd, in whose steps both models move together.
        alpha: share of the client's own model, in [0, 1]; where it starts when adaptive.
        adaptive: clients learn their share.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    alpha = check_number("alpha", alpha, most=1.0)
    check_plain("apfl", plan, "both models and their share take plain steps together")
    optimizer = server or sgd()

    def client_init(vector: Tensor, buffers: Tensor) -> Memory:
        return kept(vector, buffers) | {"alpha": vector.new_full((1,), alpha)}

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        w, v, share = start, memory["vector"], memory["alpha"]
        buffers, own = cohort.buffers, memory.get("buffers", cohort.buffers)
        tally = Tally(cohort)
        for step, rate in steps(cohort, plan):
            said = cohort.minibatch(w, plan, step, buffers=buffers)
            mixed = cohort.minibatch(_mixed(share, v, w), plan, step, buffers=own)
            buffers, own = said.buffers, mixed.buffers
            slope = (mixed.gradient * (v - w)).sum(dim=1, keepdim=True)
            w = w - rate * said.gradient
            v = v - rate * share * mixed.gradient
            if adaptive:
                share = (share - rate * slope).clamp(0.0, 1.0)
            tally.add(said, rate)
        renewed = kept(v, own) | {"alpha": share}
        return cohort.update(tally.trained(w, buffers), start), renewed

    def personal(message: Message, memory: Memory, cohort: Cohort) -> Personal:
        rows = _mixed(memory["alpha"], memory["vector"], cohort.rows(message.vector))
        return Personal(rows, memory.get("buffers"))

    spec = record("apfl", plan=plan, alpha=alpha, adaptive=adaptive, server=optimizer)
    base = averaging(spec, local, plan, optimizer)
    return replace(base, client_init=client_init, personal=personal, asynchronous=False)


def _mixed(share: Tensor, own: Tensor, other: Tensor) -> Tensor:
    return torch.lerp(other, own, share)
