"""Federated averaging, and federated gradient descent as its one-step case.

McMahan, Moore, Ramage, Hampson & Arcas 2017, "Communication-efficient learning of deep networks from decentralized
data", algorithm 1.

    y_i <- x, then local steps y_i <- y_i - eta g_i(y_i)
    x <- x + server(sum_i w_i (y_i - x) / sum_i w_i)

Symbols: x server model, y_i client model, w_i weight. Cost in floats: D up, D down, none kept.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_plan
from atoll.cohort import Cohort
from atoll.errors import InvalidArgument
from atoll.local import Plan
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Aggregate, Update


class State(NamedTuple):
    """Server memory: the model and its optimiser's state."""

    vector: Tensor  # [D]
    server: Any


def fedavg(plan: Plan, *, server: ServerOptimizer | None = None) -> Algorithm:
    """Local training, then a weighted average of the changes.

    Args:
        plan: local training, from `atoll.local_sgd`.
        server: optimiser of the server's step; default sgd with lr 1, which is plain averaging.
    """
    check_plan(plan)
    optimizer = server or sgd()

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        return cohort.update(cohort.sgd(start, plan), start), memory

    return averaging(record("fedavg", plan=plan, server=optimizer), local, plan, optimizer)


def fedsgd(plan: Plan, *, server: ServerOptimizer | None = None) -> Algorithm:
    """One full-batch gradient step on each client: with weights by examples, gradient descent on the pooled data.

    Args:
        plan: `local_sgd(lr=..., steps=1, batch_size=None)`; lr scales the gradient the server receives.
        server: optimiser of the server's step; default sgd with lr 1.

    Source: McMahan et al. 2017, section 2 (FedSGD).
    """
    check_plan(plan)
    optimizer = server or sgd()
    if (plan.steps != 1 and plan.epochs != 1) or plan.batch_size is not None or not plan.plain:
        raise InvalidArgument(
            "fedsgd takes one plain step on all of a client's examples: "
            "use fedsgd(local_sgd(lr=..., steps=1, batch_size=None)), or fedavg for longer local training."
        )
    one_step = replace(plan, steps=1, epochs=None)

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        return cohort.update(cohort.sgd(start, one_step), start), memory

    return averaging(record("fedsgd", plan=one_step, server=optimizer), local, one_step, optimizer)


def averaging(spec: dict[str, Any], local: Any, plan: Plan, optimizer: ServerOptimizer) -> Algorithm:
    """The server half shared by methods whose server averages models."""

    def init(vector: Tensor) -> State:
        return State(vector, optimizer.init(vector))

    def step(state: State, aggregate: Aggregate) -> State:
        out = aggregate.mean if aggregate.spare else None
        return State(*optimizer.step(state.server, state.vector, aggregate.mean, out))

    return Algorithm(
        spec,
        init=init,
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        asynchronous=True,
        plans=(plan,),
    )
