"""Methods that keep named parameters with the client: FedPer, LG-FedAvg, FedRep, FedBABU and FedBN.

Arivazhagan, Aggarwal, Singh & Choudhary 2019, "Federated learning with personalization layers" (FedPer): the top
layers stay with the client, the rest is averaged.
Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov & Morency 2020, "Think locally, act globally" (LG-FedAvg): the
bottom layers stay, the top is averaged.
Collins, Hassani, Mokhtari & Shakkottai 2021, "Exploiting shared representations for personalized federated learning"
(FedRep), algorithm 1: in a round the client first trains its head under the received body, then the body under it.
Oh, Kim & Yun 2022, "FedBABU: Toward enhanced representation for federated image classification", algorithm 1: the head
stays as it started, everywhere, while the body is trained; a client's model is tuned when it is asked for.
Li, Jiang, Zhang, Kamp & Dou 2021, "FedBN: Federated learning on non-IID features via local batch normalization":
normalisation layers, parameters and running statistics, stay with the client.

All are federated averaging of the shared parameters; what is private is decided by name, kept by the framework and
never part of an update. A client never seen uses the start values of the private parameters (FedBABU tunes them).
Cost in floats: D shared up, D shared down, P - D kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.algorithms.checks import check_plan
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.personal import asked, tuner
from atoll.cohort import Cohort
from atoll.errors import InvalidArgument, invalid
from atoll.local import Plan
from atoll.model import Model
from atoll.server import ServerOptimizer, sgd
from atoll.spec import record
from atoll.vectors import Update


def fedper(plan: Plan, *, private: Sequence[str], server: ServerOptimizer | None = None) -> Algorithm:
    """Federated averaging of all but the named parameters, which stay with each client.

    Args:
        plan: local training; private and shared parameters are trained together.
        private: names or shell-style patterns of parameters, for instance `("head.*",)`.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: when an experiment is built, if a pattern matches nothing or all of the parameters.
    """
    return _keeping("fedper", plan, private, server)


def lg_fedavg(plan: Plan, *, private: Sequence[str], server: ServerOptimizer | None = None) -> Algorithm:
    """FedPer upside down: each client has a representation of its own, and the layers above are averaged.

    Args:
        plan: local training; private and shared parameters are trained together.
        private: names or patterns of the representation's parameters, for instance `("body.*",)`.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: as for fedper.
    """
    return _keeping("lg_fedavg", plan, private, server)


def fedrep(
    plan: Plan, *, private: Sequence[str], head: Plan | None = None, server: ServerOptimizer | None = None
) -> Algorithm:
    """Each client trains its private head first, then the shared body under it, one at a time.

    Args:
        plan: local training of the shared parameters.
        private: names or patterns of the head's parameters, for instance `("head.*",)`.
        head: local training of the head; default `plan`. The paper takes many steps here and few for the body.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: as for fedper.
    """
    base = _keeping("fedrep", plan, private, server)
    first = plan if head is None else head
    check_plan(first, "head")

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        shared = cohort.model.layout.mask(cohort.selection.names)
        headed = cohort.sgd(cohort.rows(message.vector), first, train=~shared, purpose="head")
        start = headed.rows
        trained = cohort.sgd(start, plan, train=shared, buffers=headed.buffers)
        return cohort.update(trained, start), memory

    return replace(base, spec=base.spec | record("fedrep", head=first), local=local, plans=(plan, first))


def fedbabu(
    plan: Plan,
    *,
    private: Sequence[str],
    personal: Plan | None = None,
    tuned: Literal["all", "private"] = "all",
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """The body is trained under a head that never changes; clients tune the model they use.

    Args:
        plan: local training of the shared parameters.
        private: names or patterns of the head's parameters, for instance `("head.*",)`.
        personal: training of the model a client uses; default `plan` without its `schedule` and `work`.
        tuned: what that training changes: "all" parameters, or the "private" ones alone.
        server: optimiser of the server's step; default sgd with lr 1.

    Raises:
        InvalidArgument: as for fedper; when `tuned` is unknown.
    """
    base = _keeping("fedbabu", plan, private, server)
    own = asked(plan, personal)
    if tuned not in ("all", "private"):
        raise invalid("tuned", tuned, '"all" or "private"')

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        shared = cohort.model.layout.mask(cohort.selection.names)
        return cohort.update(cohort.sgd(start, plan, train=shared), start), memory

    def head(cohort: Cohort) -> frozenset[str]:
        return frozenset(cohort.model.layout.names) - frozenset(cohort.selection.names)

    return replace(
        base,
        spec=base.spec | record("fedbabu", personal=own, tuned=tuned),
        local=local,
        personal=tuner(own, None if tuned == "all" else head),
        plans=(plan, own),
    )


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


def _keeping(name: str, plan: Plan, private: Sequence[str], server: ServerOptimizer | None) -> Algorithm:
    """Federated averaging of all but the parameters that match."""
    kept = matching(private)
    spec = record(name, plan=plan, private=list(private), server=server or sgd())
    return replace(fedavg(plan, server=server), spec=spec, private=kept)


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
