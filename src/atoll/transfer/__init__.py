"""Federated transfer learning: what was learned elsewhere, adapted to data that stays with its owners."""

from atoll.transfer.alignment import Alignment, align
from atoll.transfer.caching import Features, features
from atoll.transfer.distillation import Distilled, distill
from atoll.transfer.freezing import freeze
from atoll.transfer.low_rank import LoraModel, lora
from atoll.transfer.networks import pretrained

__all__ = [
    "Alignment",
    "Distilled",
    "Features",
    "LoraModel",
    "align",
    "distill",
    "features",
    "freeze",
    "lora",
    "pretrained",
]
