"""Federated statistics: what clients can be asked without a model."""

from atoll.analytics.statistic import Statistic

__all__ = ["Statistic"]
