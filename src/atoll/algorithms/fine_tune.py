"""Federated averaging, and every client's own training of the result: the baseline of personalised learning.

Wang, Mathews, Kiddon, Eichner, Beaufays & Ramage 2019, "Federated evaluation of on-device personalization".

    x by federated averaging;    p_i <- x, then local steps p_i <- p_i - eta g_i(p_i)

Symbols: x server model, p_i the client's model, made anew whenever it is asked for: clients never seen in training
have one too. Cost in floats: D up, D down, none kept.
"""

from dataclasses import replace

from atoll.algorithms.base import Algorithm
from atoll.algorithms.checks import check_plan
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.personal import asked, tuner
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record


def fine_tune(plan: Plan, *, personal: Plan | None = None, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging whose clients use the global model trained further on their own examples.

    Args:
        plan: local training in a round.
        personal: training of the model a client uses; default `plan` without its `schedule` and `work`.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    own = asked(plan, personal)
    spec = record("fine_tune", plan=plan, personal=own, server=server or sgd())
    return replace(fedavg(plan, server=server), spec=spec, personal=tuner(own), plans=(plan, own))
