"""Federated gradient descent against the same descent on the pooled examples, over many rounds."""

from collections.abc import Callable

import pytest
import torch
from problems import train
from registry import MODELS, on
from torch import nn

from atoll.algorithms import fedsgd
from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process

engines = on("loop", "rows", "rows, tile of 3", "single")


@engines
def test_least_squares_descends_as_if_pooled(engine: Callable[[], Engine]) -> None:
    draw = torch.Generator().manual_seed(3)
    clients: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, n in enumerate((1, 5, 12, 3)):
        x = torch.randn(n, 4, generator=draw, dtype=torch.float64)
        clients[f"c{i}"] = (x, (x.sum(dim=1) + i)[:, None])
    module = nn.Linear(4, 1).double()
    model = Model(module, "mse")
    data = FederatedDataset.from_arrays(clients)
    _, path = train(Process(model, fedsgd(local_sgd(0.1, steps=1, batch_size=None)), engine=engine()), data, 60)

    x, y = data.train.fields["x"], data.train.fields["y"]
    design = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
    w = model.init()
    for found in path:
        w = w - 0.1 * 2 * design.T @ (design @ w - y[:, 0]) / len(x)
        torch.testing.assert_close(found, w, rtol=0, atol=1e-12)


@engines
@pytest.mark.parametrize("name", ["perceptron", "layer norm", "frozen body", "tied weights", "attention"])
def test_networks_descend_as_if_pooled(engine: Callable[[], Engine], name: str) -> None:
    kind = MODELS[name]
    model, data = kind.model(), kind.data((3, 1, 6, 4))
    _, path = train(Process(model, fedsgd(local_sgd(0.2, steps=1, batch_size=None)), engine=engine()), data, 12)

    module = model.module(model.init()).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.2)
    for found in path:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(data.train.fields["x"]), data.train.fields["y"])
        loss.backward()
        optimizer.step()
        values = {n: p for n, p in module.named_parameters() if p.requires_grad}
        torch.testing.assert_close(found, model.layout.flatten(values), rtol=0, atol=1e-11)
