"""What noise buys: epsilon of Gaussian noise under three ways of sampling, and the noise an epsilon needs.

The mechanism releases a sum of vectors of L2 norm at most c plus normal noise of standard deviation z c. z is the
*noise multiplier*. Which neighbours are compared, and what sampling saves, depends on the rule that draws who takes
part:

    "poisson"  each takes part independently with probability q. Neighbour: one participant sends nothing (zero-out; for
               a sum the same as adding or removing one), sensitivity c. Released t times, each with a new sample.
    "fixed"    m of n, drawn without replacement, q = m / n. Neighbour: one participant's data are replaced by others;
               a sum of vectors of norm c then moves by up to 2 c, so that the noise counts as z / 2.
    "none"     anybody may take part every time: nothing is saved. Neighbour: zero-out, sensitivity c.

Accountants:

    "pld"       privacy loss distributions, composed by fast Fourier transform, with pessimistic rounding. Meiser &
                Mohammadi 2018; Koskela, Jaelkoe & Honkela 2020; Doroshenko, Ghazi, Kamath, Kumar & Manurangsi 2022.
    "rdp"       Renyi divergences. Mironov, Talwar & Zhang 2019 (Poisson); Wang, Balle & Kasiviswanathan 2019, theorem
                27 (fixed); converted as in Canonne, Kamath & Steinke 2020, proposition 12.
    "analytic"  exact, without sampling: t releases are one with z / sqrt(t). Balle & Wang 2018, theorem 8:
                delta(e) = Phi(m / 2 - e / m) - exp(e) Phi(-m / 2 - e / m),  m = sqrt(t) / z

The first two are dp-accounting's. Nothing tighter than "rdp" is known to be right for fixed samples that are drawn
again and again: a privacy loss distribution for them is not accepted here.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from atoll.errors import InvalidArgument, invalid

Sampling = Literal["poisson", "fixed", "none"]
"""How those who take part are drawn."""

Accountant = Literal["pld", "rdp", "analytic"]
"""How releases are added up."""

Neighbours = Literal["zero-out", "replace-one"]
"""Which data sets are compared: one participant's data replaced by nothing, their number known; or by others."""

NEIGHBOURS: Mapping[Sampling, Neighbours] = {"poisson": "zero-out", "none": "zero-out", "fixed": "replace-one"}
"""Which data sets are compared under which sampling."""

INTERVAL = 1e-4
"""Privacy losses are rounded up to multiples of this, while noise is not tiny."""

COARSE = 10
"""Where many epsilons are asked for, up to so many times coarser, while that is a twentieth of a release's loss or
less. Multiples of the fine interval: what is coarser is then never less."""

LARGEST = 1e4
"""Noise multipliers above this are not looked at."""

LEAST = 1e-2
"""Nor are noise multipliers below this."""

CLOSE = 1e-3
"""How close calibrated noise comes to the least that would do."""


@dataclass(frozen=True, slots=True)
class Event:
    """Gaussian noise on a sum, released some number of times.

    Attributes:
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip norm.
        sampling: "poisson", "fixed" or "none".
        sampling_rate: share that takes part each time, in (0, 1]; 1 for "none".
        count: how many times.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    sampling_rate: float = 1.0
    count: int = 1

    @property
    def effective(self) -> float:
        """The noise's standard deviation divided by what one neighbour moves the sum: half under "fixed"."""
        return self.noise_multiplier / 2 if self.sampling == "fixed" else self.noise_multiplier

    def __post_init__(self) -> None:
        check_multiplier(self.noise_multiplier)
        if self.sampling not in NEIGHBOURS:
            raise invalid("sampling", self.sampling, '"poisson", "fixed" or "none"')
        rate = self.sampling_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise invalid("sampling_rate", rate, "a share in (0, 1]")
        if self.sampling == "none" and rate != 1:
            raise invalid(
                "sampling_rate", rate, '1 with sampling="none"', 'Leave it out, or say sampling="poisson" or "fixed".'
            )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise invalid("steps", self.count, "a number of releases of at least 0")


