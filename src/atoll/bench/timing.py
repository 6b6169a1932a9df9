"""Atoll's rounds of a workload, as its users would have them: `atoll.process` round by round, or one `simulate`."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from atoll import sampling
from atoll.algorithms import fedavg
from atoll.bench.networks import network
from atoll.bench.workloads import LR, Packed, Workload, initial
from atoll.data import FederatedDataset
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import process as process_of


@dataclass(frozen=True, slots=True)
class Played:
    """What rounds ended in.

    Attributes:
        vector: the final model [P].
        engine: which path ran, and why.
    """

    vector: Tensor
    engine: Mapping[str, Any]


@contextmanager
def played(
    load: Workload,
    data: Packed,
    cohorts: Sequence[Sequence[int]],
    *,
    start: Callable[[], None],
    stop: Callable[[], None],
    whole: bool = False,
    shuffle: bool = True,
    engine: str = "auto",
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    precision: str = "full",
) -> Generator[Played]:
    """Train a workload; the workers are there until the context ends, so that their memory can be looked at.

    Args:
        load: the workload.
        data: its examples.
        cohorts: places of the clients of every round.
        start: called when a round begins; of a whole run, only before the first.
        stop: called when a round has ended.
        whole: one `simulate` over all rounds, instead of `process.next` for each.
        shuffle: False: examples in order, so that everybody's models are equal.
        engine: as in `atoll.process`.
        workers: as in `atoll.process`.
        device: the same.
        precision: the same.
    """
    x, y = (torch.from_numpy(part) for part in (data.x, data.y))
    clients = FederatedDataset.from_packed({"x": x, "y": y}, data.offsets)
    algorithm = fedavg(local_sgd(lr=LR, epochs=1, batch_size=load.batch, shuffle=shuffle))
    model = Model(network(load, initial(load)), loss="cross_entropy")
    named = [[clients.clients[i] for i in places] for places in cohorts]
    if whole:
        from atoll.simulation import simulate

        start()
        result = simulate(
            model,
            clients,
            algorithm=algorithm,
            rounds=len(named),
            cohort=sampling.sequence(named),
            evaluate_every=0,
            engine=engine,
            workers=workers,
            device=device,
            precision=precision,
            callbacks=(lambda record: stop(),),
            progress=False,
        )
        yield Played(result.vector, result.engine)
        return
    process = process_of(model, algorithm, engine=engine, workers=workers, device=device, precision=precision)
    try:
        state = process.init(0)
        for names in named:
            start()
            state, _ = process.next(state, clients, names)
            stop()
        yield Played(process.vector(state), process.engine.describe())
    finally:
        process.engine.stop()
