"""pFedMe: the global model is trained so that every client's own, held near it, is good.

Dinh, Tran & Nguyen 2020, "Personalized federated learning with Moreau envelopes", algorithm 1. The objective is the
mean of the envelopes F_i(w) = min over t of f_i(t) + lambda / 2 |t - w|^2. In every local step, with one minibatch:

    t_i ~ argmin f_i(t) + lambda / 2 |t - w_i|^2        by K steps t <- t - lr (g_i(t) + lambda (t - w_i)) from w_i
    w_i <- w_i - eta lambda (w_i - t_i)                 the gradient of the envelope
    x <- x + server(mean over the cohort of (w_i - x))  the paper's beta is server.sgd(lr=beta)

Symbols: x server model, from which w_i starts, t_i the client's own model. A client uses the t_i of the model it
receives, found anew whenever it is asked for: clients never seen have one too. With f_i = a_i / 2 (x - b_i)^2, exact
t_i and one local step the fixed point has the weights a_i / (a_i + lambda).
Cost in floats: D up, D down, none kept; K gradients a step, on the general path.
"""

from dataclasses import replace

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_count, check_number, check_plain, check_plan, check_pull
from atoll.algorithms.fedavg import averaging
from atoll.algorithms.personal import Tally, asked, steps
from atoll.cohort import Cohort
from atoll.errors import invalid
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Personal, Update


def pfedme(
    plan: Plan,
    *,
    lam: float = 15.0,
    eta: float = 0.005,
    inner: int = 5,
    personal: Plan | None = None,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """Personal models by Moreau envelopes.

    Args:
        plan: local steps with plain sgd; its lr is that of the inner steps.
        lam: strength of the pull between a client's own and the global model, at least 0.
        eta: rate of the outer step; eta lam is the share of the way from w_i to t_i it takes, below 2.
        inner: steps K on one minibatch towards t_i.
        personal: steps towards the model a client uses; default `plan` without its `schedule` and `work`.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    own = asked(plan, personal)
    check_plain("pfedme", plan, "the inner steps are plain steps on one minibatch")
    check_pull("lam", lam, plan)
    lam = check_pull("lam", lam, own)
    eta = check_number("eta", eta, strict=True)
    inner = check_count("inner", inner)
    if eta * lam >= 2:
        raise invalid("eta", eta, f"below 2 / lam = {2 / lam:g}, else w_i jumps ever further past t_i")
    optimizer = server or sgd()

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        w, buffers, tally = start, cohort.buffers, Tally(cohort)
        for step, rate in steps(cohort, plan):
            t = w
            for k in range(inner):
                said = cohort.minibatch(t, plan, step, buffers=buffers)
                t, buffers = t - rate * (said.gradient + lam * (t - w)), said.buffers
                if not k:
                    tally.add(said, rate)
            w = w - eta * lam * (w - t)
        return cohort.update(tally.trained(w, buffers), start), memory

    def nearby(message: Message, memory: Memory, cohort: Cohort) -> Personal:
        start = cohort.rows(message.vector)
        trained = cohort.sgd(start, own, anchor=message.vector, pull=lam, purpose="personal")
        return Personal(trained.rows, trained.buffers)

    spec = record("pfedme", plan=plan, lam=lam, eta=eta, inner=inner, personal=own, server=optimizer)
    return replace(averaging(spec, local, plan, optimizer), personal=nearby, plans=(plan, own))