def epsilon(
    *,
    noise_multiplier: float,
    steps: int,
    delta: float,
    sampling_rate: float = 1.0,
    sampling: Sampling = "poisson",
    accountant: Accountant | None = None,
    population: int | None = None,
) -> float:
    """Epsilon at delta of noise that is added `steps` times.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip norm, above 0.
        steps: releases (rounds).
        delta: in (0, 1), below 1 / population where that is given.
        sampling_rate: share of the population that takes part each time: a probability for "poisson", cohort divided
            by population for "fixed", 1 for "none".
        sampling: "poisson", "fixed" (without replacement, always the same number) or "none" (no amplification).
        accountant: "pld", "rdp" or "analytic"; default the tightest that is right: "pld" for "poisson", "rdp" for
            "fixed", "analytic" for "none".
        population: how many there are to be drawn from; needed for "fixed".

    Raises:
        InvalidArgument: a number outside its range, an accountant that does not know this sampling, or dp-accounting
            missing.
    """
    _check_population(sampling, sampling_rate, population)
    event = Event(noise_multiplier, sampling, float(sampling_rate), steps)
    return composed_epsilon([event], check_delta(delta, population), accountant)


def calibrate(
    *,
    epsilon: float,
    steps: int,
    delta: float,
    sampling_rate: float = 1.0,
    sampling: Sampling = "poisson",
    accountant: Accountant | None = None,
    population: int | None = None,
) -> float:
    """About the smallest noise multiplier that keeps `steps` releases below epsilon at delta.

    What it returns spends no more than epsilon by the same accountant, and less by a few parts in a thousand at most.
    Arguments as for `epsilon`.

    Raises:
        InvalidArgument: no noise multiplier up to 10,000 reaches this epsilon.
    """
    wanted = check_epsilon(epsilon)
    _check_population(sampling, sampling_rate, population)
    delta = check_delta(delta, population)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise invalid("steps", steps, "a number of releases of at least 1")
    rate = float(sampling_rate)

    def spent(multiplier: float) -> float:
        return composed_epsilon([Event(multiplier, sampling, rate, steps)], delta, accountant, fine=False)

    found = smallest(spent, wanted)
    if found is None:
        named = accountant or default_accountant([Event(1.0, sampling, rate)])
        raise InvalidArgument(
            f"epsilon={wanted:g} at delta={delta:g} cannot be reached in {steps:,} releases by any noise multiplier up "
            f"to {LARGEST:,.0f}, counted by {named!r}: allow a larger epsilon or delta"
            + (', or draw cohorts by sampling="poisson", which is counted more tightly.' if named == "rdp" else ".")
        )
    return found


def smallest(spent: Callable[[float], float], wanted: float) -> float | None:
    """About the smallest noise multiplier that spends no more than wanted; None where there is none.

    By false position on logarithms, of which what is spent is nearly a straight line.
    """

    def gap(multiplier: float) -> float:
        """Above 0 where too much is spent."""
        return math.log(max(spent(multiplier), 1e-300) / wanted)

    few = enough = 1.0
    low = high = gap(1.0)
    while high > 0:
        if enough >= LARGEST or (enough == 64 and gap(LARGEST) > 0):
            return None
        few, low, enough = enough, high, min(2 * enough, LARGEST)
        high = gap(enough)
    while low <= 0:
        if few < LEAST:
            return few
        enough, high, few = few, low, few / 2
        low = gap(few)
    while enough > few * (1 + CLOSE) and high < -CLOSE:
        share = min(max((low + CLOSE / 2) / (low - high), 0.05), 0.95)
        middle = few * (enough / few) ** share
        value = gap(middle)
        few, low, enough, high = (middle, value, enough, high) if value > 0 else (few, low, middle, value)
    return enough


