"""The ledger: what was released, what it spent, and the release that is refused."""

import pytest

from atoll.errors import BudgetSpent, InvalidArgument
from atoll.privacy import Event, Ledger, epsilon, factorization


def test_a_ledger_says_what_its_events_spend() -> None:
    ledger = Ledger("client", 1e-5)
    assert ledger.epsilon == 0.0 and ledger.releases == 0
    for _ in range(3):
        ledger.spend(Event(2.0))
    ledger.spend(Event(3.0, count=2))
    assert ledger.events == [Event(2.0, count=3), Event(3.0, count=2)] and ledger.releases == 5
    together = (3 / 2.0**2 + 2 / 3.0**2) ** -0.5
    assert ledger.epsilon == pytest.approx(
        epsilon(noise_multiplier=together, steps=1, delta=1e-5, sampling="none"), rel=1e-9
    )
    assert ledger.after(Event(2.0)) > ledger.epsilon


def test_the_release_that_exceeds_the_budget_is_refused_before_it_is_entered() -> None:
    once = epsilon(noise_multiplier=2.0, steps=4, delta=1e-5, sampling="none")
    ledger = Ledger("client", 1e-5, budget=once)
    assert ledger.fits(Event(2.0), 100) == 4 and ledger.fits(Event(2.0), 3) == 3
    ledger.spend(Event(2.0, count=4))
    with pytest.raises(BudgetSpent, match=r"budget is spent: 4 releases took epsilon .* above the budget"):
        ledger.spend(Event(2.0))
    assert ledger.releases == 4 and ledger.fits(Event(2.0), 100) == 0
    assert ledger.fits(Event(1000.0), 1) == 0, "not even a little more"


def test_a_budget_under_sampling_is_spent_to_the_last_release_that_fits() -> None:
    event = Event(1.0, "poisson", 0.05)
    budget = epsilon(noise_multiplier=1.0, sampling_rate=0.05, steps=30, delta=1e-4)
    ledger = Ledger("client", 1e-4, budget=budget)
    assert ledger.fits(event, 40) == 30


def test_what_is_told_on_the_way_is_never_less_and_exact_in_the_end() -> None:
    event = Event(1.0, "poisson", 0.05)
    ledger = Ledger("client", 1e-4, accountant="rdp")
    for count in range(1, 61):
        ledger.spend(event)
        told, true = ledger.told(60), ledger.epsilon
        assert true <= told <= 1.06 * true
        assert told == true or 16 < count < 60
    assert ledger.told(60) == ledger.epsilon


def test_neighbours_are_not_mixed() -> None:
    ledger = Ledger("client", 1e-5, "replace-one")
    ledger.spend(Event(4.0, "fixed", 0.1))
    with pytest.raises(InvalidArgument, match=r"sampling='poisson'.*replace-one"):
        ledger.spend(Event(4.0, "poisson", 0.1))
    assert ledger.releases == 1


def test_a_statement_has_unit_neighbours_delta_and_events() -> None:
    ledger = Ledger("example", 1e-5, budget=50.0, events=[Event(1.0, "poisson", 0.5, 3), Event(1.0, "poisson", 0.5)])
    said = ledger.statement()
    assert (said["unit"], said["neighbours"], said["delta"], said["budget"]) == ("example", "zero-out", 1e-5, 50.0)
    assert said["accountant"] == "pld" and said["releases"] == 4 and said["epsilon"] == ledger.epsilon
    one = {"mechanism": "gaussian", "noise_multiplier": 1.0, "sampling": "poisson", "sampling_rate": 0.5, "count": 4}
    assert said["events"] == [one]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"unit": "hospital"}, "unit='hospital'"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"accountant": "moments"}, "accountant='moments'"),
        ({"neighbours": "add"}, "neighbours='add'"),
    ],
)
def test_ledgers_that_mean_nothing(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Ledger(**{"unit": "client", "delta": 1e-5} | wrong)  # type: ignore[arg-type]


# --- correlated noise -------------------------------------------------------------------------------------------------


def correlated(budget: float | None = None) -> tuple[Ledger, list[float]]:
    """A ledger of ten rounds, and epsilon after each of them."""
    own = factorization.buffered(10, separation=3)
    spent = [
        epsilon(noise_multiplier=1.5 * own.sensitivity / own.prefix(r), steps=1, delta=1e-5, sampling="none")
        for r in range(1, 11)
    ]
    return Ledger("client", 1e-5, budget=budget, strategy=own), spent


def test_correlated_releases_are_one_mechanism() -> None:
    ledger, spent = correlated()
    assert ledger.epsilon == 0.0
    for r, expected in enumerate(spent, 1):
        assert ledger.after(Event(1.5)) == pytest.approx(expected, rel=1e-12)
        ledger.spend(Event(1.5))
        assert ledger.epsilon == pytest.approx(expected, rel=1e-12) and ledger.releases == r
        assert ledger.told(10) >= ledger.epsilon
    assert spent == sorted(spent) and spent[0] < spent[-1]
    assert ledger.epsilon == pytest.approx(epsilon(noise_multiplier=1.5, steps=1, delta=1e-5, sampling="none"))
    with pytest.raises(InvalidArgument, match=r"steps=11.*at most the 10 rounds"):
        ledger.spend(Event(1.5))
    assert ledger.releases == 10


def test_a_budget_allows_the_rounds_of_a_correlated_mechanism_that_fit() -> None:
    ledger, spent = correlated(budget=correlated()[1][5])
    most = sum(e <= spent[5] for e in spent)  # none is spent in rounds that nobody's later participation reaches
    assert 6 <= most < 10 and ledger.fits(Event(1.5), 10) == most
    ledger.enter(Event(1.5, count=most))
    with pytest.raises(BudgetSpent, match=rf"{most} releases"):
        ledger.spend(Event(1.5))


@pytest.mark.parametrize("other", [Event(1.6), Event(1.5, "poisson", 0.5)])
def test_nothing_else_is_counted_as_part_of_a_correlated_mechanism(other: Event) -> None:
    ledger, _ = correlated()
    ledger.spend(Event(1.5))
    with pytest.raises(InvalidArgument, match="releases of one noise multiplier"):
        ledger.enter(other)
    assert ledger.events == [Event(1.5)]
