"""Laws on the integers, as far as a sampler needs them: support, mode, and the logarithm of the mass, twice.

Once for arrays in double precision with a bound on its error, once for a single integer to any number of digits.

    discrete Gaussian   P(x) ~ exp(-x^2 / (2 s^2))           Canonne, Kamath & Steinke 2020, definition 1
    discrete Laplace    P(x) ~ exp(-|x| / t)                 Ghosh, Roughgarden & Sundararajan 2012
    Poisson             P(x) = exp(-m) m^x / x!

All supports are cut where less than 2^-128 of the mass is left; this is the only way in which what is sampled differs
from the law. The mass is told relative to that at the mode, so that no constant of normalisation is needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DEVIATIONS = 13.4
"""exp(-13.4^2 / 2) < 2^-129: where a Gaussian's tail is cut, in standard deviations."""

NATS = 90.0
"""exp(-90) < 2^-129: where other tails are cut."""


@dataclass(frozen=True, slots=True)
class Law:
    """A unimodal law on the integers from `low` to `high`.

    Attributes:
        low, high: the support, ends included.
        mode: where the mass is largest.
        log: log(P(x) / P(mode)) of an array of integers in double precision.
        error: bound on the absolute error of `log`.
        exact: (x, digits) -> log(P(x) / P(mode)), its error below 10^-digits.
    """

    low: int
    high: int
    mode: int
    log: Callable[[Floats], Floats]
    error: float
    exact: Callable[[int, int], Decimal]


def context(digits: int) -> Context:
    """Decimal arithmetic of this precision, whose numbers may be as large or small as they like."""
    return Context(prec=digits, Emax=MAX_EMAX, Emin=MIN_EMIN)


def gaussian(scale: float) -> Law:
    """The discrete Gaussian with parameter s; from s = 2 on its standard deviation is s to 30 digits."""
    # CKS 2020, proposition 25: the tail from T + 1 on is below that of the continuous law from T on.
    reach = math.ceil(DEVIATIONS * scale) + 1
    half = -0.5 / scale / scale

    def exact(x: int, digits: int) -> Decimal:
        wide = context(digits + 10)
        return wide.divide(Decimal(-x * x), wide.multiply(Decimal(2), wide.multiply(Decimal(scale), Decimal(scale))))

    return Law(-reach, reach, 0, lambda x: x * x * half, 2.0**-43, exact)


def laplace(scale: float) -> Law:
    """The discrete Laplace law with parameter t."""
    reach = math.ceil(NATS * scale)

    def exact(x: int, digits: int) -> Decimal:
        return context(digits + 10).divide(Decimal(-abs(x)), Decimal(scale))

    return Law(-reach, reach, 0, lambda x: np.abs(x) / -scale, 2.0**-43, exact)


def poisson(mean: float) -> Law:
    """The Poisson law with this mean.

    Tails by Bernstein's inequality: P(X >= m + y) <= exp(-y^2 / (2 m + 2 y / 3)), P(X <= m - y) <= exp(-y^2 / (2 m)).
    """
    low = max(0, math.floor(mean - math.sqrt(2 * NATS * mean)))
    high = math.ceil(mean + NATS / 3 + math.sqrt(NATS * NATS / 9 + 2 * NATS * mean)) + 1
    mode = math.floor(mean)
    factorials = np.array([math.log(math.factorial(k)) for k in range(64)])

    def relative(x: Floats) -> Floats:
        """log(P(x) sqrt(2 pi m)); from 64 on by Stirling's series around m, where nothing large cancels."""
        far = np.maximum(x, 64.0)
        off = far - mean
        square = far * far
        series = (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / square) / square) / square) / far
        found = off - far * np.log1p(off / mean) - 0.5 * np.log(far / mean) - series
        near = x < 64
        if near.any():
            few = x[near]
            found[near] = (
                few * math.log(mean) - mean - factorials[few.astype(np.int64)] + 0.5 * math.log(2 * math.pi * mean)
            )
        return found

    at_mode = float(relative(np.array([float(mode)]))[0])

    def exact(x: int, digits: int) -> Decimal:
        wide = context(digits + 40)
        linear = wide.multiply(Decimal(x - mode), wide.ln(Decimal(mean)))
        return wide.subtract(linear, wide.subtract(log_factorial(x, digits + 5), log_factorial(mode, digits + 5)))

    return Law(low, high, mode, lambda x: relative(x) - at_mode, 2.0**-39 + (high - mean) * 2.0**-47, exact)


def log_factorial(x: int, digits: int) -> Decimal:
    """log(x!) - log(2 pi) / 2, its error below 10^-digits.

    Of large numbers by Stirling's series in z = x + 1, whose error is below the first term that is left out:

        log(x!) = (z - 1/2) log z - z + log(2 pi) / 2 + sum_k B_2k / (2k (2k - 1) z^(2k - 1))
    """
    wide = context(digits + 40)
    if x < 2000:
        return wide.subtract(wide.ln(Decimal(math.factorial(x))), _half_log_two_pi(digits))
    z = Decimal(x + 1)
    total = wide.subtract(wide.multiply(wide.subtract(z, Decimal("0.5")), wide.ln(z)), z)
    small, k = wide.power(Decimal(10), -digits - 2), 1
    while True:
        factor = bernoulli_number(2 * k) / (2 * k * (2 * k - 1))
        size = wide.divide(Decimal(factor.numerator), Decimal(factor.denominator))
        term = wide.divide(size, wide.power(z, 2 * k - 1))
        if abs(term) < small:
            return total
        total, k = wide.add(total, term), k + 1


@lru_cache(maxsize=64)
def _half_log_two_pi(digits: int) -> Decimal:
    """log(2 pi) / 2, from log(2000!) both ways, so that no digits of pi are needed."""
    wide = context(digits + 60)
    series = log_factorial(2000, digits + 20)
    return wide.subtract(wide.ln(Decimal(math.factorial(2000))), series)


@lru_cache(maxsize=256)
def bernoulli_number(n: int) -> Fraction:
    """B_n, from sum_{k <= n} (n + 1 over k) B_k = 0."""
    if n == 0:
        return Fraction(1)
    return -sum((math.comb(n + 1, k) * bernoulli_number(k) for k in range(n)), Fraction(0)) / (n + 1)
