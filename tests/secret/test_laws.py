"""Logarithms of masses: double precision within its stated error, and exact ones against other ways to get them."""

import math
from decimal import Decimal

import numpy as np
import pytest
from scipy import stats

from atoll.secret import laws

LAWS = {
    **{f"gaussian {s}": laws.gaussian(s) for s in (0.05, 0.7, 3.0, 1234.5, 2.0**33 - 1)},
    **{f"laplace {t}": laws.laplace(t) for t in (0.05, 0.7, 3.0, 1234.5, 2.0**33 - 1)},
    **{f"poisson {m}": laws.poisson(m) for m in (1e-6, 0.4, 1.0, 31.7, 250.0, 1e4, 3.3e9, 2.0**40)},
}


@pytest.mark.parametrize("name", LAWS)
def test_double_precision_is_within_its_error(name: str) -> None:
    law = LAWS[name]
    points = {law.low, law.high, law.mode, *np.linspace(law.low, law.high, 41).astype(np.int64).tolist()}
    points |= {x for x in (62, 63, 64, 65, 1999, 2000, 2001) if law.low <= x <= law.high}
    for x in sorted(points):
        found = float(law.log(np.array([float(x)]))[0])
        assert abs(Decimal(found) - law.exact(x, 40)) <= Decimal(law.error), (x, found)
    assert law.error < 1e-4 and law.exact(law.mode, 40) == 0
    assert float(law.log(np.array([float(law.mode)]))[0]) == 0


@pytest.mark.parametrize("name", LAWS)
def test_the_mode_is_the_likeliest_and_mass_falls_away_from_it(name: str) -> None:
    law = LAWS[name]
    for side in (np.linspace(law.low, law.mode, 50), np.linspace(law.high, law.mode, 50)):
        values = law.log(np.unique(side.astype(np.int64)).astype(np.float64))
        assert values.max() <= law.error


@pytest.mark.parametrize("mean", [1e-6, 0.4, 31.7, 250.0, 1e4, 1e6])
def test_poisson_masses_and_tails_are_those_of_scipy(mean: float) -> None:
    law = laws.poisson(mean)
    x = np.unique(np.linspace(law.low, min(law.high, int(mean + 8 * mean**0.5 + 8)), 60).astype(np.int64))
    expected = stats.poisson.logpmf(x, mean) - stats.poisson.logpmf(law.mode, mean)
    np.testing.assert_allclose(law.log(x.astype(np.float64)), expected, atol=1e-8 * max(1, mean**0.5))
    assert stats.poisson.sf(law.high, mean) + (stats.poisson.cdf(law.low - 1, mean) if law.low else 0) < 2.0**-128


@pytest.mark.parametrize("scale", [0.05, 0.7, 3.0, 40.0])
def test_other_tails_hold_less_than_they_say(scale: float) -> None:
    reach = laws.gaussian(scale).high
    far = np.arange(reach + 1, reach + 1000, dtype=np.float64)
    whole = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * scale**2)).sum()
    assert 2 * np.exp(-far * far / (2 * scale**2)).sum() / whole < 2.0**-128
    q, beyond = math.exp(-1 / scale), laws.laplace(scale).high + 1
    assert 2 * q**beyond / (1 + q) < 2.0**-128


@pytest.mark.parametrize("x", [0, 1, 5, 1999, 2000, 5000, 20_000])
def test_log_factorial_has_the_digits_it_promises(x: int) -> None:
    half_log_two_pi = Decimal("0.91893853320467274178032973640561763986139747363778341281715154048")
    expected = laws.context(80).subtract(laws.context(80).ln(Decimal(math.factorial(x))), half_log_two_pi)
    assert abs(laws.log_factorial(x, 50) - expected) < Decimal("1e-50")


def test_bernoulli_numbers_are_the_known_ones() -> None:
    known = {0: "1", 1: "-1/2", 2: "1/6", 3: "0", 4: "-1/30", 12: "-691/2730", 14: "7/6"}
    assert {n: str(laws.bernoulli_number(n)) for n in known} == known
