"""Federated methods, one small file for each or for each family."""

from atoll.algorithms.base import Algorithm
from atoll.algorithms.baselines import cyclic, local_only, pooled
from atoll.algorithms.fedavg import fedavg, fedsgd
from atoll.algorithms.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from atoll.algorithms.partial import fedbn, fedper
from atoll.algorithms.scaffold import scaffold

__all__ = [
    "Algorithm",
    "cyclic",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbn",
    "fedper",
    "fedsgd",
    "fedyogi",
    "local_only",
    "pooled",
    "scaffold",
]