def composed_epsilon(
    events: Sequence[Event], delta: float, accountant: Accountant | None = None, *, fine: bool = True
) -> float:
    """Epsilon at delta of several events together; 0 of none.

    Args:
        events: what was released.
        delta: at which epsilon is told.
        accountant: None: the tightest that is right.
        fine: as exactly as dp-accounting by itself; else many times faster, up to a part in a thousand larger and never
            smaller.

    Raises:
        InvalidArgument: events whose neighbours differ, or an accountant that does not know them.
    """
    made = [e for e in events if e.count]
    if not made:
        return 0.0
    relations = {NEIGHBOURS[e.sampling] for e in made}
    if len(relations) > 1:
        raise InvalidArgument(
            "releases under fixed-size sampling (neighbours replace one) and others (neighbours leave one out) cannot "
            "be added up: they protect against different things. Count each for itself."
        )
    name = default_accountant(made) if accountant is None else check_accountant(accountant)
    for e in made:
        check_known(name, e.sampling)
    if name == "analytic":
        return gaussian_epsilon(sum(e.count / e.effective**2 for e in made) ** -0.5, delta)
    if name == "rdp":
        orders = _orders()
        total = [0.0] * len(orders)
        for e in made:
            each = renyi(e.effective, e.sampling, e.sampling_rate, orders)
            total = [t + e.count * r for t, r in zip(total, each, strict=True)]
        return float(_load("rdp.rdp_privacy_accountant").compute_epsilon(orders, total, delta)[0])
    whole: Any = None
    steps = 1 if fine else min(_steps(e) for e in made)
    for e in made:
        own = _loss(e.effective, e.sampling_rate, steps)
        own = own.self_compose(e.count) if e.count > 1 else own
        whole = own if whole is None else whole.compose(own)
    return float(whole.get_epsilon_for_delta(delta))


def default_accountant(events: Sequence[Event]) -> Accountant:
    """The tightest accountant that is right for these events."""
    kinds = {e.sampling for e in events}
    return "rdp" if "fixed" in kinds else "pld" if "poisson" in kinds else "analytic"


@lru_cache(maxsize=256)
def renyi(multiplier: float, sampling: Sampling, rate: float, orders: tuple[float, ...]) -> tuple[float, ...]:
    """Renyi divergences of one release at these orders.

    Args:
        multiplier: noise divided by what one neighbour moves the sum (`Event.effective`).
        sampling: how those who take part are drawn.
        rate: which share of them is.
        orders: above 1.
    """
    plain = tuple(order / (2 * multiplier**2) for order in orders)
    if sampling == "none" or rate == 1:
        return plain
    dp = _load("dp_event")
    rdp, relation = _load("rdp"), _load("privacy_accountant").NeighboringRelation
    noise = dp.GaussianDpEvent(multiplier)
    if sampling == "poisson":
        # It warns of orders at which its series does not converge, and leaves them out.
        told = logging.getLogger("absl")
        level = told.level
        told.setLevel(logging.ERROR)
        try:
            counted = rdp.RdpAccountant(list(orders)).compose(dp.PoissonSampledDpEvent(rate, noise))
        finally:
            told.setLevel(level)
        return tuple(counted.rdp.tolist())
    # The bound takes the share alone: any pair of sizes with this quotient will do.
    size = dp.SampledWithoutReplacementDpEvent(source_dataset_size=1.0, sample_size=rate, event=noise)
    counted = rdp.RdpAccountant(list(orders), neighboring_relation=relation.REPLACE_ONE).compose(size)
    # At high orders that bound is above the one without sampling, which holds as well.
    return tuple(min(a, b) for a, b in zip(counted.rdp.tolist(), plain, strict=True))


@lru_cache(maxsize=64)
def _loss(multiplier: float, rate: float, steps: int) -> Any:
    """The privacy loss distribution of one release, pessimistic, by so many intervals.

    Tiny noise has huge losses: they are rounded coarser.
    """
    interval = steps * INTERVAL * max(1.0, 0.3 / multiplier) ** 2
    return _load("pld.privacy_loss_distribution").from_gaussian_mechanism(
        multiplier, sampling_prob=rate, value_discretization_interval=interval
    )


def _steps(event: Event) -> int:
    """Intervals in a twentieth of the standard deviation of a release's loss, about; 1 to 10."""
    spread = event.sampling_rate * math.sqrt(math.expm1(min(event.effective**-2, 9.0)))
    return max(1, min(COARSE, int(spread / 20 / INTERVAL)))


def _orders() -> tuple[float, ...]:
    return tuple(float(o) for o in _load("rdp.rdp_privacy_accountant").DEFAULT_RDP_ORDERS)


# --- one release without sampling -------------------------------------------------------------------------------------


