"""FedALA: every client learns, element by element, how much of the global model to take before it trains.

Zhang, Hua, Wang, Song, Xue, Ma & Guan 2023, "FedALA: Adaptive local aggregation for personalized federated learning",
algorithm 1 and equations (4) and (5).

    p_i = y_i + (x - y_i) * W_i                                  element-wise, W_i in [0, 1]
    W_i <- clip(W_i - eta g_i(p_i) * (x - y_i), 0, 1)            over minibatches of a sample of the client's examples
    y_i <- p_i, then local training as usual
    x <- x + server(sum_i w_i (y_i - x) / sum_i w_i)

Symbols: x server model, y_i the client's model after its last round, W_i its weights, kept from round to round and 1 at
first, g_i the gradient of a minibatch. Parameters that are not adapted are taken from x (the paper adapts the higher
layers only). When a client first learns its weights it goes through its sample until the mean losses of the last ten
passes have a standard deviation below `settled`, or `first` times; later once. That is the second round it takes part
in: in its first y_i is x, and there is nothing to learn.

A client uses p_i as it would be made now; one never seen uses the global model. Where nothing but x is known, and while
W_i is 1, the method is federated averaging.
Cost in floats: D up, D down, 2 D + 1 kept; one gradient for each minibatch of the sample, on the general path.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_count, check_number, check_plan
from atoll.algorithms.fedavg import averaging
from atoll.cohort import Cohort
from atoll.errors import invalid
from atoll.local import Plan, local_sgd
from atoll.model import Model
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Personal, Update

WINDOW = 10
"""Passes whose losses say whether the weights have settled."""


def fedala(
    plan: Plan,
    *,
    eta: float = 1.0,
    sample: float = 0.8,
    adapt: Sequence[str] = ("*",),
    first: int = 50,
    settled: float = 0.1,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """Federated averaging whose clients start from a learnt mixture of the global and their own last model.

    Args:
        plan: local training; its batch size is that of learning the weights, too.
        eta: learning rate of the weights, above 0.
        sample: share of a client's minibatches, in their keyed order of the round, that the weights learn from.
        adapt: names or shell-style patterns of the parameters whose weights are learnt; of others the client takes the
            global ones.
        first: most passes over the sample when a client learns its weights for the first time.
        settled: standard deviation of the losses of ten passes below which these end sooner.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: when an experiment is built, if a pattern of `adapt` matches nothing.
    """
    check_plan(plan)
    eta = check_number("eta", eta, strict=True)
    share = check_number("sample", sample, most=1.0, strict=True)
    first = check_count("first", first)
    settled = check_number("settled", settled)
    if isinstance(adapt, str) or not adapt:
        raise invalid("adapt", adapt, "a non-empty sequence of names or patterns", 'Write adapt=("head.*",).')
    optimizer = server or sgd()
    learning = replace(
        local_sgd(eta, epochs=1, batch_size=plan.batch_size, shuffle=plan.shuffle), work=lambda *_: share
    )

    def client_init(vector: Tensor, buffers: Tensor) -> Memory:
        return {"vector": vector, "weights": torch.ones_like(vector), "begun": vector.new_zeros(1)}

    def aggregate(message: Message, memory: Memory, cohort: Cohort) -> tuple[Tensor, Tensor, Tensor]:
        """Where the clients start from [C, P], their weights [C, P], and who has learnt weights [C, 1]."""
        own, weights, begun = memory["vector"], memory["weights"], memory["begun"]
        mask = cohort.model.layout.mask(cohort.model.layout.matching(adapt)).to(own.device)
        away = torch.where(mask, cohort.rows(message.vector) - own, 0.0)
        differs = (away != 0).any(dim=1, keepdim=True)
        # What is not adapted is the global one, exactly.
        base = torch.where(mask, own, cohort.rows(message.vector))
        steps = int(cohort.steps(learning).max())
        active, losses = differs, list[Tensor]()
        for number in range(first):
            total, seen = torch.zeros(len(own), 1, dtype=torch.float64), torch.zeros(len(own), 1, dtype=torch.float64)
            for step in range(steps):
                said = cohort.minibatch(base + away * weights, learning, step, purpose="aggregation")
                moved = (weights - eta * said.gradient * away).clamp(0.0, 1.0)
                weights = torch.where(active, moved, weights)
                total, seen = total + (said.loss * said.examples).cpu(), seen + said.examples.cpu()
            losses.append(total / seen.clamp(min=1.0))
            # Who has learnt before goes through its sample once.
            active = active & (begun == 0)
            if number + 1 >= WINDOW:
                spread = torch.stack(losses[-WINDOW:]).std(dim=0, correction=0)
                active = active & (spread >= settled).to(active.device)
            if not bool(active.any()):
                break
        # Where the weight is 1 the global model is taken as it is: own + (x - own) may miss it by a rounding.
        started = torch.where(weights == 1.0, cohort.rows(message.vector), base + away * weights)
        return started, weights, torch.maximum(begun, differs.to(begun.dtype))

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start, weights, begun = aggregate(message, memory, cohort)
        trained = cohort.sgd(start, plan)
        update = cohort.update(trained, cohort.rows(message.vector))
        return update, {"vector": trained.rows, "weights": weights, "begun": begun}

    def personal(message: Message, memory: Memory, cohort: Cohort) -> Personal:
        return Personal(aggregate(message, memory, cohort)[0], None)

    def bind(model: Model) -> Algorithm:
        for pattern in adapt:
            if not model.layout.matching([pattern]):
                known = ", ".join(model.layout.names)
                raise invalid("adapt", pattern, f"a pattern that matches parameters of the model: {known}")
        return algorithm

    spec = record(
        "fedala", plan=plan, eta=eta, sample=share, adapt=list(adapt), first=first, settled=settled, server=optimizer
    )
    base = averaging(spec, local, plan, optimizer)
    algorithm = replace(
        base, client_init=client_init, personal=personal, bind=bind, plans=(plan, learning), asynchronous=False
    )
    return algorithm
