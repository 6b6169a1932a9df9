"""FedProx: local training held near the received model, so that clients may do unequal amounts of work.

Li, Sahu, Zaheer, Sanjabi, Talwalkar & Smith 2020, "Federated optimization in heterogeneous networks", algorithm 2.

    y_i ~ argmin f_i(y) + mu / 2 |y - x|^2        by local steps  y_i <- y_i - eta (g_i(y_i) + mu (y_i - x))
    x <- x + server(sum_i w_i (y_i - x) / sum_i w_i)

Symbols: x server model, as received and fixed during local training, y_i client model, mu strength of the pull. Slow
clients do a part of the steps, by `local_sgd(work=...)`; that is the paper's inexact solution. With mu = 0 it is
federated averaging. On quadratics f_i = a_i / 2 (x - b_i)^2 exact local solutions have the fixed point
sum w_i s_i b_i / sum w_i s_i with s_i = a_i / (a_i + mu): the bias shrinks with mu, and stays.
Cost in floats: D up, D down, none kept.
"""

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_plan, check_pull
from atoll.algorithms.fedavg import averaging
from atoll.cohort import Cohort
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Update


def fedprox(plan: Plan, *, mu: float, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging with a proximal term in local training.

    Args:
        plan: local training; `work=` gives slow clients a part of it.
        mu: strength of the pull towards the received model, at least 0 (the paper uses 0.001 to 1).
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    mu = check_pull("mu", mu, plan)
    optimizer = server or sgd()

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        return cohort.update(cohort.sgd(start, plan, anchor=message.vector, pull=mu), start), memory

    return averaging(record("fedprox", plan=plan, mu=mu, server=optimizer), local, plan, optimizer)
