"""Attacks as records, and where they are put: into a dataset, into a matrix of updates, or in front of a rule.

In front of a rule an attack stands where malicious clients' updates arrive: it sees every honest update of the round,
which is the most an attacker can know, and writes the malicious ones. Everything is keyed: the same seed gives the same
malicious clients and the same noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from atoll import random
from atoll.aggregators import Aggregator, Ruling
from atoll.aggregators.base import spared
from atoll.aggregators.rows import Rows
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument, invalid
from atoll.spec import Spec, record


class Scene(NamedTuple):
    """What an attacker knows of a round."""

    honest: Tensor  # [h, L] honest updates, float64; in a cohort without any, what the malicious would have sent
    own: Tensor  # [f, L] what the malicious clients would have sent, float64
    clients: int  # in the cohort
    weights: Tensor  # [f, 1] their weights
    past: Tensor  # [L] their mean update in the first round they were in, float64; nought before
    seed: int
    round: int

    @property
    def mean(self) -> Tensor:
        """The honest updates' mean [L]."""
        return self.honest.mean(dim=0)

    @property
    def spread(self) -> Tensor:
        """The honest updates' standard deviation [L] in every coordinate."""
        return self.honest.std(dim=0, correction=0)


class Sent(NamedTuple):
    """What malicious clients send."""

    rows: Tensor  # [f, L], or [L] for all of them
    weights: Tensor | None = None  # [f, 1]; None: what they are


@dataclass(frozen=True, slots=True)
class Attack:
    """What malicious clients send instead of their updates.

    Attributes:
        spec: name and arguments.
        send: what they make of a round.
        observes: whether it needs updates of honest clients.
    """

    spec: Spec
    send: Callable[[Scene], Sent]
    observes: bool = False

    @property
    def name(self) -> str:
        """The attack's name."""
        return str(self.spec["name"])


@dataclass(frozen=True, slots=True)
class Poison:
    """What malicious clients do to their training examples.

    Attributes:
        spec: name and arguments.
        change: (a client's fields [n, ...], number of classes) -> fields of the same shapes.
    """

    spec: Spec
    change: Callable[[dict[str, Tensor], int], dict[str, Tensor]]

    @property
    def name(self) -> str:
        """The attack's name."""
        return str(self.spec["name"])


