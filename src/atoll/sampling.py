"""Who takes part in a round: samplers, keyed by seed and round, never by history.

Under differential privacy it must be a secret who was drawn, or sampling hides nobody. A run with noise draws its
cohorts by `secret_cohort`, from the cryptographic source, and `chance` tells the accountant how.

A cohort costs what the cohort costs. Only `poisson` asks every client, in one array operation; `cyclic(shuffle=True)`
shuffles the population once for each pass over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np

from atoll.errors import InvalidArgument, invalid
from atoll.privacy.accounting import Sampling
from atoll.random import numpy_generator
from atoll.secret import Source
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
        chance: (population size) -> how an accountant counts it ("poisson", "fixed" or "none") and the share of the
            population that is drawn; None: no accountant knows this rule.
        secret: (source, population size) -> indices of a cohort, ascending; None: who takes part is no secret.
        apart: (population size) -> b, so that whoever takes part in a round does not before b rounds later, whatever
            the seed; None: nothing is promised.
    """

    spec: Spec
    draw: Callable[[int, int, int], "np.ndarray | Sequence[str]"]
    expected: Callable[[int], float]
    check: Callable[[Sequence[str]], None]
    chance: Callable[[int], tuple[Sampling, float]] | None = None
    secret: Callable[[Source, int], "np.ndarray"] | None = None
    apart: Callable[[int], int] | None = None

    def cohort(self, seed: int, round: int, clients: Sequence[str]) -> tuple[str, ...]:
        """Names of the clients that take part in a round."""
        return self._names(self.draw(seed, round, len(clients)), clients)

    def secret_cohort(self, source: Source, seed: int, round: int, clients: Sequence[str]) -> tuple[str, ...]:
        """The same, drawn from a secret source where the rule draws at all."""
        if self.secret is None:
            return self.cohort(seed, round, clients)
        return self._names(self.secret(source, len(clients)), clients)

    @staticmethod
    def _names(drawn: "np.ndarray | Sequence[str]", clients: Sequence[str]) -> tuple[str, ...]:
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

    return Sampler(
        record("fixed", size=size), draw, lambda population: float(size), check,
        lambda population: ("fixed", size / population),
        lambda source, population: np.sort(source.sample(population, size).numpy()),
    )  # fmt: skip


def fraction(share: float) -> Sampler:
    """A fixed share of the population, rounded, at least one client, drawn without replacement."""
    if isinstance(share, bool) or not 0 < share <= 1:
        raise invalid("cohort", share, "a fraction in (0, 1]")

    def size(population: int) -> int:
        return max(1, round(share * population))

    def draw(seed: int, round: int, population: int) -> "np.ndarray | Sequence[str]":
        return fixed(size(population)).draw(seed, round, population)

    return Sampler(
        record("fraction", share=share), draw, lambda p: float(size(p)), _anyone, lambda p: ("fixed", size(p) / p),
        lambda source, population: np.sort(source.sample(population, size(population)).numpy()),
    )  # fmt: skip


def poisson(rate: float) -> Sampler:
    """Every client takes part independently with this probability; a cohort may be empty."""
    if isinstance(rate, bool) or not 0 < rate <= 1:
        raise invalid("rate", rate, "a probability in (0, 1]")

    def draw(seed: int, round: int, population: int) -> np.ndarray:
        return np.flatnonzero(numpy_generator(seed, "cohort", round).random(population) < rate)

    return Sampler(
        record("poisson", rate=rate), draw, lambda population: rate * population, _anyone,
        lambda population: ("poisson", rate),
        lambda source, population: source.bernoulli(rate, population).numpy().nonzero()[0],
    )  # fmt: skip


def everyone() -> Sampler:
    """All clients in every round."""
    return Sampler(
        record("everyone"), lambda seed, round, population: np.arange(population), float, _anyone, _known,
        apart=lambda population: 1,
    )  # fmt: skip


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
        record("sequence", cohorts=given), lambda seed, round, _: given[round % len(given)], lambda _: mean, check,
        _known,
    )  # fmt: skip


def cyclic(shuffle: bool = False) -> Sampler:
    """One client after the other; with `shuffle`, in a new order for every pass over the population."""

    def draw(seed: int, round: int, population: int) -> np.ndarray:
        turn, place = divmod(round, population)
        return _shuffled(seed, turn, population)[place : place + 1] if shuffle else np.array([place])

    return Sampler(record("cyclic", shuffle=shuffle), draw, lambda population: 1.0, _anyone, _known)


def min_separation(size: int, separation: int) -> Sampler:
    """A fixed number of clients, none of which takes part again within `separation` rounds.

    The population is dealt into as many groups at random; round t draws from group t modulo the number of groups. So
    the separation is a function of seed and round: it holds over restarts, and nobody need remember who took part. It
    is what correlated noise (`atoll.transforms.correlated_noise`) counts on: in n rounds a client takes part at most
    ceil(n / separation) times. Nothing is claimed from the sampling itself.

    Args:
        size: of a cohort.
        separation: a client that takes part in round t does not before round t + separation.
    """
    for name, value in (("size", size), ("separation", separation)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(name, value, "an integer of at least 1")

    def draw(seed: int, round: int, population: int) -> np.ndarray:
        group = _dealt(seed, population)[round % separation :: separation]
        return np.sort(numpy_generator(seed, "cohort", round).choice(group, size, replace=False, shuffle=False))

    def check(clients: Sequence[str]) -> None:
        if size * separation > len(clients):
            raise invalid(
                "separation", separation,
                f"at most {len(clients) // size} for {len(clients)} clients in cohorts of {size}",
                f"Or use cohorts of at most {len(clients) // separation}.",
            )  # fmt: skip

    return Sampler(
        record("min_separation", size=size, separation=separation), draw, lambda population: float(size), check, _known,
        apart=lambda population: separation,
    )  # fmt: skip


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


@lru_cache(maxsize=1)
def _dealt(seed: int, population: int) -> "np.ndarray":
    """The order in which a population is dealt into groups. Not to be written to.

    Raw bits are the same in every version of NumPy; its permutations need not be, and a run may go on under another.
    """
    return np.argsort(numpy_generator(seed, "separation").bit_generator.random_raw(population), kind="stable")


def _anyone(clients: Sequence[str]) -> None:
    """Every population will do."""


def _known(population: int) -> tuple[Sampling, float]:
    """Who takes part is known beforehand: sampling hides nobody."""
    return "none", 1.0
