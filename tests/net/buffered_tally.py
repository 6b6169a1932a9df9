"""A method whose model tells who was counted in which step with which staleness, for asynchronous runs.

Of a model of 3 R numbers the first R hold, for each step, the sum of s(tau_i) 4096^i over its sites i, divided by their
number; the next R the sum of s(tau_i) visits_i 4096^i, where visits_i is what the site remembers; and the last R a mean
of numbers that depend on the model that the site was given, and whose sum depends on the order in which it is taken.
With s(tau) = 2^-tau and a number of sites that is a power of two the first two are exact.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from tally import Numbers
from torch import Tensor

from atoll import aggregators, random
from atoll.algorithms.base import Algorithm, Memory, Message
from atoll.cohort import Cohort
from atoll.data import FederatedDataset
from atoll.model import Model
from atoll.net.agent import Trainer, Training
from atoll.rounds import Process
from atoll.spec import record
from atoll.vectors import Aggregate, Update


class Tally(NamedTuple):
    vector: Tensor


def tally(steps: int) -> Algorithm:
    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        ((name,), visits) = cohort.clients, memory["visits"]
        place = int(name[1:])
        mean = torch.zeros(1, 3 * steps, dtype=torch.float64)
        mean[0, 0] = 4096.0**place
        mean[0, steps] = float(visits) * 4096.0**place
        odd = random.uniforms(random.key(1, "odd"), cohort.round, random.client_keys([name]), 1).double()
        mean[0, 2 * steps] = odd[0, 0] * 10.0 ** (4 * (place % 4)) + message.vector[2 * steps :].sum()
        none = torch.zeros(1, 0, dtype=torch.float64)
        update = Update(mean, cohort.layout, none, cohort.weights, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        return update, {"visits": visits + 1}

    def step(state: Tally, aggregate: Aggregate) -> Tally:
        vector = state.vector.clone()
        for i in range(3):
            vector[i * steps + aggregate.round] += aggregate.mean[i * steps]
        return Tally(vector)

    return Algorithm(
        record("buffered_tally", steps=steps),
        init=Tally,
        broadcast=lambda state: Message(state.vector),
        local=local,
        step=step,
        client_init=lambda vector, buffers: {"visits": torch.zeros(1, dtype=torch.float64)},
        asynchronous=True,
    )


@lru_cache
def tallied(steps: int, sites: int) -> tuple[Process, dict[str, Training], FederatedDataset]:
    """A process, what trains at every site, and everybody's data."""
    model = Model(Numbers(3 * steps), "mse")
    data = {f"s{i}": (torch.zeros(i + 1, 1), torch.zeros(i + 1, dtype=torch.float64)) for i in range(sites)}

    def made() -> Process:
        return Process(model, tally(steps), aggregator=aggregators.mean(weights="uniform"), engine="loop")

    training: dict[str, Training] = {
        name: Trainer(made(), FederatedDataset.from_arrays({name: pair}, test={name: pair}))
        for name, pair in data.items()
    }
    return made(), training, FederatedDataset.from_arrays(data, test=data)
