"""Federated statistics: what clients can be asked without a model."""

from atoll.analytics.randomized_response import Shares, randomized_response
from atoll.analytics.statistic import Statistic

__all__ = ["Shares", "Statistic", "randomized_response"]
