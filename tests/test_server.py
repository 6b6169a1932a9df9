"""Server optimisers on given mean updates, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from atoll import server


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sgd_adds_the_update_times_its_rate() -> None:
    optimizer = server.sgd(0.5)
    x, state = optimizer.step(optimizer.init(vector(1.0, 2.0)), vector(1.0, 2.0), vector(4.0, -2.0))
    assert x.tolist() == [3.0, 1.0] and state.velocity.numel() == 0


def test_plain_averaging_takes_the_mean_as_it_is() -> None:
    optimizer = server.sgd()
    x, _ = optimizer.step(optimizer.init(vector(1.0)), vector(1.0), vector(0.25))
    assert x.tolist() == [1.25]


def test_momentum_remembers_the_updates() -> None:
    optimizer = server.sgd(0.5, momentum=0.9)
    x, state = vector(0.0), optimizer.init(vector(0.0))
    expected, velocity = 0.0, 0.0
    for update in (1.0, -2.0, 0.5):
        x, state = optimizer.step(state, x, vector(update))
        velocity = 0.9 * velocity + update
        expected += 0.5 * velocity
        assert x.item() == pytest.approx(expected, abs=1e-15)
    assert velocity == pytest.approx(0.81 - 1.8 + 0.5)


TAU, LR, B1, B2 = 0.1, 0.5, 0.9, 0.99


@pytest.mark.parametrize(
    ("optimizer", "first"),
    [
        # v starts at tau^2 = 0.01; the update is 0.3, its square 0.09.
        (server.adam(LR, betas=(B1, B2), tau=TAU), 0.99 * 0.01 + 0.01 * 0.09),
        (server.yogi(LR, betas=(B1, B2), tau=TAU), 0.01 + 0.01 * 0.09),
        (server.adagrad(LR, beta1=B1, tau=TAU), 0.01 + 0.09),
    ],
    ids=["adam", "yogi", "adagrad"],
)
def test_the_first_adaptive_step_by_hand(optimizer: server.ServerOptimizer, first: float) -> None:
    start = optimizer.init(vector(1.0))
    assert start.m.tolist() == [0.0] and start.v.tolist() == [TAU * TAU]
    x, state = optimizer.step(start, vector(1.0), vector(0.3))
    assert state.m.item() == pytest.approx(0.03, abs=1e-15)
    assert state.v.item() == pytest.approx(first, abs=1e-15)
    assert x.item() == pytest.approx(1.0 + LR * 0.03 / (math.sqrt(first) + TAU), abs=1e-15)


def test_yogi_shrinks_the_second_moment_by_as_much_as_it_would_grow() -> None:
    optimizer = server.yogi(LR, betas=(0.0, B2), tau=1.0)
    _, state = optimizer.step(optimizer.init(vector(0.0)), vector(0.0), vector(0.3))
    assert state.v.item() == pytest.approx(1.0 - 0.01 * 0.09, abs=1e-15)
    _, state = optimizer.step(optimizer.init(vector(0.0)), vector(0.0), vector(1.0))
    assert state.v.item() == 1.0, "equal second moments stay"


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_several_adaptive_steps_on_two_coordinates(name: str) -> None:
    built = {
        "adam": server.adam(0.2, betas=(0.8, 0.95), tau=0.05),
        "yogi": server.yogi(0.2, betas=(0.8, 0.95), tau=0.05),
        "adagrad": server.adagrad(0.2, beta1=0.8, tau=0.05),
    }[name]
    updates = ((0.5, -0.1), (-1.0, 0.02), (0.25, 0.0))
    x, state = vector(1.0, -1.0), built.init(vector(1.0, -1.0))
    for d in updates:
        x, state = built.step(state, x, vector(*d))
    for i, start in enumerate((1.0, -1.0)):
        value, m, v = start, 0.0, 0.0025
        for d in updates:
            m = 0.8 * m + 0.2 * d[i]
            square = d[i] ** 2
            if name == "adam":
                v = 0.95 * v + 0.05 * square
            elif name == "yogi":
                v -= 0.05 * square * math.copysign(1.0, v - square)
            else:
                v += square
            value += 0.2 * m / (math.sqrt(v) + 0.05)
        assert x[i].item() == pytest.approx(value, abs=1e-14)


def test_steps_are_pure() -> None:
    for optimizer in (server.sgd(momentum=0.5), server.adam(), server.yogi(), server.adagrad()):
        x, d = vector(1.0, 2.0), vector(0.1, -0.2)
        state = optimizer.init(x)
        first = optimizer.step(state, x, d)[0]
        second = optimizer.step(state, x, d)[0]
        assert torch.equal(first, second) and x.tolist() == [1.0, 2.0] and d.tolist() == [0.1, -0.2]


def test_a_zero_update_moves_nothing_at_first() -> None:
    for optimizer in (server.sgd(momentum=0.5), server.adam(), server.yogi(), server.adagrad()):
        x = vector(1.0, 2.0)
        assert torch.equal(optimizer.step(optimizer.init(x), x, torch.zeros_like(x))[0], x)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.inf, math.nan, True])
def test_rates_outside_their_range_are_refused(lr: float) -> None:
    for build in (server.sgd, server.adam, server.yogi, server.adagrad):
        with pytest.raises(ValueError, match="lr="):
            build(lr)


def test_other_arguments_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="momentum="):
        server.sgd(momentum=1.0)
    with pytest.raises(ValueError, match="betas="):
        server.adam(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="betas="):
        server.yogi(betas=(-0.1, 0.9))
    with pytest.raises(ValueError, match="tau="):
        server.adagrad(tau=0.0)


def test_specs_tell_optimisers_apart() -> None:
    assert server.adam(0.1).spec != server.yogi(0.1).spec
    assert server.adam(0.1).spec == server.adam(0.1).spec != server.adam(0.2).spec
