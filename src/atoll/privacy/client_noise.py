"""Noise that clients add to their own rows: what a stage promises, what a run decides, and what it may say of itself.

In shares (`discrete_gaussian`, `skellam`): each client adds little, and the sum of enough of them is protected. What is
released is the sum, so every sum counts once for every client, and a round that gives no sum costs nothing.
`atoll.privacy.distributed` has the equations.
Alone (`local_noise`): each client adds so much that its row is protected from the server that receives it. What is
released is the row, so a client spends when it takes part, and whatever is done with rows afterwards is free.

    Gaussian, L2 clip c, standard deviation z c: two rows are 2 c apart at most, so that t rows are one release with the
    noise multiplier z / (2 sqrt t) (Balle & Wang 2018, theorem 8).
    Laplace, L1 clip c, scale b = z c / sqrt 2: epsilon = 2 t c / b at delta 0 (Dwork, McSherry, Nissim & Smith 2006,
    proposition 1).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from atoll.errors import BudgetSpent, InvalidArgument, invalid
from atoll.privacy import distributed
from atoll.privacy.accounting import LARGEST, check_delta, gaussian_epsilon, smallest, usual_delta
from atoll.privacy.distributed import Scheme
from atoll.privacy.noise import GRID, MOST, ROUNDING, Noise, deviation
from atoll.secret import Source

Mechanism = Literal["discrete_gaussian", "skellam", "gaussian", "laplace"]

LISTED = 50
"""Up to so many clients have their own epsilon in a statement."""

SMALLEST, WIDEST = 1e-30, 1e30
"""Between them lies the size of noise that is drawn on a grid."""

NAMES: Mapping[str, str] = {
    "discrete_gaussian": "discrete Gaussian", "skellam": "Skellam", "gaussian": "Gaussian", "laplace": "Laplace",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClientNoise:
    """Noise that every client adds to its row.

    Attributes:
        told: how much, or which epsilon it is to be calibrated for.
        mechanism: the law of the noise.
        clip: norm c to which a row is clipped.
        survivors: smallest number of honest clients whose noise protects a row; 1: each protects its own.
        scheme: (length, split, noise multiplier) -> what clients agree on, for noise in shares; None: each alone.
    """

    told: Noise
    mechanism: Mechanism
    clip: float
    survivors: int = 1
    scheme: Callable[[int, int, float], Scheme] | None = None


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """What was decided before round one of a run whose clients add noise.

    Attributes:
        mechanism: the law of the noise.
        noise_multiplier: of the sum's noise, or of a single row's: standard deviation divided by the norm.
        clip: norm c to which a row is clipped.
        delta: at which epsilon is told; 0 for Laplace noise.
        budget: largest epsilon; None: none.
        rounds: that were planned.
        population: clients there are.
        private: False where noise is seeded, for tests.
        scheme: of noise in shares; None: each client protects its own row.
    """

    mechanism: Mechanism
    noise_multiplier: float
    clip: float
    delta: float
    budget: float | None
    rounds: int
    population: int
    private: bool
    scheme: Scheme | None

    def spent(self, count: int) -> float:
        """Epsilon of so many sums, or of so many rows of one client."""
        return _spent(self, count)

    def check(self, count: int) -> None:
        """Refuse so many sums, or rows of one client, where the budget does not allow them.

        Raises:
            BudgetSpent: it does not.
        """
        if self.budget is not None and self.spent(count) > self.budget:
            raise BudgetSpent(
                f"the privacy budget is spent: {count:,} releases would take epsilon to {self.spent(count):.4g} at "
                f"delta {self.delta:g}, above the budget of {self.budget:g}. What was released stays as good as it "
                "was; more needs a larger budget, decided by those whose data it is, or more noise from the beginning."
            )

    @property
    def most(self) -> int | None:
        """How many the budget allows; None: any number.

        Raises:
            BudgetSpent: not even one.
        """
        if self.budget is None:
            return None
        self.check(1)
        fits, over = 1, 2
        while self.spent(over) <= self.budget:
            fits, over = over, 2 * over
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if self.spent(middle) <= self.budget else (fits, middle)
        return fits

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ClientTerms":
        """Undo `to_dict`."""
        given: dict[str, Any] = dict(values)
        scheme = given.pop("scheme")
        return ClientTerms(**given, scheme=None if scheme is None else Scheme(**scheme))


@lru_cache(maxsize=4096)
def _spent(terms: ClientTerms, count: int) -> float:
    if not count:
        return 0.0
    if terms.scheme is not None:
        return distributed.epsilon(terms.scheme, rounds=count, delta=terms.delta)
    if terms.mechanism == "laplace":
        return count * 2 * math.sqrt(2) / terms.noise_multiplier
    return gaussian_epsilon(terms.noise_multiplier / 2 / math.sqrt(count), terms.delta)


def laplace_scale(multiplier: float, clip: float, length: int) -> float:
    """Scale of the Laplace noise on a row of `length` numbers whose L1 norm is at most `clip`.

    It is b = multiplier clip / sqrt 2, and a little more: rounding two rows to the grid of spacing g may move them
    apart by length g, which counts beside their distance of 2 clip.

    Raises:
        InvalidArgument: a row that is too long for so much noise: rounding would add more than the clip allows.
    """
    wanted = multiplier * clip / math.sqrt(2)
    lost = length * GRID * wanted / (2 * clip)
    if lost >= 0.5:
        raise InvalidArgument(
            f"Laplace noise of multiplier {multiplier:g} on rows of {length:,} numbers would have to hide more "
            'rounding than data: use mechanism="gaussian".'
        )
    return wanted * (1 + ROUNDING) / (1 - lost)


def clipped(row: Tensor, clip: float, order: int = 2) -> Tensor:
    """A client's row [L], in double precision and with a norm of at most `clip`.

    A row that is not finite becomes nought, so that noise alone is sent: that training broke is a secret too.
    """
    exact = row.double()
    exact = exact * (clip / max(float(torch.linalg.vector_norm(exact, ord=order)), clip))
    return exact if bool(torch.isfinite(exact).all()) else torch.zeros_like(exact)


def check_alone(noise: ClientNoise, multiplier: float, length: int) -> None:
    """Refuse noise on rows of so many numbers that no client could add.

    Raises:
        InvalidArgument: it is too large for the row's length, or beyond what the grid holds.
    """
    scale = (laplace_scale if noise.mechanism == "laplace" else deviation)(multiplier, noise.clip, length)
    if not SMALLEST <= scale <= WIDEST:
        raise invalid(
            "clip", noise.clip, f"one whose noise is of a size from {SMALLEST:g} to {WIDEST:g}, not {scale:.3g}",
            "Give the clip in units of the update.",
        )  # fmt: skip


def adding_laplace(multiplier: float, source: Source) -> Callable[[Tensor, float], Tensor]:
    """(row [L] float64, its L1 norm at most) -> the row with Laplace noise from this source."""

    def add(row: Tensor, clip: float) -> Tensor:
        scale = laplace_scale(multiplier, clip, row.numel())
        return source.add_laplace(row.clamp(-MOST * scale, MOST * scale), scale)

    return add


def decide(noise: ClientNoise, length: int, split: int, *, population: int, rounds: int, releases: int) -> ClientTerms:
    """The terms of a run; noise that asks for an epsilon is calibrated.

    Args:
        noise: of the stage.
        length, split: of the rows that enter the stage.
        population: clients there are.
        rounds: of the whole run.
        releases: sums there will be, or rows of the client that takes part most often.

    Raises:
        InvalidArgument: a delta that is too large, a ring that is too small, a calibration without a solution.
        BudgetSpent: the budget does not allow a single round.
    """
    told = noise.told
    pure = noise.mechanism == "laplace"
    delta = 0.0 if pure else check_delta(usual_delta(population) if told.delta is None else told.delta, population)

    def terms(multiplier: float) -> ClientTerms:
        if noise.scheme is None:
            check_alone(noise, multiplier, length)
        scheme = None if noise.scheme is None else noise.scheme(length, split, multiplier)
        budget = told.budget if told.epsilon is None else told.epsilon
        return ClientTerms(
            noise.mechanism, multiplier, noise.clip, delta, budget, rounds, population, told.seed is None, scheme
        )

    def spent(multiplier: float) -> float:
        try:
            return terms(multiplier).spent(releases)
        except InvalidArgument:  # more noise than can be carried: less is looked for, and refused where it needs this
            return 0.0

    multiplier = told.noise_multiplier
    if multiplier is None:
        assert told.epsilon is not None
        multiplier = smallest(spent, told.epsilon)
        if multiplier is None:
            raise InvalidArgument(
                f"epsilon={told.epsilon:g} at delta={delta:g} cannot be reached in {releases:,} releases by any noise "
                f"multiplier up to {LARGEST:,.0f}: allow a larger epsilon, or fewer rounds."
            )
    found = terms(multiplier)
    found.check(1)
    return found


# --- what may be said -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Count:
    """What was released of clients.

    Attributes:
        all: rounds that count for every client: sums, or rounds in which everybody took part.
        named: further rounds of single clients.
    """

    all: int = 0
    named: Counter[str] = field(default_factory=Counter[str])

    def enter(self, clients: Sequence[str] | None) -> None:
        """One more round: of these clients, or (None) of everybody."""
        if clients is None:
            self.all += 1
        else:
            self.named.update(clients)

    @property
    def largest(self) -> int:
        """Of the client that has most."""
        return self.all + max(self.named.values(), default=0)


def counted(made: Iterable[Mapping[str, Any]]) -> Count:
    """What a journal's entries "client_release" add up to."""
    found = Count()
    for body in made:
        found.enter(body["clients"])
    return found


