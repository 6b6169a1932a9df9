"""Federated transfer learning: what was learned elsewhere, adapted to data that stays with its owners."""

from atoll.transfer.caching import Features, features
from atoll.transfer.freezing import freeze

__all__ = ["Features", "features", "freeze"]
