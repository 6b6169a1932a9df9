"""The ledger of a run: whose data are protected, against which neighbours, and every release that was made.

A release is entered *before* it is made, so that a ledger never holds less than what ran. A budget is checked before
that: the release that would exceed it is refused, and nothing of it happens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from atoll.errors import BudgetSpent, invalid
from atoll.privacy.accounting import (
    NEIGHBOURS,
    Accountant,
    Event,
    Neighbours,
    check_accountant,
    check_delta,
    check_epsilon,
    composed_epsilon,
    default_accountant,
)
from atoll.privacy.factorization import Strategy

Unit = Literal["client", "example"]
"""Whose data one guarantee is about: all of a client's, or one example of a client."""

EXACT = 16
"""Up to so many equal releases, and then with every sixteenth part more, epsilon is worked out anew while a run goes
on; between these it is that of the next number of releases: never less."""


@dataclass(slots=True)
class Ledger:
    """Releases of one mechanism under one guarantee.

    Attributes:
        unit: "client" or "example".
        delta: at which epsilon is told.
        neighbours: "zero-out" (one unit's data replaced by nothing, its number known) or "replace-one".
        accountant: "pld", "rdp" or "analytic"; None: the tightest that is right for the events.
        budget: largest epsilon; None: none.
        events: what was released, equal releases counted together.
        strategy: of noise that is correlated between releases; None: every release has fresh noise. All of them
            together are one Gaussian mechanism then, of which those so far are the beginning: its noise multiplier is
            that of the whole, times the sensitivity of the whole divided by that of the beginning.
    """

    unit: Unit
    delta: float
    neighbours: Neighbours = "zero-out"
    accountant: Accountant | None = None
    budget: float | None = None
    events: list[Event] = field(default_factory=list[Event])
    strategy: Strategy | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("client", "example"):
            raise invalid("unit", self.unit, '"client" or "example"')
        if self.neighbours not in ("zero-out", "replace-one"):
            raise invalid("neighbours", self.neighbours, '"zero-out" or "replace-one"')
        check_delta(self.delta)
        if self.budget is not None:
            check_epsilon(self.budget, "budget")
        if self.accountant is not None:
            check_accountant(self.accountant)
        given, self.events = self.events, []
        for event in given:
            self.enter(event)

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self._spent(self.events)

    @property
    def releases(self) -> int:
        """How many there were."""
        return sum(e.count for e in self.events)

    def after(self, *more: Event) -> float:
        """Epsilon if these were released too."""
        return self._spent(self._merged(more))

    def check(self, event: Event) -> None:
        """Refuse a release that the budget does not allow.

        Raises:
            BudgetSpent: it would take epsilon above the budget.
            InvalidArgument: its neighbours are not those of this ledger.
        """
        self._check_neighbours(event)
        if not self._allows(event):
            raise BudgetSpent(
                f"the privacy budget is spent: {self.releases:,} releases took epsilon {self.epsilon:.4g} at delta "
                f"{self.delta:g}, and the next would take it to {self.after(event):.4g}, above the budget of "
                f"{self.budget:g}. What was released stays as good as it was; more needs a larger budget, decided by "
                "those whose data it is, or more noise from the beginning."
            )

    def spend(self, event: Event) -> None:
        """Enter a release that is about to be made.

        Raises:
            BudgetSpent: the budget does not allow it; nothing was entered.
        """
        self.check(event)
        self.enter(event)

    def enter(self, event: Event) -> None:
        """Enter a release that was made, whatever the budget."""
        self._check_neighbours(event)
        if event.count:
            self.events = self._merged((event,))

    def fits(self, event: Event, most: int) -> int:
        """How many more releases like this, up to `most`, the budget allows."""
        least, over = 0, most + 1
        if not most or self._allows(replace(event, count=most)):
            return most
        while over - least > 1:
            middle = (least + over) // 2
            least, over = (middle, over) if self._allows(replace(event, count=middle)) else (least, middle)
        return least

    def told(self, planned: int) -> float:
        """Epsilon to show while a run of `planned` releases goes on: exact now and then, else rounded up."""
        if len(self.events) != 1 or self.events[0].count >= planned:
            return self.epsilon
        at = ahead(self.events[0].count, planned)
        return self._spent([replace(self.events[0], count=at)], fine=at == planned)

    def _allows(self, event: Event) -> bool:
        if self.budget is None:
            return True
        then = self._merged((event,))
        # The coarse answer is never less than the fine one.
        return any(self._spent(then, fine=fine) <= self.budget for fine in (False, True))

    def _spent(self, events: Sequence[Event], *, fine: bool = True) -> float:
        """Epsilon of these releases."""
        if self.strategy is not None and events:
            rounds = sum(e.count for e in events)
            share = self.strategy.sensitivity / self.strategy.prefix(rounds)
            events = [Event(events[0].noise_multiplier * share)]
        return _epsilon(tuple(events), self.delta, self.accountant, fine)

    def statement(self) -> dict[str, Any]:
        """What can be said of it, as plain JSON values."""
        own = self.strategy
        told = (
            {}
            if own is None
            else {
                "strategy": {
                    "name": own.spec["name"],
                    "rounds": own.rounds,
                    "separation": own.separation,
                    "participations": own.participations,
                    "sensitivity": own.sensitivity,
                }
            }
        )
        return {
            **told,
            "unit": self.unit,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "neighbours": self.neighbours,
            "accountant": self.accountant or (default_accountant(self.events) if self.events else None),
            "budget": self.budget,
            "releases": self.releases,
            "events": [
                {
                    "mechanism": "gaussian" if own is None else "correlated gaussian",
                    "noise_multiplier": e.noise_multiplier,
                    "sampling": e.sampling,
                    "sampling_rate": e.sampling_rate,
                    "count": e.count,
                }
                for e in self.events
            ],
        }

    def _merged(self, more: Sequence[Event]) -> list[Event]:
        """All events, equal ones counted together."""
        counts: dict[Event, int] = {}
        for event in (*self.events, *more):
            one = replace(event, count=1)
            counts[one] = counts.get(one, 0) + event.count
        self._check_mechanism(counts)
        return [replace(one, count=count) for one, count in counts.items() if count]

    def _check_mechanism(self, counts: Mapping[Event, int]) -> None:
        """Refuse to count as part of one correlated mechanism what is none."""
        if self.strategy is None or not counts:
            return
        if len(counts) > 1 or next(iter(counts)).sampling != "none":
            raise invalid(
                "events", [e.sampling for e in counts], 'releases of one noise multiplier with sampling="none"',
                "Correlated noise claims nothing from sampling. Keep a ledger of its own for other releases.",
            )  # fmt: skip
        if (rounds := sum(counts.values())) > self.strategy.rounds:
            raise invalid(
                "steps", rounds, f"at most the {self.strategy.rounds} rounds that the noise was correlated for"
            )

    def _check_neighbours(self, event: Event) -> None:
        if NEIGHBOURS[event.sampling] != self.neighbours:
            raise invalid(
                "sampling", event.sampling, f"one whose neighbours are {self.neighbours}, as this ledger's are",
                "Keep a ledger of its own for it.",
            )  # fmt: skip


def ahead(count: int, planned: int) -> int:
    """The next of the numbers of releases at which epsilon is worked out: all up to 16, then a sixteenth apart."""
    at = 1
    while at < count:
        at += 1 if at < EXACT else max(1, at // EXACT)
    return max(count, min(at, planned))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, accountant: Accountant | None, fine: bool) -> float:
    return composed_epsilon(events, delta, accountant, fine=fine)
