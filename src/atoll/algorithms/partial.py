"""Methods that keep named parameters with the client: FedPer and FedBN.

Arivazhagan, Aggarwal, Singh & Choudhary 2019, "Federated learning with personalization layers" (FedPer): the top
layers stay with the client, the rest is averaged.
Li, Jiang, Zhang, Kamp & Dou 2021, "FedBN: Federated learning on non-IID features via local batch normalization":
normalisation layers, parameters and running statistics, stay with the client.

Both are federated averaging of the shared parameters; what is private is decided by name, kept by the framework and
never part of an update. Cost in floats: D shared up, D shared down, P - D kept.
"""

from collections.abc import Sequence
from dataclasses import replace

from atoll.algorithms.base import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.errors import InvalidArgument, invalid
from atoll.local import Plan
from atoll.model import Model
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record


def fedper(plan: Plan, *, private: Sequence[str], server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging of all but the named parameters, which stay with each client.

    Args:
        plan: local training; private and shared parameters are trained together.
        private: names or shell-style patterns of parameters, for instance `("head.*",)`.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: when an experiment is built, if a pattern matches nothing or all of the parameters.
    """
    base = fedavg(plan, server=server)
    spec = record("fedper", plan=plan, private=list(private), server=server or sgd())
    return replace(base, spec=spec, private=matching(private))


def fedbn(plan: Plan, *, server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging of all but the normalisation layers, which stay with each client with their statistics.

    Args:
        plan: local training.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: when an experiment is built, if the model has no normalisation layer.
    """

    def private(model: Model) -> frozenset[str]:
        names = model.norm_names()
        if not names and not model.buffer_layout.size:
            raise InvalidArgument("fedbn needs a model with normalisation layers; this one has none: use fedavg.")
        return names

    base = fedavg(plan, server=server)
    return replace(base, spec=record("fedbn", plan=plan, server=server or sgd()), private=private, buffers="local")


def matching(patterns: Sequence[str]):
    """(Model) -> names of parameters that match; refuses patterns that match nothing, or all parameters together."""
    if isinstance(patterns, str) or not patterns:
        raise invalid("private", patterns, "a non-empty sequence of names or patterns", 'Write private=("head.*",).')
    wanted = tuple(patterns)

    def private(model: Model) -> frozenset[str]:
        known = ", ".join(model.layout.names)
        for pattern in wanted:
            if not model.layout.matching([pattern]):
                raise invalid("private", pattern, f"a pattern that matches parameters of the model: {known}")
        names = model.layout.matching(wanted)
        if len(names) == len(model.layout.names):
            raise invalid(
                "private", wanted, "patterns that leave something to share", "Use local_only to share nothing."
            )
        return names

    return private
