"""Epsilon held to dp-accounting called directly, to published tables, and to closed forms."""

import math
import subprocess
import sys
from typing import Any

import pytest
from dp_accounting import dp_event, gaussian_mechanism
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from atoll import privacy
from atoll.errors import InvalidArgument
from atoll.privacy import accounting
from atoll.privacy.accounting import Event, composed_epsilon, gaussian_delta, gaussian_epsilon, renyi

# McMahan, Ramage, Talwar & Zhang 2018, table 1: users, expected users in a round, noise multiplier, and epsilon after
# 1, 10, ..., 10^6 rounds at delta = users^-1.1. They used the moments 1 to 32, which are the Renyi orders 2 to 33, and
# the conversion epsilon = min over orders of rdp + log(1 / delta) / (order - 1).
TABLE = [
    (1e5, 1e2, 1.0, (0.97, 0.98, 1.00, 1.07, 1.18, 2.21, 7.50)),
    (1e6, 1e1, 1.0, (0.68, 0.69, 0.69, 0.69, 0.69, 0.72, 0.73)),
    (1e6, 1e3, 1.0, (1.17, 1.17, 1.20, 1.28, 1.39, 2.44, 8.13)),
    (1e6, 1e4, 1.0, (1.73, 1.92, 2.08, 3.06, 8.49, 32.38, 187.01)),
    (1e6, 1e3, 3.0, (0.47, 0.47, 0.48, 0.48, 0.49, 0.67, 1.95)),
    (1e9, 1e3, 1.0, (0.84, 0.84, 0.84, 0.85, 0.88, 0.88, 0.88)),
]


@pytest.mark.parametrize(("users", "cohort", "multiplier", "published"), TABLE)
def test_the_published_table_is_reproduced_to_its_last_digit(
    users: float, cohort: float, multiplier: float, published: tuple[float, ...]
) -> None:
    orders = tuple(float(o) for o in range(2, 34))
    each = renyi(multiplier, "poisson", cohort / users, orders)
    extra = 1.1 * math.log(users)
    found = [min(10**k * r + extra / (o - 1) for o, r in zip(orders, each, strict=True)) for k in range(7)]
    assert [round(e, 2) for e in found] == list(published)


def test_today_s_accountants_are_tighter_than_the_published_table() -> None:
    values = [
        privacy.epsilon(
            noise_multiplier=1.0, sampling_rate=1e-3, steps=10**5, delta=1e5**-1.1, accountant=name, population=10**5
        )
        for name in ("pld", "rdp")
    ]  # fmt: skip
    assert values[0] < values[1] < 2.21


@pytest.mark.parametrize(("rate", "multiplier", "steps"), [(0.01, 1.0, 1000), (0.2, 0.7, 30), (1.0, 2.0, 5)])
def test_poisson_is_what_dp_accounting_says(rate: float, multiplier: float, steps: int) -> None:
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(multiplier))
    for name, accountant in (("pld", PLDAccountant()), ("rdp", RdpAccountant())):
        expected = accountant.compose(event, steps).get_epsilon(1e-5)
        given: Any = {"noise_multiplier": multiplier, "sampling_rate": rate, "steps": steps, "delta": 1e-5}
        found = privacy.epsilon(accountant=name, **given)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-6)
        if name == "pld":
            assert found == privacy.epsilon(**given), "the tightest is the default"


def test_fixed_samples_replace_one_and_count_the_noise_by_half() -> None:
    given: Any = {"sampling_rate": 0.01, "steps": 1000, "delta": 1e-5, "sampling": "fixed", "population": 10_000}
    for multiplier in (2.0, 4.0):
        event = dp_event.SampledWithoutReplacementDpEvent(10_000, 100, dp_event.GaussianDpEvent(multiplier / 2))
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        expected = accountant.compose(event, 1000).get_epsilon(1e-5)
        assert privacy.epsilon(noise_multiplier=multiplier, **given) == pytest.approx(expected, rel=1e-9)
    poisson = privacy.epsilon(noise_multiplier=2.0, sampling_rate=0.01, steps=1000, delta=1e-5)
    assert privacy.epsilon(noise_multiplier=2.0, **given) > 2 * poisson


def test_a_sample_of_everybody_is_never_counted_above_no_sampling() -> None:
    for rate in (0.5, 0.9, 1.0):
        fixed = composed_epsilon([Event(4.0, "fixed", rate, 10)], 1e-5, "rdp")
        assert fixed <= composed_epsilon([Event(2.0, "none", 1.0, 10)], 1e-5, "rdp") * (1 + 1e-12)


@pytest.mark.parametrize("multiplier", [0.02, 0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-9])
def test_one_release_is_exact(multiplier: float, delta: float) -> None:
    found = gaussian_epsilon(multiplier, delta)
    assert found == pytest.approx(gaussian_mechanism.get_epsilon_gaussian(multiplier, delta), rel=1e-7, abs=1e-9)
    assert gaussian_delta(multiplier, found) <= delta


def test_releases_without_sampling_are_one_with_less_noise() -> None:
    many = privacy.epsilon(noise_multiplier=4.0, steps=16, delta=1e-6, sampling="none")
    assert many == pytest.approx(gaussian_epsilon(1.0, 1e-6), rel=1e-12)
    for name in ("pld", "rdp"):
        other = privacy.epsilon(noise_multiplier=4.0, steps=16, delta=1e-6, sampling="none", accountant=name)  # type: ignore[arg-type]
        assert other >= many * (1 - 1e-9)
        assert other == pytest.approx(many, rel=1e-3 if name == "pld" else 0.2)


