"""What an engine is: it executes the tasks of a process over clients' data, one tile after the other."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.cohort import Cohort
from atoll.engines.acceptance import Traits, accept, accept_rounded, recheck
from atoll.errors import RunError, invalid
from atoll.evaluation import stretches
from atoll.local import Plan
from atoll.memory import ClientMemory, Window
from atoll.messages import Partial, Task

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset
    from atoll.data.dataset import Split
    from atoll.engines.placing import Placed
    from atoll.rounds import Process, State

Tile = tuple[Cohort, Mapping[str, Tensor]]
"""Clients at work and what they remember."""

Chosen = NDArray[np.int64]
"""Places of a tile's clients in a task's cohort, int64 [C]."""

Looked = tuple[NDArray[np.int64], Tensor, tuple[Any, ...]]
"""What a tile's evaluation gives: places of its clients in the data, sums [C, ...], the metrics."""

Remembering = ClientMemory | Window
"""Where what clients remember is read from."""


class Engine(ABC):
    """Executes cohorts. One engine serves one process; `prepare` is called before every round and is cheap."""

    name: str

    def __init__(self, threads: int = 1) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise invalid("threads", threads, "a number of threads of at least 1")
        self._threads = threads
        self._prepared: tuple[Process, FederatedDataset | LazyDataset] | None = None
        self._at_work: dict[str, int] = {}  # the thread that uses this engine now, and how deep
        self.notes: dict[str, None] = {}  # what happened that a reader of the result should know, once each
        self._traits: Traits | None = None
        self._mixed = False
        self._placed: Placed | None = None  # where another device than the CPU trains

    @property
    def elsewhere(self) -> str | None:
        """The device on which clients train, where that is not the CPU."""
        return None if self._placed is None else str(self._placed.device)

    @property
    def thread_count(self) -> int:
        """Torch's threads while this engine works."""
        return self._threads

    @property
    def told(self) -> dict[str, Any]:
        """What is not as usual, and what happened on the way, for `describe`."""
        told: dict[str, Any] = {"precision": "bfloat16"} if self._mixed else {}
        if self.elsewhere is not None:
            told["device"] = self.elsewhere
        return told | ({"notes": list(self.notes)} if self.notes else {})

    @property
    def prepared(self) -> "tuple[Process, FederatedDataset | LazyDataset] | None":
        """What the last `prepare` was for."""
        return self._prepared

    @property
    def traits(self) -> Traits:
        """What the checks found out about the model."""
        assert self._traits is not None, "prepare() comes first"
        return self._traits

    def fresh(self) -> "Engine":
        """The same engine before its first `prepare`, for another process."""
        twin = copy(self)
        twin._prepared, twin._traits, twin.notes = None, None, {}
        return twin

    def prepare(self, process: "Process", data: "FederatedDataset | LazyDataset") -> None:
        """Check the model against the data and choose how to run it; done once for the same process and data."""
        if self._prepared is not None and self._prepared[0] is process and self._prepared[1] is data:
            return
        sample = data.sample()
        self._traits = accept(process.model, sample, process.algorithm.plans)
        self._mixed = process.precision == "bfloat16"
        if self._placed is not None:
            self._placed.check(process)
        if self._mixed:
            accept_rounded(process.model, self._traits)
        process.check(sample)
        self._choose(process, sample)
        self._prepared = (process, data)

    def inspect(self, process: "Process", drawn: "FederatedDataset") -> None:
        """Check clients that were drawn for this round, whom `prepare` could not see."""
        recheck(process.model, drawn, process.algorithm.plans, self.traits)
        process.check(drawn)

    def run(self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory) -> Iterator[Partial]:
        """Work of the whole cohort, tile by tile, in an order that depends on the cohort and the model alone.

        What clients keep is staged in the memory. A partial is valid until the next is asked for.
        """
        for chosen in self.split(task, data):
            yield from self.train(process, task, data, memory, chosen)
        self.rest()

    def rest(self) -> None:  # noqa: B027 - most engines hold nothing
        """Give back, after a round, what is too large to be held until the next."""

    def train(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, chosen: Chosen
    ) -> Iterator[Partial]:
        """A tile's work; in two halves where the memory of the machine does not suffice for the whole."""
        placed = self._placed
        there, examples = (task, data) if placed is None else (placed.task(task), placed.data(data))
        try:
            with nullcontext() if placed is None else placed.exactly():
                cohort, remembered = self.tile(process, there, examples, memory, chosen)
                report = process.work(there, cohort, remembered)
        except (MemoryError, RuntimeError) as error:
            if not _exhausted(error) or len(chosen) == 1:
                raise
        else:
            memory.stage(report.clients, report.memory)
            partial = process.combine(there, report)
            yield partial if placed is None else placed.home(partial)
            return
        self.notes[f"out of memory: tiles of {len(chosen)} clients were halved"] = None
        half = (len(chosen) + 1) // 2
        for part in (chosen[:half], chosen[half:]):
            yield from self.train(process, task, data, memory, part)

    def examine(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, split: str
    ) -> "Iterator[Looked]":
        """Sums of every tile's own models on a split: places of the clients, sums [C, ...], the metrics."""
        for chosen in self.split(task, data):
            yield self.looked(process, task, data, memory, split, chosen)

    def looked(
        self,
        process: "Process",
        task: Task,
        data: "FederatedDataset",
        memory: Remembering,
        split: str,
        chosen: Chosen,
    ) -> "Looked":
        """The same for one tile."""
        cohort, remembered = self.tile(process, task, data, memory, chosen)
        places = data.places(cohort.clients)
        part: Split = getattr(data, split)
        return places, *process.examine(task, cohort, remembered, part, places, personal=True)

    def stream(
        self, process: "Process", state: "State", data: "FederatedDataset | LazyDataset", split: str
    ) -> "list[tuple[Tensor, tuple[Any, ...]]]":
        """Sums of the global model over a split, in pieces [clients, ...] in the clients' order, and the metrics."""
        task = process.open_global(state, (), len(data))
        return [process.survey(task, part) for _, whole in data.chunks(split) for part in stretches(whole)]

    def tiles(self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory) -> Iterator[Tile]:
        """The cohort's clients, ready for work; what a tile gives may be overwritten when the next is asked for."""
        for chosen in self.split(task, data):
            yield self.tile(process, task, data, memory, chosen)

    def stop(self) -> None:  # noqa: B027 - most engines have nothing to end
        """End what works in the background; whatever needs it again starts it again."""

    @contextmanager
    def threads(self) -> Generator[None]:
        """Torch's threads while this engine works: a fixed number, so that the same seed gives the same bits."""
        here = threading.get_ident()
        if self._at_work.setdefault("thread", here) != here:
            raise RunError(
                'this engine is at work in another thread: give every run an engine of its own (engine="auto" does).'
            )
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._at_work["depth"] = self._at_work.get("depth", 0) + 1
        try:
            yield
        finally:
            torch.set_num_threads(before)
            self._at_work["depth"] -= 1
            if not self._at_work["depth"]:
                self._at_work.clear()

    @abstractmethod
    def split(self, task: Task, data: "FederatedDataset") -> list[Chosen]:
        """The tiles of a cohort: places in `task.clients`. They depend on the cohort and the model alone."""

    @abstractmethod
    def tile(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: Remembering, chosen: Chosen
    ) -> Tile:
        """A tile's clients, ready for work, and what they remember; valid until the next tile is made."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Which path ran, and why: for the journal and `result.engine`."""

    def _choose(self, process: "Process", data: "FederatedDataset") -> None:
        """Choose a strategy for this model; engines with only one have nothing to choose."""
        return


def _exhausted(error: Exception) -> bool:
    """Whether an error says that there is no memory left."""
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text or "out of memory" in text
    )


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
