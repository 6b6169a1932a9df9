"""Federated averaging with a server optimiser, under the names its variants were published by.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar & McMahan 2021, "Adaptive federated optimization" (FedAdam,
FedYogi, FedAdagrad); Hsu, Qi & Brown 2019 (FedAvgM). Each is `fedavg(plan, server=...)`, whose update rules and symbols
are in `atoll.server`. Cost in floats: D up, D down, none kept by clients; one or two D kept by the server.
"""

from dataclasses import replace

from atoll import server
from atoll.algorithms.base import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.local import Plan
from atoll.spec import record


def fedavgm(plan: Plan, *, lr: float = 1.0, momentum: float = 0.9) -> Algorithm:
    """Federated averaging with server momentum."""
    return _named("fedavgm", plan, server.sgd(lr, momentum=momentum))


def fedadam(plan: Plan, *, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> Algorithm:
    """Federated averaging with Adam on the server (no bias correction)."""
    return _named("fedadam", plan, server.adam(lr, betas=betas, tau=tau))


def fedyogi(plan: Plan, *, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> Algorithm:
    """Federated averaging with Yogi on the server."""
    return _named("fedyogi", plan, server.yogi(lr, betas=betas, tau=tau))


def fedadagrad(plan: Plan, *, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3) -> Algorithm:
    """Federated averaging with Adagrad on the server."""
    return _named("fedadagrad", plan, server.adagrad(lr, beta1=beta1, tau=tau))


def _named(name: str, plan: Plan, optimizer: server.ServerOptimizer) -> Algorithm:
    return replace(fedavg(plan, server=optimizer), spec=record(name, plan=plan, server=optimizer))
