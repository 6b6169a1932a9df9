"""A method whose model tells who was counted when: every contribution is a power of two of its own.

Of a model of 3 R numbers the first R hold the sum of 2^i over the sites i of each round, the next R the sum of
visits_i 16^i, where visits_i is what the site remembers, and the last R a weighted mean of numbers whose sum depends on
the order in which it is taken.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atoll import random
from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.cohort import Cohort
from atoll.data import FederatedDataset
from atoll.model import Model
from atoll.net.agent import Trainer, Training
from atoll.rounds import Process
from atoll.spec import record
from atoll.transforms import secure_sum
from atoll.vectors import Aggregate, Update


class Numbers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.x.sum().expand(len(x))


class Tally(NamedTuple):
    vector: Tensor


def tally(rounds: int) -> Algorithm:
    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        ((name,), visits) = cohort.clients, memory["visits"]
        place = int(name[1:])
        mean = torch.zeros(1, 3 * rounds, dtype=torch.float64)
        odd = random.uniforms(random.key(1, "odd"), cohort.round, random.client_keys([name]), 1).double()
        mean[0, 2 * rounds + cohort.round] = odd[0, 0] * 10.0 ** (4 * (place % 4)) + message.vector[2 * rounds :].sum()
        sums = torch.tensor([[2.0**place, float(visits) * 16.0**place]], dtype=torch.float64)
        update = Update(mean, cohort.layout, sums, cohort.weights, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        return update, {"visits": visits + 1}

    def step(state: Tally, aggregate: Aggregate) -> Tally:
        vector = state.vector + aggregate.mean
        vector[aggregate.round] += aggregate.sums[0]
        vector[rounds + aggregate.round] += aggregate.sums[1]
        return Tally(vector)

    return Algorithm(
        record("tally", rounds=rounds),
        init=Tally,
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        client_init=lambda vector, buffers: {"visits": torch.zeros(1, dtype=torch.float64)},
        sums=lambda size: 2,
    )


@lru_cache
def tallied(rounds: int, sites: int, sealed: bool = False) -> tuple[Process, dict[str, Training], FederatedDataset]:
    """A process, what trains at every site, and everybody's data; sealed: over a secure sum that is nearly exact."""
    model = Model(Numbers(3 * rounds), "mse")
    data = {f"s{i}": (torch.zeros(i + 1, 1), torch.zeros(i + 1, dtype=torch.float64)) for i in range(sites)}

    def made() -> Process:
        channel = secure_sum(clip=2.0**20, weight_cap=8.0, bits=48) if sealed else "plain"
        return Process(model, tally(rounds), channel=channel, engine="loop")

    process = made()
    training: dict[str, Training] = {
        name: Trainer(made(), FederatedDataset.from_arrays({name: pair}, test={name: pair}))
        for name, pair in data.items()
    }
    return process, training, FederatedDataset.from_arrays(data, test=data)
