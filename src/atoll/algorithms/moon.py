"""MOON: local training whose features stay near those of the global model and away from those the client had before.

Li, He & Song 2021, "Model-contrastive federated learning", algorithm 1 and equations (3) and (4).

    z = R_y(xi),  z_glob = R_x(xi),  z_prev = R_p(xi)                       features of an example xi
    l_con = -log( exp(s(z, z_glob)/tau) / (exp(s(z, z_glob)/tau) + exp(s(z, z_prev)/tau)) )
    y_i <- y_i - eta grad( mean over the batch of  l + mu l_con )           from y_i = x
    x <- x + server(sum_i w_i (y_i - x) / sum_i w_i)

Symbols: x server model, y_i client model, p_i what y_i was after the client's last round, R_w the features of a model
w (the output of the submodule that `Model(features=)` names), s the cosine, mu the term's weight, tau its temperature.
Features of x and p_i are taken in eval mode, once per round: they are fixed while a client trains. A client's first p_i
is the model it receives, z_prev is z_glob and l_con is constant: its first round is federated averaging's.
With mu = 0 the method is federated averaging.
Cost in floats: D up, D down, D + B kept; two forwards over the client's examples more than federated averaging.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_number, check_plan
from atoll.algorithms.fedavg import averaging
from atoll.algorithms.personal import kept
from atoll.cohort import Cohort, Term
from atoll.errors import InvalidArgument
from atoll.local import Plan
from atoll.model import Model
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Update


def moon(plan: Plan, *, mu: float = 1.0, temperature: float = 0.5, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging with a model-contrastive term in local training.

    Args:
        plan: local training.
        mu: weight of the term, at least 0 (the paper tries 0.1, 1, 5 and 10).
        temperature: of the term, above 0.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: when an experiment is built, if the model names no features.
    """
    check_plan(plan)
    mu = check_number("mu", mu)
    temperature = check_number("temperature", temperature, strict=True)
    optimizer = server or sgd()

    def contrast(features: Tensor, glob: Tensor, previous: Tensor) -> Tensor:
        own, near, far = (z.reshape(len(z), -1) for z in (features, glob, previous))
        apart = functional.cosine_similarity(own, far) - functional.cosine_similarity(own, near)
        return mu * functional.softplus(apart / temperature)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        term = None
        if mu:
            before = cohort.features(memory["vector"], buffers=memory.get("buffers"))
            term = Term(contrast, (cohort.features(start), before))
        trained = cohort.sgd(start, plan, term=term)
        return cohort.update(trained, start), kept(trained.rows, trained.buffers)

    def bind(model: Model) -> Algorithm:
        if model.features_name is None:
            raise InvalidArgument(
                "moon compares features, but the model names none: build it with "
                'Model(..., features="name.of.submodule"), the layer below the head.'
            )
        return algorithm

    spec = record("moon", plan=plan, mu=mu, temperature=temperature, server=optimizer)
    base = averaging(spec, local, plan, optimizer)
    algorithm = replace(base, client_init=kept, bind=bind, asynchronous=False)
    return algorithm
