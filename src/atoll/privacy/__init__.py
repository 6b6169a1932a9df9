"""Differential privacy: what noise buys, what a run has spent, and what may be said of it."""

from atoll.privacy import audit, client_noise, distributed, factorization, inversion
from atoll.privacy.accounting import Event, calibrate, epsilon
from atoll.privacy.example_level import ExampleLevel, example_level
from atoll.privacy.explain import explain
from atoll.privacy.ledger import Ledger

__all__ = [
    "Event",
    "ExampleLevel",
    "Ledger",
    "audit",
    "calibrate",
    "client_noise",
    "distributed",
    "epsilon",
    "example_level",
    "explain",
    "factorization",
    "inversion",
]
