"""Federated transfer learning: what was learned elsewhere, adapted to data that stays with its owners."""

from atoll.transfer.caching import Features, features
from atoll.transfer.freezing import freeze
from atoll.transfer.networks import pretrained

__all__ = ["Features", "features", "freeze", "pretrained"]
