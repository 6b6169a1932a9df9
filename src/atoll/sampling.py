"""Who takes part in a round: samplers, keyed by seed and round, never by history.

A cohort costs what the cohort costs. Only `poisson` asks every client, in one array operation; `cyclic(shuffle=True)`
shuffles the population once for each pass over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np

from atoll.errors import InvalidArgument, invalid
from atoll.random import numpy_generator
from atoll.spec import Spec, record


@dataclass(frozen=True, slots=True)
class Sampler:
    """A rule for cohorts.

    Attributes:
        spec: name and arguments; what an accountant reads.
        draw: (seed, round, population size) -> indices of the cohort, ascending unless the rule prescribes an order;
            or names, for a prescribed sequence.
        expected: (population size) -> expected cohort size.
        check: (client names) -> None, raising what is impossible for this population.
    """

    spec: Spec
    draw: Callable[[int, int, int], "np.ndarray | Sequence[str]"]
    expected: Callable[[int], float]
    check: Callable[[Sequence[str]], None]

    def cohort(self, seed: int, round: int, clients: Sequence[str]) -> tuple[str, ...]:
        """Names of the clients that take part in a round."""
        drawn = self.draw(seed, round, len(clients))
        if not isinstance(drawn, np.ndarray):
            return tuple(drawn)
        # Populations that make their names when asked make many at once.
        take = cast("Callable[[np.ndarray], tuple[str, ...]] | None", getattr(clients, "take", None))
        return tuple([clients[int(i)] for i in drawn.tolist()]) if take is None else take(drawn)


def fixed(size: int) -> Sampler:
    """A fixed number of clients, drawn without replacement in every round."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise invalid("cohort", size, "a number of clients of at least 1")

    def draw(seed: int, round: int, population: int) -> np.ndarray:
        return np.sort(numpy_generator(seed, "cohort", round).choice(population, size, replace=False, shuffle=False))

    def check(clients: Sequence[str]) -> None:
        if size > len(clients):
            raise invalid(
                "cohort", size, f"at most the population of {len(clients)} clients", "Use atoll.sampling.everyone()."
            )

    return Sampler(record("fixed", size=size), draw, lambda population: float(size), check)


def fraction(share: float) -> Sampler:
    """A fixed share of the population, rounded, at least one client, drawn without replacement."""
    if isinstance(share, bool) or not 0 < share <= 1:
        raise invalid("cohort", share, "a fraction in (0, 1]")

    def size(population: int) -> int:
        return max(1, round(share * population))

    def draw(seed: int, round: int, population: int) -> "np.ndarray | Sequence[str]":
        return fixed(size(population)).draw(seed, round, population)

    return Sampler(record("fraction", share=share), draw, lambda p: float(size(p)), _anyone)


def poisson(rate: float) -> Sampler:
    """Every client takes part independently with this probability; a cohort may be empty."""
    if isinstance(rate, bool) or not 0 < rate <= 1:
        raise invalid("rate", rate, "a probability in (0, 1]")

    def draw(seed: int, round: int, population: int) -> np.ndarray:
        return np.flatnonzero(numpy_generator(seed, "cohort", round).random(population) < rate)

    return Sampler(record("poisson", rate=rate), draw, lambda population: rate * population, _anyone)


def everyone() -> Sampler:
    """All clients in every round."""
    return Sampler(record("everyone"), lambda seed, round, population: np.arange(population), float, _anyone)


def sequence(cohorts: Sequence[Sequence[str]]) -> Sampler:
    """The given cohorts, one for each round, starting over at the end."""
    if isinstance(cohorts, str) or not len(cohorts):
        raise invalid("cohorts", cohorts, "a non-empty list of lists of client names")
    given = tuple(tuple(c) for c in cohorts)
    for i, names in enumerate(given):
        if isinstance(cohorts[i], str) or len(set(names)) != len(names):
            raise InvalidArgument(f"cohorts[{i}]={cohorts[i]!r} must be a list of distinct client names.")

    def check(clients: Sequence[str]) -> None:
        strangers = sorted({c for names in given for c in names}.difference(clients))
        if strangers:
            raise InvalidArgument(f"cohorts name clients that are not in the data: {', '.join(strangers[:5])}.")

    mean = sum(len(c) for c in given) / len(given)
    return Sampler(
        record("sequence", cohorts=given), lambda seed, round, _: given[round % len(given)], lambda _: mean, check
    )


def cyclic(shuffle: bool = False) -> Sampler:
    """One client after the other; with `shuffle`, in a new order for every pass over the population."""

    def draw(seed: int, round: int, population: int) -> np.ndarray:
        turn, place = divmod(round, population)
        return _shuffled(seed, turn, population)[place : place + 1] if shuffle else np.array([place])

    return Sampler(record("cyclic", shuffle=shuffle), draw, lambda population: 1.0, _anyone)


def resolve(cohort: "int | float | Sampler | None") -> Sampler:
    """The sampler meant by `cohort=`: a number of clients, a fraction in (0, 1], or a sampler; None is everyone."""
    if cohort is None:
        return everyone()
    if isinstance(cohort, Sampler):
        return cohort
    if isinstance(cohort, bool) or not isinstance(cohort, int | float):
        raise invalid("cohort", cohort, "a number of clients, a fraction in (0, 1], or an atoll.sampling rule")
    return fixed(cohort) if isinstance(cohort, int) else fraction(cohort)


@lru_cache(maxsize=1)
def _shuffled(seed: int, turn: int, population: int) -> "np.ndarray":
    """The order of a pass over the population; kept for the rounds of the pass. Not to be written to."""
    return numpy_generator(seed, "cyclic", turn).permutation(population)


def _anyone(clients: Sequence[str]) -> None:
    """Every population will do."""
