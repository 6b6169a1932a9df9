"""What malicious clients do, to test rules against: on their data, or on what they send."""

from atoll.attacks.base import Attack, Poison, apply, chosen
from atoll.attacks.poisoning import backdoor, label_flip
from atoll.attacks.sending import (
    alie,
    free_rider,
    gaussian,
    ipm,
    lying_weight,
    mimic,
    min_max,
    min_sum,
    model_replacement,
    non_finite,
    sign_flip,
    stale,
)

__all__ = [
    "Attack",
    "Poison",
    "alie",
    "apply",
    "backdoor",
    "chosen",
    "free_rider",
    "gaussian",
    "ipm",
    "label_flip",
    "lying_weight",
    "mimic",
    "min_max",
    "min_sum",
    "model_replacement",
    "non_finite",
    "sign_flip",
    "stale",
]
