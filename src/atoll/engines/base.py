"""What an engine is: it executes the tasks of a process over clients' data, one tile after the other."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.cohort import Cohort
from atoll.engines.acceptance import Traits, accept
from atoll.errors import invalid
from atoll.local import Plan
from atoll.memory import ClientMemory

if TYPE_CHECKING:
    from atoll.data import FederatedDataset
    from atoll.rounds import Partial, Process, Task

Tile = tuple[Cohort, Mapping[str, Tensor]]
"""Clients at work and what they remember."""


class Engine(ABC):
    """Executes cohorts. One engine serves one process; `prepare` is called before every round and is cheap."""

    name: str

    def __init__(self, threads: int = 1) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise invalid("threads", threads, "a number of threads of at least 1")
        self._threads = threads
        self._prepared: tuple[Process, FederatedDataset] | None = None
        self._traits: Traits | None = None

    @property
    def traits(self) -> Traits:
        """What the checks found out about the model."""
        assert self._traits is not None, "prepare() comes first"
        return self._traits

    def prepare(self, process: "Process", data: "FederatedDataset") -> None:
        """Check the model against the data and choose how to run it; done once for the same process and data."""
        if self._prepared is not None and self._prepared[0] is process and self._prepared[1] is data:
            return
        self._traits = accept(process.model, data, process.algorithm.plans)
        process.check(data)
        self._choose(process, data)
        self._prepared = (process, data)

    def run(
        self, process: "Process", task: "Task", data: "FederatedDataset", memory: ClientMemory
    ) -> "Iterator[Partial]":
        """Work of the whole cohort, tile by tile, in an order that depends on the cohort and the model alone."""
        for cohort, remembered in self.tiles(process, task, data, memory):
            yield process.combine(task, process.work(task, cohort, remembered))

    @contextmanager
    def threads(self) -> Generator[None]:
        """Torch's threads while this engine works: a fixed number, so that the same seed gives the same bits."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @abstractmethod
    def tiles(self, process: "Process", task: "Task", data: "FederatedDataset", memory: ClientMemory) -> Iterator[Tile]:
        """The cohort's clients, ready for work; what a tile gives may be overwritten when the next is asked for."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Which path ran, and why: for the journal and `result.engine`."""

    def _choose(self, process: "Process", data: "FederatedDataset") -> None:
        """Choose a strategy for this model; engines with only one have nothing to choose."""
        return


def orders(
    plan: Plan,
    seed: int,
    purpose: str,
    round: int,
    number: int,
    clients: NDArray[np.uint64],
    sizes: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The order in which clients go through their examples in a pass: int64 [C, max n]."""
    if not plan.shuffle:
        return np.broadcast_to(np.arange(int(sizes.max(initial=0))), (len(sizes), int(sizes.max(initial=0))))
    return random.permutations(random.key(seed, "shuffle", purpose, number), round, clients, sizes)
