"""Ranges that `atoll.tune` searches: where a setting lies and on which scale."""

from dataclasses import dataclass
from math import isfinite

from atoll.errors import invalid


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers.

    Attributes:
        low: lower end, included.
        high: upper end, included.
        scale: "linear" or "log".
        whole: integers only.
    """

    low: float
    high: float
    scale: str
    whole: bool


def uniform(low: float, high: float) -> Range:
    """Numbers between two ends, all equally likely."""
    return _range(low, high, "linear", whole=False)


def log(low: float, high: float) -> Range:
    """Numbers between two ends above 0, whose logarithms are equally likely: learning rates, strengths of a pull."""
    return _range(low, high, "log", whole=False)


def integers(low: int, high: int) -> Range:
    """Integers between two ends, both included, all equally likely."""
    return _range(low, high, "linear", whole=True)


def _range(low: float, high: float, scale: str, *, whole: bool) -> Range:
    for name, value in (("low", low), ("high", high)):
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not isfinite(value):
            raise invalid(name, value, "an integer" if whole else "a finite number")
    if scale == "log" and low <= 0:
        raise invalid("low", low, "above 0 on a logarithmic scale")
    if low >= high:
        raise invalid("high", high, f"above low={low}")
    return Range(low, high, scale, whole)
