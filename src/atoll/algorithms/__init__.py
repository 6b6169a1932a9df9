"""Federated methods, one small file for each or for each family."""

from atoll.algorithms.base import Algorithm
from atoll.algorithms.baselines import cyclic, local_only, pooled
from atoll.algorithms.fedavg import fedavg, fedsgd
from atoll.algorithms.feddyn import feddyn
from atoll.algorithms.fedexp import fedexp
from atoll.algorithms.fednova import fednova
from atoll.algorithms.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from atoll.algorithms.fedprox import fedprox
from atoll.algorithms.partial import fedbn, fedper
from atoll.algorithms.qfedavg import qfedavg
from atoll.algorithms.scaffold import scaffold

__all__ = [
    "Algorithm",
    "cyclic",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbn",
    "feddyn",
    "fedexp",
    "fednova",
    "fedper",
    "fedprox",
    "fedsgd",
    "fedyogi",
    "local_only",
    "pooled",
    "qfedavg",
    "scaffold",
]
