"""Per-FedAvg: a global model from which one step on a client's own data leads to a good model.

Fallah, Mokhtari & Ozdaglar 2020, "Personalized federated learning with theoretical guarantees: A model-agnostic
meta-learning approach", algorithm 1. The objective is the mean of f_i(w - alpha grad f_i(w)). In every local step, with
three independent minibatches D, D' and D'':

    u_i = w_i - alpha g_i(w_i; D)
    w_i <- w_i - beta (I - alpha H_i(w_i; D'')) g_i(u_i; D')      exact
    w_i <- w_i - beta g_i(u_i; D')                                first order (FO)
    x <- x + server(mean over the cohort of (w_i - x))

Symbols: x server model, from which w_i starts, H_i the Hessian, beta the plan's lr. A client uses the received model
after a step of its own: clients never seen have one too. With f_i = a_i / 2 (x - b_i)^2 and one local step the fixed
point has the weights a_i (1 - alpha a_i)^2, or a_i (1 - alpha a_i) to first order.
Cost in floats: D up, D down, none kept; two gradients a step, and for the exact one a Hessian product, which is found
client by client.
"""

from dataclasses import replace

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_number, check_plain, check_plan
from atoll.algorithms.fedavg import averaging
from atoll.algorithms.personal import Tally, steps, tuner
from atoll.cohort import Cohort
from atoll.local import Plan, local_sgd
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Update


def per_fedavg(
    plan: Plan,
    *,
    alpha: float,
    first_order: bool = False,
    personal: Plan | None = None,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """Federated meta-learning of a model to start from.

    Args:
        plan: local steps with plain sgd; its lr is the paper's beta.
        alpha: rate of the step a client makes its own model by, above 0.
        first_order: leave the Hessian out.
        personal: training of the model a client uses; default one step of rate alpha on all its examples.
        server: optimiser of the server's step; default sgd with lr 1.
    """
    check_plan(plan)
    alpha = check_number("alpha", alpha, strict=True)
    check_plain("per_fedavg", plan, "the meta-gradient is that of plain steps")
    own = local_sgd(alpha, steps=1, batch_size=None) if personal is None else personal
    check_plan(own, "personal")
    optimizer = server or sgd()

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        w, buffers, tally = start, cohort.buffers, Tally(cohort)
        for step, rate in steps(cohort, plan):
            first = cohort.minibatch(w, plan, step, buffers=buffers, purpose="inner")
            said = cohort.minibatch(w - alpha * first.gradient, plan, step, buffers=first.buffers)
            slope, buffers = said.gradient, said.buffers
            if not first_order:
                slope = slope - alpha * cohort.curvature(w, slope, plan, step, purpose="curvature")
            w = w - rate * slope
            tally.add(said, rate)
        return cohort.update(tally.trained(w, buffers), start), memory

    spec = record(
        "per_fedavg", plan=plan, alpha=alpha, first_order=first_order, personal=own, server=optimizer
    )  # fmt: skip
    return replace(averaging(spec, local, plan, optimizer), personal=tuner(own), plans=(plan, own))
