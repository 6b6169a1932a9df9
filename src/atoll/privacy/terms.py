"""What was decided before round one of a run with noise, and what the run may say of itself."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from atoll.privacy.accounting import NEIGHBOURS, Accountant, Event, Sampling
from atoll.privacy.factorization import restored
from atoll.privacy.ledger import Ledger
from atoll.spec import Spec


@dataclass(frozen=True, slots=True)
class Terms:
    """What was decided before round one.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by the clip norm, and by the strategy's sensitivity.
        sampling: how the accountant counts cohorts.
        sampling_rate: which share of the population is in one.
        population: clients there are.
        expected: expected cohort size.
        delta: at which epsilon is told.
        accountant: how releases are added up.
        budget: largest epsilon; None: none.
        rounds: that were planned.
        private: False where noise and cohorts are seeded, for tests.
        strategy: by which noise is correlated between rounds; None: it is not.
        unit: whose data is protected: a client of a simulation, or a site of a run over sites.
    """

    noise_multiplier: float
    sampling: Sampling
    sampling_rate: float
    population: int
    expected: float
    delta: float
    accountant: Accountant
    budget: float | None
    rounds: int
    private: bool
    strategy: Spec | None = None
    unit: Literal["client", "site"] = "client"

    @property
    def event(self) -> Event:
        """One release."""
        return Event(self.noise_multiplier, self.sampling, self.sampling_rate)

    @property
    def ledger(self) -> Ledger:
        """A ledger without releases."""
        strategy = None if self.strategy is None else restored(self.strategy)
        return Ledger(
            "client", self.delta, NEIGHBOURS[self.sampling], self.accountant, self.budget, strategy=strategy
        )  # fmt: skip


def statement(terms: Terms, ledger: Ledger) -> dict[str, Any]:
    """A guarantee for whole clients, or sites, as plain JSON values."""
    if terms.unit == "site":
        return _over_sites(terms, ledger)
    return {
        **ledger.statement(),
        "whose": f"each of {terms.population:,} clients, with all of its examples",
        "population": terms.population,
        "expected_cohort": terms.expected,
        "noise_multiplier": terms.noise_multiplier,
        "private": terms.private,
        "trusted": "the server, which sees every client's update before it adds the noise",
        "not_covered": [
            "how long rounds took",
            "models that clients keep for themselves, if they are handed on",
            "anything that is worked out from the clients' examples beside the run, such as result.evaluate(data)",
        ],
    }


def _over_sites(terms: Terms, ledger: Ledger) -> dict[str, Any]:
    """The same of a run over sites, where it is known who takes part."""
    return {
        **ledger.statement(),
        "unit": "site",
        "whose": "each site that takes part, with all of its examples",
        "population": terms.population,
        "expected_cohort": terms.expected,
        "noise_multiplier": terms.noise_multiplier,
        "private": terms.private,
        "trusted": (
            "the server, which runs the experiment's code and sees every site's update before it adds the noise"
        ),
        "not_covered": [
            "which sites took part in which round, and when; whether a site's code broke or its update was refused, "
            "and which site was asked in its place",
            "what sites answered about their tables before the first round",
            "models that sites keep for themselves, if they are handed on",
            "anything that is worked out from the sites' examples beside the run",
        ],
    }


def statements(decided: Iterable[Mapping[str, Any]], made: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The guarantees of a run as far as its journal goes: of its entries "privacy" and "release"."""
    begun = next(iter(decided), None)
    if begun is None:
        return []
    terms = Terms(**begun["terms"])
    return [statement(terms, ledger_of(terms, made))]


def ledger_of(terms: Terms, made: Iterable[Mapping[str, Any]]) -> Ledger:
    """The ledger with every release that was entered."""
    ledger = terms.ledger
    names = ("noise_multiplier", "sampling", "sampling_rate", "count")
    counted = Counter(Event(*(body[n] for n in names)) for body in made)
    ledger.events = [replace(event, count=event.count * times) for event, times in counted.items()]
    return ledger
