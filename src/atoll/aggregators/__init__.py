"""Rules that combine clients' updates."""

from atoll.aggregators.base import Aggregator
from atoll.aggregators.mean import mean
from atoll.aggregators.median import median

__all__ = ["Aggregator", "mean", "median"]
