"""Federated methods, one small file for each or for each family."""

from atoll.algorithms.apfl import apfl
from atoll.algorithms.base import Algorithm
from atoll.algorithms.baselines import cyclic, local_only, pooled
from atoll.algorithms.ditto import ditto
from atoll.algorithms.fed3r import fed3r
from atoll.algorithms.fedala import fedala
from atoll.algorithms.fedavg import fedavg, fedsgd
from atoll.algorithms.feddyn import feddyn
from atoll.algorithms.fedexp import fedexp
from atoll.algorithms.fedncm import fedncm
from atoll.algorithms.fednova import fednova
from atoll.algorithms.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from atoll.algorithms.fedprox import fedprox
from atoll.algorithms.fine_tune import fine_tune
from atoll.algorithms.ifca import ifca
from atoll.algorithms.moon import moon
from atoll.algorithms.partial import fedbabu, fedbn, fedper, fedrep, lg_fedavg
from atoll.algorithms.per_fedavg import per_fedavg
from atoll.algorithms.pfedme import pfedme
from atoll.algorithms.qfedavg import qfedavg
from atoll.algorithms.scaffold import scaffold

__all__ = [
    "Algorithm",
    "apfl",
    "cyclic",
    "ditto",
    "fed3r",
    "fedadagrad",
    "fedadam",
    "fedala",
    "fedavg",
    "fedavgm",
    "fedbabu",
    "fedbn",
    "feddyn",
    "fedexp",
    "fedncm",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "fedsgd",
    "fedyogi",
    "fine_tune",
    "ifca",
    "lg_fedavg",
    "local_only",
    "moon",
    "per_fedavg",
    "pfedme",
    "pooled",
    "qfedavg",
    "scaffold",
]