def gaussian_delta(multiplier: float, epsilon: float) -> float:
    """Delta at epsilon of one release of Gaussian noise: Balle & Wang 2018, theorem 8, with m = 1 / multiplier."""
    m = 1 / multiplier
    kept = _log_phi(m / 2 - epsilon / m)
    lost = epsilon + _log_phi(-m / 2 - epsilon / m)
    return math.exp(kept) * -math.expm1(lost - kept) if lost < kept else 0.0


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """Epsilon at delta of one release of Gaussian noise, exact to rounding and from above."""
    if gaussian_delta(multiplier, 0.0) <= delta:
        return 0.0
    least, most = 0.0, 1.0
    while gaussian_delta(multiplier, most) > delta:
        least, most = most, 2 * most
    while most - least > 1e-12 * most:
        middle = (least + most) / 2
        if middle in (least, most):
            break
        least, most = (middle, most) if gaussian_delta(multiplier, middle) > delta else (least, middle)
    return most


def _log_phi(x: float) -> float:
    """Logarithm of the standard normal distribution function."""
    if x > -20:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    # The asymptotic series; what is left out is below 1e-10 of it.
    inverse = 1 / (x * x)
    series = math.log1p(-inverse * (1 - 3 * inverse * (1 - 5 * inverse)))
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 + series


# --- checks -----------------------------------------------------------------------------------------------------------


def check_multiplier(value: object, name: str = "noise_multiplier") -> float:
    """A finite number above 0; without noise there is no epsilon."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        remedy = "It is the noise's standard deviation / the clip norm." if name == "noise_multiplier" else ""
        raise invalid(name, value, "a finite number above 0", remedy)
    return float(value)


def check_epsilon(value: object, name: str = "epsilon") -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise invalid(name, value, "a finite number above 0")
    return float(value)


def check_delta(value: object, population: int | None = None) -> float:
    """A probability in (0, 1) that is below 1 / population."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise invalid("delta", value, "a probability in (0, 1)", "A usual choice is 1e-5, or population ** -1.1.")
    if population is not None and value * population >= 1:
        raise invalid(
            "delta", value, f"below 1 / population = {1 / population:g}",
            "A larger one would allow publishing somebody's data whole. "
            f"Use for instance {float(f'{usual_delta(population):.2g}'):g}.",
        )  # fmt: skip
    return float(value)


def usual_delta(population: int) -> float:
    """1e-5, or population ** -1.1 where that is smaller (McMahan, Ramage, Talwar & Zhang 2018)."""
    return min(1e-5, float(max(population, 2)) ** -1.1)


def check_accountant(value: object) -> Accountant:
    """A known accountant's name."""
    if value not in ("pld", "rdp", "analytic"):
        raise invalid("accountant", value, '"pld", "rdp" or "analytic"')
    return value  # pyright: ignore[reportReturnType]


def check_known(accountant: Accountant, sampling: Sampling) -> None:
    """Refuse an accountant that does not know a way of sampling."""
    if accountant == "analytic" and sampling != "none":
        raise invalid(
            "accountant", accountant, 'for sampling="none" alone', 'Use "pld" for "poisson" and "rdp" for "fixed".'
        )
    if accountant == "pld" and sampling == "fixed":
        raise invalid(
            "accountant", accountant, '"rdp" with sampling="fixed"',
            "No privacy loss distribution is known that holds for fixed samples drawn again and again.",
        )  # fmt: skip


def _check_population(sampling: Sampling, rate: float, population: int | None) -> None:
    if population is not None and (isinstance(population, bool) or not isinstance(population, int) or population < 1):
        raise invalid("population", population, "a number of at least 1")
    if sampling != "fixed":
        return
    if population is None:
        raise invalid(
            "population", None, 'given with sampling="fixed"', "Say how many there are to be drawn from."
        )  # fmt: skip
    size = rate * population if isinstance(rate, int | float) else math.nan
    if not math.isclose(size, round(size) if math.isfinite(size) else 0, rel_tol=1e-6) or round(size) < 1:
        raise invalid(
            "sampling_rate", rate, f'a whole number of the {population:,} divided by them, with sampling="fixed"',
            "Give cohort / population.",
        )  # fmt: skip


def _load(module: str) -> Any:
    """A module of dp-accounting."""
    from importlib import import_module

    try:
        return import_module(f"dp_accounting.{module}")
    except ImportError as error:
        raise InvalidArgument(
            f"counting epsilon needs dp-accounting, which cannot be imported here ({error}): "
            'pip install "atoll[privacy]".'
        ) from error
