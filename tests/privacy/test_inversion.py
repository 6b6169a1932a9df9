"""Reading inputs off updates: exact where theory says so, and nothing where noise stands before."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atoll
from atoll import Model, aggregators
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument
from atoll.privacy.inversion import candidates, nearest
from atoll.rounds import Process
from atoll.transforms import clip_norm, gaussian_noise, secure_sum

FEATURES, UNITS = 30, 64
PLAN = atoll.local_sgd(0.1, steps=1, batch_size=None)


def model() -> Model:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(FEATURES, UNITS), nn.ReLU(), nn.Linear(UNITS, 4)).double()
    return Model(layers, loss="cross_entropy")


def inputs(clients: int, each: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return {
        f"c{i:02d}": (
            torch.randn(each, FEATURES, generator=draw, dtype=torch.float64),
            torch.randint(4, (each,), generator=draw),
        )
        for i in range(clients)
    }


def change(clients: dict[str, tuple[Tensor, Tensor]], **options: Any) -> tuple[Model, Tensor]:
    """What everybody sees of a round: the difference of two global models."""
    network = model()
    process = Process(network, atoll.fedavg(PLAN), **options)
    state = process.init()
    after, _ = process.next(state, FederatedDataset.from_arrays(clients))
    return network, process.vector(after) - process.vector(state)


def test_a_single_example_is_told_exactly_by_every_unit_it_moved() -> None:
    clients = inputs(1)
    network, moved = change(clients)
    found, (x, _) = candidates(network, moved), clients["c00"]
    assert 10 < len(found) <= UNITS
    torch.testing.assert_close(found, x.expand(len(found), -1), rtol=1e-8, atol=1e-10)
    assert nearest(found, x).similarity.tolist() == pytest.approx([1.0])


def test_units_tell_weighted_means_of_the_examples_that_moved_them() -> None:
    clients = inputs(1, 5)
    network, moved = change(clients)
    x, y = clients["c00"]
    own = network.layout.view(network.init())
    pre = x @ own["0.weight"].T + own["0.bias"]
    out, last = pre.relu() @ own["2.weight"].T + own["2.bias"], own["2.weight"]
    d = ((out.softmax(dim=1) - nn.functional.one_hot(y, 4)) @ last) * (pre > 0)  # [5, units]
    expected = (d.T @ x) / d.sum(dim=0)[:, None]
    order = d.sum(dim=0).abs().argsort(descending=True)
    order = order[d.sum(dim=0)[order] != 0]
    torch.testing.assert_close(candidates(network, moved), expected[order], rtol=1e-6, atol=1e-8)
    alone = (pre > 0).sum(dim=0) == 1
    told = nearest(candidates(network, moved), x).similarity > 1 - 1e-9
    assert bool(alone.any()) and bool(told[(pre > 0)[:, alone].any(dim=1)].all())


def test_the_sum_of_a_secure_round_tells_less_and_noise_next_to_nothing() -> None:
    clients = inputs(24)
    x = torch.cat([x for x, _ in clients.values()])
    summed = nearest(candidates(*change(clients, channel=secure_sum(clip=1.0))), x).similarity
    noised = change(
        clients, transforms=(clip_norm(1.0), gaussian_noise(1.0)),
        aggregator=aggregators.mean(weights="uniform", denominator="expected"),
    )  # fmt: skip
    hidden = nearest(candidates(*noised), x).similarity
    chance = nearest(torch.randn(UNITS, FEATURES, dtype=torch.float64), x).similarity
    assert float(hidden.mean()) < float(chance.mean()) + 0.1 < float(summed.mean())


def test_what_cannot_be_read_is_refused() -> None:
    network = model()
    with pytest.raises(InvalidArgument, match=r"change=\(3,\).*the model's 2244 parameters"):
        candidates(network, torch.zeros(3))
    with pytest.raises(InvalidArgument, match=r"layer='1' is not allowed.*'0', '2'"):
        candidates(network, network.init(), "1")
    with pytest.raises(InvalidArgument, match="no fully connected layer with a bias"):
        bare = Model(nn.Linear(3, 2, bias=False), loss="cross_entropy")
        candidates(bare, bare.init())
    with pytest.raises(InvalidArgument, match=r"inputs=\(2, 4\).*30"):
        nearest(torch.zeros(1, FEATURES), torch.zeros(2, 4))
    nothing = candidates(network, torch.zeros(network.size, dtype=torch.float64))
    assert nothing.shape == (0, FEATURES) and nearest(nothing, torch.ones(2, FEATURES)).similarity.tolist() == [0, 0]
    alone = Model(nn.Linear(3, 2), loss="cross_entropy")
    assert candidates(alone, alone.init()).shape == (2, 3)
