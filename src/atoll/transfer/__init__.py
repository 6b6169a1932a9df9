"""Federated transfer learning: what was learned elsewhere, adapted to data that stays with its owners."""

from atoll.transfer.caching import Features, features
from atoll.transfer.freezing import freeze
from atoll.transfer.low_rank import LoraModel, lora
from atoll.transfer.networks import pretrained

__all__ = ["Features", "LoraModel", "features", "freeze", "lora", "pretrained"]