def statement(terms: ClientTerms, count: Count, clients: Sequence[str] = ()) -> dict[str, Any]:
    """A guarantee for clients, as plain JSON values.

    Args:
        terms: of the run.
        count: what was released.
        clients: all there are, where their own epsilons are to be told; up to 50.
    """
    alone, most = terms.scheme is None, count.largest
    event = {
        "mechanism": terms.mechanism, "noise_multiplier": terms.noise_multiplier, "sampling": "none",
        "sampling_rate": 1.0, "count": most,
    }  # fmt: skip
    said: dict[str, Any] = {
        "unit": "client, local model" if alone else "client",
        "epsilon": terms.spent(most),
        "delta": terms.delta,
        "neighbours": "replace-one" if alone else "zero-out",
        "accountant": ("pure" if terms.mechanism == "laplace" else "analytic") if alone else "rdp",
        "budget": terms.budget,
        "releases": most,
        "events": [event] if most else [],
        "whose": f"each of {terms.population:,} clients, with all of its examples",
        "population": terms.population,
        "mechanism": terms.mechanism,
        "noise_multiplier": terms.noise_multiplier,
        "clip": terms.clip,
        "private": terms.private,
        "added_by": "each client, to its own update" if alone else "clients, in shares",
        "not_covered": [
            "who takes part, which is no secret",
            "how long rounds took",
            "models that clients keep for themselves, if they are handed on",
            "anything that is worked out from the clients' examples beside the run, such as result.evaluate(data)",
        ],
    }
    if terms.scheme is not None:
        survivors = terms.scheme.survivors
        return said | {
            "survivors": survivors,
            "trusted": "the server to be honest but curious, so that it learns nothing but sums "
            "(secure_sum(grade='full') is the protocol for that; grade='exact' is its arithmetic alone and hides "
            f"nothing), and {survivors:,} clients of every sum to add their noise honestly",
        }
    listed = clients if len(clients) <= LISTED else ()
    return said | {
        "trusted": "nobody but the client itself",
        "clients": {c: terms.spent(count.all + count.named[c]) for c in listed},
    }


def statements(decided: Iterable[Mapping[str, Any]], made: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The guarantee of a run as far as its journal goes: of its entries "client_noise" and "client_release"."""
    begun = next(iter(decided), None)
    return [] if begun is None else [statement(ClientTerms.from_dict(begun["terms"]), counted(made))]