def chosen(clients: Sequence[str], fraction: float, seed: int = 0) -> tuple[str, ...]:
    """Which clients are malicious: the fraction of them, rounded down, that a keyed order of their names puts first.

    The order does not depend on who else is there: in data and in a cohort of everybody they are the same.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise invalid("fraction", fraction, "a number in [0, 1]")
    order = sorted(clients, key=lambda client: random.key(seed, "malicious", client))
    wanted = set(order[: math.floor(len(order) * fraction + 1e-9)])
    return tuple(c for c in clients if c in wanted)


@overload
def apply(target: FederatedDataset, attack: Poison, *, fraction: float, seed: int = 0) -> FederatedDataset: ...
@overload
def apply(target: Tensor, attack: Attack, *, fraction: float, seed: int = 0) -> Tensor: ...
@overload
def apply(
    target: Aggregator, attack: Attack, *, fraction: float, seed: int = 0, population: Sequence[str] | None = None
) -> Aggregator: ...
def apply(
    target: FederatedDataset | Tensor | Aggregator,
    attack: Attack | Poison,
    *,
    fraction: float,
    seed: int = 0,
    population: Sequence[str] | None = None,
) -> FederatedDataset | Tensor | Aggregator:
    """Let a fraction of the clients attack.

    Args:
        target: a dataset, whose malicious clients' training examples are changed; rows [n, L], of which the malicious
            are rewritten (clients are called "0" to "n-1"); or an aggregator, in front of which the malicious clients
            of every cohort send what the attack makes of the round.
        attack: of data for a dataset, of updates for the others.
        fraction: of the clients that are malicious, in [0, 1]; their number is rounded down. With 1 nobody is honest,
            which attacks that need honest updates refuse.
        seed: decides which they are, and the attack's noise.
        population: names of all clients, such as data.clients, for an aggregator: the malicious are a fraction of them,
            the same in every round and in data that are attacked with the same seed. Without it they are a fraction
            of each cohort, so that a client may be malicious in one cohort and honest in another.

    Returns:
        The target under attack.
    """
    chosen((), fraction)
    if population is not None and not isinstance(target, Aggregator):
        raise invalid(
            "population", population, "None for data and matrices, which hold all clients, unlike an aggregator"
        )
    if isinstance(target, FederatedDataset):
        if not isinstance(attack, Poison):
            raise invalid("attack", attack, "one on data, such as atoll.attacks.label_flip()", _ELSEWHERE)
        return _poisoned(target, attack, fraction, seed)
    if not isinstance(attack, Attack):
        raise invalid("attack", attack, "one on updates, such as atoll.attacks.alie()", "Apply this one to the data.")
    if attack.observes and fraction == 1:
        raise invalid("fraction", fraction, f"below 1 for {attack.name}, which needs updates of honest clients")
    if isinstance(target, Aggregator):
        return _attacked(
            target, attack, fraction, seed, None if population is None else chosen(population, fraction, seed)
        )
    if not isinstance(target, Tensor) or target.ndim != 2:
        raise invalid("target", target, "a FederatedDataset, rows [n, L] or an aggregator")
    names = [str(i) for i in range(len(target))]
    bad = _mask(names, fraction, seed)
    past, weights = target.new_zeros(target.shape[1]), target.new_ones(len(target), dtype=torch.float64)
    rows, claimed = _rewritten(target, weights, bad, attack, past, seed, 0)
    if not torch.equal(claimed, weights):
        raise invalid(
            "attack",
            attack.name,
            "one on rows alone: a matrix has no weights to lie about",
            "Apply it to an aggregator.",
        )
    return rows


_ELSEWHERE = "Apply attacks on updates to the aggregator."


def _poisoned(data: FederatedDataset, attack: Poison, fraction: float, seed: int) -> FederatedDataset:
    fields = {n: t.clone() for n, t in data.train.fields.items()}
    if "y" not in fields or fields["y"].is_floating_point():
        raise InvalidArgument(
            f"{attack.name} changes class numbers, but the data has none: it needs an integer field y."
        )
    classes = int(fields["y"].max()) + 1
    for client in chosen(list(data.clients), fraction, seed):
        place = data.places([client])[0]
        begin, end = int(data.train.offsets[place]), int(data.train.offsets[place + 1])
        for name, changed in attack.change({n: t[begin:end] for n, t in fields.items()}, classes).items():
            fields[name][begin:end] = changed
    return FederatedDataset(
        data.clients,
        replace(data.train, fields=fields),
        validation=data.validation,
        test=data.test,
        holdout=data.holdout,
        name=f"{data.name}, {attack.name} at {fraction:g} of the clients",
        features=data.features,
        preprocessing=data.preprocessing,
    )


def _attacked(
    behind: Aggregator, attack: Attack, fraction: float, seed: int, known: tuple[str, ...] | None
) -> Aggregator:
    malicious = frozenset(known or ())

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        # The rows stand by content; what an attacker does must be put back in the clients' own order.
        given = torch.empty_like(weights)
        given[rows.order] = weights
        bad = _mask(rows.clients, fraction, seed)
        if known is not None:
            bad = torch.tensor([name in malicious for name in rows.clients], dtype=torch.bool)
        past = state["past"]
        if not state["seen"] and bool(bad.any()):
            past = rows.matrix[bad].double().mean(dim=0).to(past.dtype)
        matrix, claimed = _rewritten(rows.matrix, given, bad, attack, past, seed, state["round"])
        ruling = behind.combine(matrix, claimed, state["then"], rows.clients, rows.root)
        kept = {
            "round": state["round"] + 1,
            "seen": state["seen"] or bool(bad.any()),
            "past": past,
            "then": ruling.state,
        }
        # Shares are told for the rows as they stand here; of two attacks the inner one has the last word.
        share = None if ruling.share is None else ruling.share[rows.order]
        sent = matrix if ruling.rows is None else ruling.rows
        return ruling._replace(
            share=share, state=kept, rows=sent, weights=claimed if ruling.weights is None else ruling.weights
        )

    return Aggregator(
        record(
            f"{behind.name} under {attack.name}",
            attack=attack,
            fraction=fraction,
            seed=seed,
            then=behind,
            malicious=known,
        ),
        rule,
        behind.weights,
        behind.denominator,
        behind.least,
        behind.bears,
        behind.needs,
        lambda count, found: _attacked(spared(behind, count, found), attack, fraction, seed, known),
        lambda row: {"round": 0, "seen": False, "past": row, "then": behind.init(row)},
        behind,
        behind.rooted,
        behind.cap,
        behind.clip,
    )


def _mask(names: Sequence[str], fraction: float, seed: int) -> Tensor:
    bad = set(chosen(names, fraction, seed))
    return torch.tensor([name in bad for name in names], dtype=torch.bool)


def _rewritten(
    rows: Tensor, weights: Tensor, bad: Tensor, attack: Attack, past: Tensor, seed: int, round: int
) -> tuple[Tensor, Tensor]:
    bad = bad.to(rows.device)
    if not bool(bad.any()):
        return rows, weights
    honest = bad if bool(bad.all()) else ~bad
    scene = Scene(
        rows[honest].double(), rows[bad].double(), len(rows), weights[bad][:, None], past.double(), seed, round
    )
    sent = attack.send(scene)
    rows, weights = rows.clone(), weights.clone()
    rows[bad] = sent.rows.expand(len(scene.own), -1).to(rows.dtype)
    if sent.weights is not None:
        weights[bad] = sent.weights[:, 0]
    return rows, weights
