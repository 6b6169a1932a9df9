"""When a round ends: schedules of a simulation, over clients that take different times.

A schedule decides whose updates a server's step is made of, by how long clients take. Durations are keyed by seed,
client and round, or given as a function; nothing waits for real: the order of events is computed, so that a run has the
same bits wherever it runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from atoll import random
from atoll.errors import invalid
from atoll.sampling import Sampler, fixed
from atoll.spec import Spec, record

Durations = Callable[[str, int], float]
"""(client, round of the model it received) -> seconds between receiving it and its update's arrival."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """Synchronous rounds; built by `rounds`.

    Attributes:
        over: clients asked for each one that is wanted.
        quorum: least number of updates, or least share of those wanted, for a step.
        deadline: seconds after which a round takes no more updates; None: it waits.
        durations: how long clients take; None: half-normal, keyed.
    """

    over: float
    quorum: int | float | None
    deadline: float | None
    durations: Durations | None

    @property
    def waits(self) -> bool:
        """Whether every round waits for everybody it asked: durations then do not matter."""
        return self.over == 1.0 and self.deadline is None

    def asked(self, sampler: Sampler, population: int) -> Sampler:
        """The rule for whom a round asks, given the one for how many it wants.

        Raises:
            InvalidArgument: the number wanted is not known before the draw, or the population is too small.
        """
        if isinstance(self.quorum, int) and self.quorum > sampler.expected(population):
            most = f"{sampler.expected(population):g}"
            raise invalid("quorum", self.quorum, f"at most {most}, the clients wanted in a round")
        if self.over == 1.0:
            return sampler
        if sampler.spec["name"] not in ("fixed", "fraction"):
            raise invalid(
                "over", self.over, f"1 with {sampler.spec['name']} cohorts", "Over-selection needs cohort= a number."
            )
        wanted = round(sampler.expected(population))
        more = math.ceil(self.over * wanted - 1e-9)
        if more > population:
            raise invalid("over", self.over, f"at most {population / wanted:g}: there are {population} clients in all")
        return fixed(more)

    def least(self, wanted: int) -> int:
        """Updates needed for a step, where so many are wanted."""
        if self.quorum is None:
            return min(1, wanted)
        return self.quorum if isinstance(self.quorum, int) else math.ceil(self.quorum * wanted - 1e-9)

    def arrived(self, seed: int, round: int, asked: Sequence[str], wanted: int) -> tuple[tuple[str, ...], float, str]:
        """Who a round's step is made of, in the order they were asked; the round's length; a note when it fails.

        Args:
            seed: of the run.
            round: the round, from 0.
            asked: the clients that train.
            wanted: how many updates end the round.
        """
        took = {c: _took(self.durations, seed, c, round) for c in asked}
        limit = math.inf if self.deadline is None else self.deadline
        in_time = sorted((t, i, c) for i, (c, t) in enumerate(took.items()) if t <= limit)[:wanted]
        came = {c for _, _, c in in_time}
        least = self.least(wanted)
        length = in_time[-1][0] if len(in_time) == wanted and in_time else limit
        if not math.isfinite(length):
            length = max(took.values(), default=0.0)
        if len(came) < least:
            return (), length, f"{len(came)} updates came in time, fewer than the quorum of {least}: no step was made."
        return tuple(c for c in asked if c in came), length, ""

    @property
    def spec(self) -> Spec:
        """Name and arguments."""
        return record("rounds", over=self.over, quorum=self.quorum, deadline=self.deadline, durations=self.durations)


@dataclass(frozen=True, slots=True)
class Buffered:
    """Buffered asynchrony; built by `buffered`.

    Attributes:
        size: updates a step is made of.
        concurrency: clients at work at any time.
        staleness: exponent of the weight (1 + tau)^-staleness, or (tau) -> weight.
        durations: how long clients take; None: half-normal, keyed.
        limit: largest tau of an update that counts; None: any.
    """

    size: int
    concurrency: int
    staleness: float | Callable[[int], float]
    durations: Durations | None
    limit: int | None = None

    def weight(self, tau: int) -> float:
        """What an update counts that was computed from the model of `tau` steps ago.

        Raises:
            InvalidArgument: a function that gives something that is no weight.
        """
        if not callable(self.staleness):
            return float((1 + tau) ** -self.staleness)
        weight = float(self.staleness(tau))
        if not 0 <= weight < math.inf:
            raise invalid("staleness", weight, f"a function that returns a finite weight of at least 0 for tau={tau}")
        return weight

    def took(self, seed: int, client: str, round: int) -> float:
        """Seconds a client takes."""
        return _took(self.durations, seed, client, round)

    @property
    def spec(self) -> Spec:
        """Name and arguments."""
        return record(
            "buffered",
            size=self.size, concurrency=self.concurrency, staleness=self.staleness, durations=self.durations,
            limit=self.limit,
        )  # fmt: skip


Schedule = Rounds | Buffered


def rounds(
    over: float = 1.0,
    quorum: int | float | None = None,
    deadline: float | None = None,
    *,
    durations: Durations | None = None,
) -> Rounds:
    """Synchronous rounds that need not wait for everybody.

    Bonawitz et al. 2019, "Towards federated learning at scale: System design": more clients are asked than are wanted,
    the first updates that are enough end the round, later ones count for nothing.

    Args:
        over: clients asked for each one wanted by `cohort=`, at least 1.
        quorum: updates needed for a step, as a number or as a share of those wanted; default one. A round with fewer
            makes no step, and counts.
        deadline: simulated seconds after which no more updates are taken; default it waits for as many as are wanted.
        durations: (client, round) -> seconds; default half-normal with scale one, keyed.

    Raises:
        InvalidArgument: an argument outside its range.
    """
    if not _real(over) or not 1 <= over < math.inf:
        raise invalid("over", over, "a finite number of at least 1")
    share = isinstance(quorum, float) and 0 < quorum <= 1
    if quorum is not None and not share and (isinstance(quorum, bool) or not isinstance(quorum, int) or quorum < 1):
        raise invalid("quorum", quorum, "a number of clients of at least 1, or a share in (0, 1]")
    if deadline is not None and (not _real(deadline) or not 0 < deadline < math.inf):
        raise invalid("deadline", deadline, "a finite number of seconds above 0")
    _check_durations(durations)
    return Rounds(float(over), quorum, None if deadline is None else float(deadline), durations)


def buffered(
    size: int,
    concurrency: int,
    staleness: float | Callable[[int], float] = 0.5,
    *,
    durations: Durations | None = None,
    limit: int | None = None,
) -> Buffered:
    """Asynchronous training: the server steps whenever a number of updates has arrived, whatever models they are from.

    Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek & Huba 2022, "Federated learning with buffered asynchronous
    aggregation" (FedBuff), algorithm 1. `concurrency` clients are at work at any time; whoever is done is replaced by
    another, who receives the model of that moment. With K = `size` updates D_i of weights w_i that are tau_i steps old,

        x <- x + server( sum_i w_i s(tau_i) D_i / sum_i w_i ),    s(tau) = (1 + tau)^-staleness

    The paper's weights are equal (`aggregators.mean(weights="uniform")`) and its s is 1 / sqrt(1 + tau). A client at
    work or in the buffer is not asked again. Clients that finish at the same time are all taken before anybody is
    asked, so that with size = concurrency and equal durations this is synchronous training.

    Args:
        size: updates a step is made of, K; at most the number of clients.
        concurrency: clients at work at any time, at most the number of clients.
        staleness: exponent of s, at least 0, or a function of tau.
        durations: (client, round of the model it received) -> seconds; default half-normal with scale one as in the
            paper, keyed; over real sites they take what they take.
        limit: largest tau of an update that counts, at least 0; an older one is dropped. Default any counts.

    Raises:
        InvalidArgument: an argument outside its range.
    """
    for name, value in (("size", size), ("concurrency", concurrency)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(name, value, "a number of clients of at least 1")
    if not callable(staleness) and (not _real(staleness) or not 0 <= staleness < math.inf):
        raise invalid("staleness", staleness, "a finite exponent of at least 0, or a function of tau")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise invalid("limit", limit, "a number of steps of at least 0, or None")
    _check_durations(durations)
    return Buffered(size, concurrency, staleness, durations, limit)


def _took(durations: Durations | None, seed: int, client: str, round: int) -> float:
    """Seconds a client takes: given, or half-normal."""
    if durations is None:
        draw = np.random.default_rng(random.key(seed, "duration", round, client))
        return abs(float(draw.standard_normal()))
    took = durations(client, round)
    if not _real(took) or not 0 <= took < math.inf:
        allowed = f"a function that returns finite seconds of at least 0 for client {client!r} in round {round + 1}"
        raise invalid("durations", took, allowed)
    return float(took)


def _check_durations(durations: object) -> None:
    if durations is not None and not callable(durations):
        raise invalid("durations", durations, "callable(client, round) -> seconds")


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
