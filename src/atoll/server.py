"""Server optimisers: what the server does with the mean update, read as a pseudo-gradient's negative.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar & McMahan 2021, "Adaptive federated optimization", algorithm 2.
With the mean update D of a round, moments m, v and parameters x, all of shape [D]:

    m <- beta1 m + (1 - beta1) D
    v <- v + D^2                              (adagrad)
    v <- v - (1 - beta2) D^2 sign(v - D^2)    (yogi)
    v <- beta2 v + (1 - beta2) D^2            (adam)
    x <- x + lr m / (sqrt(v) + tau)

There is no bias correction, and v starts at tau^2, as in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import Spec, record


class Momentum(NamedTuple):
    """State of sgd: velocity [D] (length 0 without momentum)."""

    velocity: Tensor


class Moments(NamedTuple):
    """State of the adaptive optimisers."""

    m: Tensor  # [D] first moment of the mean update
    v: Tensor  # [D] second moment


class Step(Protocol):
    """How an optimiser steps."""

    def __call__(self, state: Any, vector: Tensor, mean: Tensor, out: Tensor | None = None) -> tuple[Tensor, Any]:
        """The vector [D] and the state after a step.

        Args:
            state: the optimiser's.
            vector: before the step, [D].
            mean: mean update [D].
            out: memory [D] that the vector is written into, which may be the mean's; default new memory.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """A server optimiser as two pure functions.

    Attributes:
        spec: name and arguments.
        init: (vector [D]) -> state.
        step: see `Step`.
    """

    spec: Spec
    init: Callable[[Tensor], Any]
    step: Step


def sgd(lr: float = 1.0, *, momentum: float = 0.0) -> ServerOptimizer:
    """`velocity <- momentum velocity + D; x <- x + lr velocity`; lr 1 without momentum is plain averaging.

    Source: Hsu, Qi & Brown 2019, "Measuring the effects of non-identical data distribution" (FedAvgM).
    """
    _positive("lr", lr)
    _share("momentum", momentum)

    def init(vector: Tensor) -> Momentum:
        return Momentum(torch.zeros_like(vector) if momentum else vector.new_empty(0))

    def step(state: Momentum, vector: Tensor, mean: Tensor, out: Tensor | None = None) -> tuple[Tensor, Momentum]:
        if not momentum:
            return torch.add(vector, mean, alpha=lr, out=out), state
        velocity = torch.add(mean, state.velocity, alpha=momentum)
        return torch.add(vector, velocity, alpha=lr, out=out), Momentum(velocity)

    return ServerOptimizer(record("sgd", lr=lr, momentum=momentum), init, step)


def adam(lr: float = 0.01, *, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> ServerOptimizer:
    """FedAdam's server step."""
    _, beta2 = betas
    return _adaptive("adam", lr, betas, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def yogi(lr: float = 0.01, *, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> ServerOptimizer:
    """FedYogi's server step."""
    _, beta2 = betas
    return _adaptive("yogi", lr, betas, tau, lambda v, square: v - (1 - beta2) * square * torch.sign(v - square))


def adagrad(lr: float = 0.1, *, beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdagrad's server step; the paper's experiments use beta1 = 0."""
    return _adaptive("adagrad", lr, (beta1, 0.0), tau, lambda v, square: v + square)


def _adaptive(
    name: str, lr: float, betas: tuple[float, float], tau: float, second: Callable[[Tensor, Tensor], Tensor]
) -> ServerOptimizer:
    _positive("lr", lr)
    _positive("tau", tau)
    for beta in betas:
        _share("betas", beta)
    beta1 = betas[0]

    def init(vector: Tensor) -> Moments:
        return Moments(torch.zeros_like(vector), torch.full_like(vector, tau * tau))

    def step(state: Moments, vector: Tensor, mean: Tensor, out: Tensor | None = None) -> tuple[Tensor, Moments]:
        m = beta1 * state.m + (1 - beta1) * mean
        v = second(state.v, mean * mean)
        return torch.add(vector, lr * m / (v.sqrt() + tau), out=out), Moments(m, v)

    return ServerOptimizer(record(name, lr=lr, betas=betas, tau=tau), init, step)


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not 0 < value < float("inf"):
        raise invalid(name, value, "a finite number above 0")


def _share(name: str, value: float) -> None:
    if isinstance(value, bool) or not 0 <= value < 1:
        raise invalid(name, value, "in [0, 1)")