def test_the_coarse_answer_is_near_and_never_less() -> None:
    for event in (Event(1.0, "poisson", 0.01, 300), Event(0.5, "poisson", 0.3, 20), Event(10.0, "poisson", 0.01, 300)):
        fine = composed_epsilon([event], 1e-5)
        coarse = composed_epsilon([event], 1e-5, fine=False)
        assert fine <= coarse * (1 + 1e-9) <= fine * 1.002 + 2e-9


@pytest.mark.parametrize(
    "given",
    [
        {"sampling_rate": 0.05, "steps": 100, "delta": 1e-5},
        {"sampling_rate": 0.05, "steps": 100, "delta": 1e-5, "accountant": "rdp"},
        {"sampling_rate": 0.1, "steps": 20, "delta": 1e-4, "sampling": "fixed", "population": 1000},
        {"steps": 50, "delta": 1e-5, "sampling": "none"},
    ],
)
@pytest.mark.parametrize("wanted", [0.7, 8.0])
def test_calibrated_noise_spends_what_it_may_and_hardly_less(given: Any, wanted: float) -> None:
    multiplier = privacy.calibrate(epsilon=wanted, **given)
    assert wanted * 0.997 <= privacy.epsilon(noise_multiplier=multiplier, **given) <= wanted
    assert privacy.epsilon(noise_multiplier=multiplier * 0.99, **given) > wanted


def test_more_noise_and_fewer_rounds_spend_less() -> None:
    def spent(multiplier: float, steps: int, rate: float) -> float:
        return composed_epsilon([Event(multiplier, "poisson", rate, steps)], 1e-5, fine=False)

    assert spent(1.1, 100, 0.01) < spent(1.0, 100, 0.01) < spent(1.0, 101, 0.01) < spent(1.0, 101, 0.02)
    assert composed_epsilon([], 1e-5) == 0.0


def test_several_kinds_of_releases_are_added_up() -> None:
    both = [Event(1.0, "poisson", 0.01, 100), Event(3.0, "none", 1.0, 2)]
    direct = PLDAccountant().compose(dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(1.0)), 100)
    direct.compose(dp_event.GaussianDpEvent(3.0), 2)
    assert composed_epsilon(both, 1e-5) == pytest.approx(direct.get_epsilon(1e-5), rel=1e-3)
    with pytest.raises(InvalidArgument, match="cannot be added up"):
        composed_epsilon([Event(1.0, "fixed", 0.1), Event(1.0, "none")], 1e-5)


GOOD: dict[str, Any] = {"noise_multiplier": 1.0, "steps": 10, "delta": 1e-5, "sampling_rate": 0.1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier=0.0.*above 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": True}, "noise_multiplier=True"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"delta": 0.01, "population": 100}, r"delta=0.01.*below 1 / population = 0.01.*Use for instance 1e-05"),
        ({"sampling_rate": 0.0}, "sampling_rate=0.0"),
        ({"sampling_rate": 1.5}, "sampling_rate=1.5"),
        ({"sampling": "none"}, 'sampling_rate=0.1.*sampling="none"'),
        ({"sampling": "with replacement"}, "sampling='with replacement'"),
        ({"sampling": "fixed"}, 'population=None.*sampling="fixed"'),
        ({"sampling": "fixed", "population": 15}, "sampling_rate=0.1.*a whole number of the 15"),
        ({"sampling": "fixed", "population": 100, "accountant": "pld"}, "accountant='pld'.*\"rdp\" with"),
        ({"accountant": "analytic"}, "accountant='analytic'"),
        ({"accountant": "moments"}, "accountant='moments'"),
        ({"population": 0}, "population=0"),
    ],
)
def test_what_cannot_be_counted_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        privacy.epsilon(**GOOD | wrong)


def test_calibrations_without_a_solution_are_refused() -> None:
    given: Any = {"steps": 10, "sampling_rate": 0.01, "sampling": "fixed", "population": 10_000}
    with pytest.raises(InvalidArgument, match=r"epsilon=0.001 at delta=1e-06 cannot be reached.*'rdp'.*larger epsilon"):
        privacy.calibrate(epsilon=1e-3, delta=1e-6, **given)
    for wrong in (0.0, -1.0, math.inf, math.nan, True):
        with pytest.raises(InvalidArgument, match="epsilon="):
            privacy.calibrate(epsilon=wrong, delta=1e-6, **given)
    with pytest.raises(InvalidArgument, match="steps=0"):
        privacy.calibrate(epsilon=1.0, delta=1e-6, **{**given, "steps": 0})


def test_without_dp_accounting_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "dp_accounting"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    accounting.renyi.cache_clear()
    with pytest.raises(InvalidArgument, match=r'pip install "atoll\[privacy\]"'):
        privacy.epsilon(**GOOD, accountant="rdp")
    assert privacy.epsilon(noise_multiplier=1.0, steps=10, delta=1e-5, sampling="none") > 0, "needs no accountant"


def test_dp_accounting_is_loaded_when_it_is_needed() -> None:
    code = "import atoll\nfrom atoll import privacy\nimport sys\nassert 'dp_accounting' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
