"""What methods with a model for every client share: models that are kept, models that are tuned, steps of their own."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.algorithms.base import Memory, Message
from atoll.algorithms.checks import check_plan
from atoll.cohort import Cohort, Minibatch
from atoll.local import Plan
from atoll.vectors import Personal, Trained


def kept(vector: Tensor, buffers: Tensor) -> Memory:
    """A model as fields of a client's memory: parameters [D] and floating buffers [B], or rows of both."""
    return {"vector": vector} | ({"buffers": buffers} if buffers.numel() else {})


def keeper(message: Any, memory: Memory, cohort: Cohort) -> Personal:
    """The models clients keep; before its first visit a client's is the one it receives."""
    return Personal(memory["vector"], memory.get("buffers"))


def asked(plan: Plan, personal: Plan | None) -> Plan:
    """The training of a model that is made when it is asked for: a given plan as it is, else that of the rounds.

    Of the latter without `schedule` and `work`: there is no round it belongs to, and after the last one a rate that
    falls to nought would leave the received model as it is; nor is a client slow that has all the time it wants.
    """
    if personal is None:
        return replace(plan, schedule=None, work=None)
    check_plan(personal, "personal")
    return personal


def tuner(plan: Plan, names: Callable[[Cohort], frozenset[str]] | None = None) -> Callable[..., Personal]:
    """The received models, trained on their clients' own examples: nothing is kept, so anybody can have one.

    Args:
        plan: of the training.
        names: (cohort) -> names of the parameters that are trained; None: all.
    """

    def personal(message: Message, memory: Memory, cohort: Cohort) -> Personal:
        train = None if names is None else cohort.model.layout.mask(names(cohort))
        trained = cohort.sgd(cohort.rows(message.vector), plan, train=train, purpose="personal")
        return Personal(trained.rows, trained.buffers)

    return personal


def steps(cohort: Cohort, plan: Plan) -> Iterator[tuple[int, float]]:
    """Number and learning rate of every local step that some client of the tile takes."""
    rates = plan.rate(cohort.round, np.arange(int(cohort.steps(plan).max())))
    yield from enumerate(rates.tolist())


class Tally:
    """Adds up what steps of a method's own did, to what `Cohort.sgd` tells of its steps."""

    def __init__(self, cohort: Cohort) -> None:
        shape = (len(cohort.clients), 1)
        self._steps, self._rates, self._loss, self._seen = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))

    def add(self, said: Minibatch, rate: float) -> None:
        """A step was taken at this rate, by the clients that have a minibatch for it."""
        took = (said.examples > 0).double().cpu()
        self._steps += took
        self._rates += rate * took
        self._loss += (said.loss * said.examples).cpu()
        self._seen += said.examples.cpu()

    def trained(self, rows: Tensor, buffers: Tensor) -> Trained:
        """The models [C, P] and buffers [C, B] the steps led to."""
        told = (t.to(rows.device) for t in (self._loss, self._seen))
        return Trained(rows, buffers, self._steps.to(rows), self._rates.to(rows), *told)
