"""Ditto: a global model as usual, and beside it a model of every client's own, pulled towards the global one.

Li, Hu, Beirami & Smith 2021, "Ditto: Fair and robust federated learning through personalization", algorithm 1.

    x by federated averaging
    v_i <- v_i - eta (g_i(v_i) + lambda (v_i - x))       with x as received in this round

Symbols: x server model, v_i the client's own, lambda the pull: 0 is training alone, a large one the global model. For
f_i = a_i / 2 (v - b_i)^2 the model v_i tends to (a_i b_i + lambda x) / (a_i + lambda). v_i begins as the first model
the client receives, and is the global one for clients never seen.
Cost in floats: D up, D down, D + B kept; local training twice.
"""

from dataclasses import replace

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_plan, check_pull
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.personal import keeper, kept
from atoll.cohort import Cohort
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Update


def ditto(plan: Plan, *, lam: float, personal: Plan | None = None, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging with a regularised model for every client.

    Args:
        plan: local training of the global model.
        lam: pull of the personal models towards the global one, at least 0 (the paper uses 0.1 to 2).
        personal: local training of the personal models in a round; default `plan`.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    own = plan if personal is None else personal
    check_plan(own, "personal")
    lam = check_pull("lam", lam, own)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        update = cohort.update(cohort.sgd(start, plan), start)
        renewed = cohort.sgd(
            memory["vector"], own, anchor=message.vector, pull=lam, buffers=memory.get("buffers"), purpose="personal"
        )
        return update, kept(renewed.rows, renewed.buffers)

    return replace(
        fedavg(plan, server=server),
        spec=record("ditto", plan=plan, lam=lam, personal=own, server=server or sgd()),
        client_init=kept,
        local=local,
        personal=keeper,
        plans=(plan, own),
        asynchronous=False,
    )
