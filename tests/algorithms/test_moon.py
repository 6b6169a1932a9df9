"""MOON: a term through the model's features, by hand, against plain autograd and in its degenerate cases."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import train
from registry import ENGINES, MODELS, Hidden, Kind, on, stack
from torch import Tensor, nn

from atoll.algorithms import fedavg, moon
from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process

NEAR = 1e-12
engines = on("loop", "rows", "single", "auto")


class Plane(nn.Module):
    """Two numbers, whatever the input, which are their own features."""

    def __init__(self, u: tuple[float, float]) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor(u, dtype=torch.float64))
        self.seen = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(self.u.expand(len(x), 2))


def bowl(output: Tensor, target: Tensor) -> Tensor:
    """a / 2 |u - b|^2 of targets (a, b1, b2): [n]."""
    return target[:, 0] / 2 * (output - target[:, 1:]).square().sum(dim=1)


U, CURVES, CENTRES, SIZES = (1.0, 0.5), (1.0, 2.5), np.array([[-1.0, 2.0], [2.0, 1.0]]), (2, 4)


def plane() -> tuple[Model, FederatedDataset]:
    clients = {}
    for i, n in enumerate(SIZES):
        target = torch.tensor([[CURVES[i], *CENTRES[i]]], dtype=torch.float64).expand(n, 3).clone()
        clients[f"c{i}"] = (torch.zeros(n, 1, dtype=torch.float64), target)
    return Model(Plane(U), bowl, features="seen"), FederatedDataset.from_arrays(clients, test=clients)


def cosine_slope(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """d cos(u, v) / du = v / (|u| |v|) - cos(u, v) u / |u|^2."""
    lengths = np.linalg.norm(u) * np.linalg.norm(v)
    return v / lengths - (u @ v) / lengths * u / (u @ u)


def by_hand(rounds: int, steps: int, lr: float, mu: float, tau: float) -> list[np.ndarray]:
    x, before, path = np.array(U), [np.array(U), np.array(U)], []
    for _ in range(rounds):
        ends = []
        for i in range(2):
            u = x.copy()
            for _ in range(steps):
                near, far = (u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in (x, before[i]))
                away = 1 / (1 + np.exp(-(far - near) / tau))  # what the softmax gives to the previous model
                pull = mu / tau * away * (cosine_slope(u, before[i]) - cosine_slope(u, x))
                u = u - lr * (CURVES[i] * (u - CENTRES[i]) + pull)
            ends.append(u)
        before, x = ends, np.average(ends, axis=0, weights=SIZES)
        path.append(x)
    return path


@engines
def test_moon_follows_the_paper(engine: Callable[[], Engine]) -> None:
    model, data = plane()
    algorithm = moon(local_sgd(0.1, steps=3, batch_size=None), mu=2.0, temperature=0.5)
    _, path = train(Process(model, algorithm, engine=engine()), data, 5)
    expected = by_hand(5, 3, 0.1, 2.0, 0.5)
    np.testing.assert_allclose(torch.stack(path).numpy(), expected, rtol=0, atol=NEAR)
    plain = by_hand(5, 3, 0.1, 0.0, 0.5)
    assert np.abs(np.array(expected) - plain)[-1].max() > 1e-2, "the test would not see a missing term"


@pytest.mark.parametrize("engine", ["loop", "rows", "factors", "single", "auto"])
def test_without_weight_moon_is_federated_averaging_bit_for_bit(engine: str) -> None:
    kind, plan = MODELS["batch norm, mean"], local_sgd(0.05, epochs=2, batch_size=4, momentum=0.5)
    data, found = kind.data((6, 2, 7)), []
    for algorithm in (fedavg(plan), moon(plan, mu=0.0)):
        found.append(train(Process(kind.model(), algorithm, engine=ENGINES[engine]()), data, 3))
    assert torch.equal(found[0][1][-1], found[1][1][-1])
    assert torch.equal(found[0][0].buffers, found[1][0].buffers)


@engines
def test_a_clients_first_step_is_federated_averagings(engine: Callable[[], Engine]) -> None:
    """The received and the previous model are the same: the term is flat."""
    kind, plan = MODELS["layer norm"], local_sgd(0.3, steps=1, batch_size=None)
    data = kind.data((6, 2, 7))
    paths = [train(Process(kind.model(), a, engine=engine()), data, 2)[1] for a in (fedavg(plan), moon(plan, mu=5.0))]
    torch.testing.assert_close(paths[0][0], paths[1][0], rtol=0, atol=NEAR)
    assert float((paths[0][1] - paths[1][1]).abs().max()) > 1e-6


def nested() -> nn.Module:
    return stack(body=nn.Sequential(nn.Linear(4, 5), nn.Tanh()), act=nn.ReLU(), head=nn.Linear(5, 3))


def hidden() -> nn.Module:
    return stack(body=nn.Linear(4, 5), inner=Hidden(5), head=nn.Linear(5, 3))


INSIDE = {
    "an activation": replace(MODELS["perceptron"], options={"features": "act"}),
    "a block of layers": Kind(nested, options={"features": "body"}),
    "changed in place above": Kind(
        lambda: stack(body=nn.Linear(4, 5), act=nn.ReLU(inplace=True), head=nn.Linear(5, 3)),
        options={"features": "body"},
    ),
    "channels": replace(MODELS["convolution"], options={"features": "act"}),
    "under dropout": replace(MODELS["dropout"], options={"features": "drop"}),
    "statistics": replace(MODELS["batch norm, mean"], options={"features": "act"}),
    "no program": Kind(hidden, options={"features": "inner"}, written=False),
    "no program, one layer": replace(MODELS["recurrent, with projections"], options={"features": "head"}),
    "frozen below": replace(MODELS["frozen body"], options={"features": "act"}),
}


@pytest.mark.parametrize("name", INSIDE)
def test_every_engine_takes_the_term_through_features_of_every_kind(name: str) -> None:
    kind = INSIDE[name]
    data = kind.data((6, 2, 7, 4, 11))
    plan = local_sgd(0.2, epochs=2, batch_size=4)
    found = {}
    for engine in ("loop", "rows", "rows, tile of 3", "factors", "single", "auto"):
        if "rows" in engine and not kind.rows:
            continue
        process = Process(kind.model(), moon(plan, mu=3.0), engine=ENGINES[engine]())
        state, path = train(process, data, 3, [list(data.clients), list(data.clients)[::2]])
        found[engine] = (path[-1], state.buffers, process.algorithm.spec)
        torch.testing.assert_close(path[-1], found["loop"][0], rtol=0, atol=1e-9)
        torch.testing.assert_close(state.buffers, found["loop"][1], rtol=0, atol=1e-9)
    plain = train(
        Process(kind.model(), fedavg(plan), engine="loop"), data, 3, [list(data.clients), list(data.clients)[::2]]
    )[1]
    moved = float((plain[-1] - found["loop"][0]).abs().max())
    assert (moved == 0) == (name == "frozen below"), "where nothing below the features is trained the term is flat"


def test_what_moon_refuses() -> None:
    plan = local_sgd(0.1)
    with pytest.raises(InvalidArgument, match=r"moon compares features.*features="):
        Process(Model(nn.Linear(4, 3), "cross_entropy"), moon(plan))
    for options in ({"mu": -1.0}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            moon(plan, **options)

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.LSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)[0][:, -1])

    kind = Kind(Pairs, (5, 3), options={"features": "body"})
    with pytest.raises(InvalidArgument, match=r"features='body'.*one tensor"):
        train(Process(kind.model(), moon(plan), engine="loop"), kind.data((4, 4)), 1)
