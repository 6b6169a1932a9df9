"""The baselines without which no federated result can be judged: alone, pooled, and passed around."""

from dataclasses import replace

from atoll import sampling
from atoll.algorithms.base import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.local import Plan
from atoll.spec import record


def local_only(plan: Plan) -> Algorithm:
    """Every client trains a model of its own; nothing is shared. Cost in floats: none up, none down, P kept.

    Args:
        plan: local training in each round; optimiser state starts anew in every round.
    """
    everything = lambda model: frozenset(model.layout.names)  # noqa: E731
    base = fedavg(plan)
    return replace(base, spec=record("local_only", plan=plan), private=everything, buffers="local")


def pooled(plan: Plan) -> Algorithm:
    """All examples in one place, as if there were no reason to federate: what centralised training would reach.

    Args:
        plan: training of the one model; a round is one call of it.
    """
    return replace(fedavg(plan), spec=record("pooled", plan=plan), pooled=True)


def cyclic(plan: Plan, *, shuffle: bool = False) -> Algorithm:
    """Cyclic weight transfer: the model visits one client in each round and is passed on as it is.

    Args:
        plan: local training at each visit.
        shuffle: a new order of clients for every pass over the population.

    Source: Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging".
    Cost in floats: P up, P down, none kept.
    """
    spec = record("cyclic", plan=plan, shuffle=shuffle)
    return replace(fedavg(plan), spec=spec, sampler=sampling.cyclic(shuffle), asynchronous=False)
