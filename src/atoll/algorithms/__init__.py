"""Federated methods, one small file for each or for each family."""

from atoll.algorithms.base import Algorithm
from atoll.algorithms.baselines import cyclic, local_only, pooled
from atoll.algorithms.fedavg import fedavg, fedsgd
from atoll.algorithms.partial import fedbn, fedper
from atoll.algorithms.scaffold import scaffold

__all__ = ["Algorithm", "cyclic", "fedavg", "fedbn", "fedper", "fedsgd", "local_only", "pooled", "scaffold"]
