"""The driver of buffered asynchrony: which updates a step is made of, and from which models they were computed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from atoll.errors import CompositionError, invalid
from atoll.messages import Partial, Task
from atoll.random import numpy_generator
from atoll.rounds import Process, State
from atoll.sampling import Sampler
from atoll.schedule import Buffered

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset


@dataclass(frozen=True, slots=True, order=True)
class Work:
    """A client at work, or done and in the buffer.

    Attributes:
        finish: when it is done.
        order: its place among all who were ever asked.
        client: who it is.
        version: round of the model it received.
    """

    finish: float
    order: int
    client: str
    version: int


class Asynchronous:
    """A simulation's clients at work and its buffer, between two steps.

    An update is computed when it is taken in, from the task its client was given: the same as if it had been computed
    at once. Tasks are kept as long as somebody works on them, so that memory grows with the number of models at work.

    Args:
        process: what is run.
        data: clients and their examples.
        schedule: how.
        sampler: who is asked first at each model.

    Raises:
        CompositionError: a method, stage, channel or rule that is only right when all updates are from one model.
        InvalidArgument: more clients asked for than there are.
    """

    def __init__(
        self, process: Process, data: "FederatedDataset | LazyDataset", schedule: Buffered, sampler: Sampler
    ) -> None:
        check(process)
        for name, value in (("size", schedule.size), ("concurrency", schedule.concurrency)):
            if value > len(data):
                raise invalid(name, value, f"at most the population of {len(data)} clients")
        self._process, self._data, self._schedule, self._sampler = process, data, schedule, sampler
        self.clock = 0.0
        self._asked = 0
        self._at_work: list[Work] = []
        self._buffer: list[Work] = []
        self._tasks: dict[int, Task] = {}

    def next(self, state: State) -> tuple[State, dict[str, Any]]:
        """One step of the server: the state after it, and sums as of `Process.next`."""
        process, size = self._process, self._schedule.size
        self._data.check_unchanged()
        process.engine.prepare(process, self._data)
        while len(self._buffer) < size:
            if not any(w.finish <= self.clock for w in self._at_work):  # who is done now is taken in first
                self._ask(state)
            done = min(self._at_work)
            self._at_work.remove(done)
            self.clock = done.finish
            if self._schedule.limit is None or state.round - done.version <= self._schedule.limit:
                self._buffer.append(done)
        taken, self._buffer = self._buffer, []
        closed, metrics = stepped(process, self._data, self._schedule, state, self._tasks, taken)
        in_use = {w.version for w in self._at_work}
        self._tasks = {v: t for v, t in self._tasks.items() if v in in_use}
        return closed, metrics | {"clock": self.clock}

    def _ask(self, state: State) -> None:
        """Give the present model to as many clients as there are places: the cohort of the round first, then others."""
        busy = {w.client for w in (*self._at_work, *self._buffer)}
        free = self._schedule.concurrency - len(self._at_work)
        if not free:
            return
        clients = self._data.clients
        chosen = [c for c in self._sampler.cohort(state.seed, state.round, clients) if c not in busy][:free]
        if len(chosen) < free:
            order = numpy_generator(state.seed, "asked", state.round).permutation(len(clients))
            rest = (clients[int(i)] for i in order)
            known = busy | set(chosen)
            chosen += [c for c in rest if c not in known][: free - len(chosen)]
        if state.round not in self._tasks:
            self._tasks[state.round] = self._process.open(state, (), len(self._data))
        for client in chosen:
            finish = self.clock + self._schedule.took(state.seed, client, state.round)
            self._at_work.append(Work(finish, self._asked, client, state.round))
            self._asked += 1


def stepped(
    process: Process,
    data: "FederatedDataset | LazyDataset",
    schedule: Buffered,
    state: State,
    tasks: Mapping[int, Task],
    taken: Iterable[Work],
) -> tuple[State, dict[str, Any]]:
    """One step of the server, of these updates in any order: the state after it, and sums as of `Process.next`.

    Args:
        process: what is run.
        data: clients and their examples.
        schedule: says what stale updates count.
        state: before.
        tasks: by version, what clients were given.
        taken: whose updates.
    """
    groups: dict[int, list[Work]] = {}
    for work in sorted(taken, key=lambda w: (w.version, w.order)):
        groups.setdefault(work.version, []).append(work)
    everyone = tuple(w.client for group in groups.values() for w in group)
    task = process.open(state, everyone, len(data))
    collector = process.collector(state, task)
    try:
        with process.engine.threads():
            for version, group in groups.items():
                weight = schedule.weight(state.round - version)
                own = replace(tasks[version], clients=tuple(w.client for w in group))
                drawn = data.draw(own.clients)
                if drawn is not data:
                    process.engine.inspect(process, drawn)
                for partial in process.engine.run(process, own, drawn, state.memory):
                    collector.add(scaled(partial, weight))
        closed, metrics = process.finish(state, task, collector, float(schedule.size))
    except BaseException:
        state.memory.discard()
        raise
    staleness = sum(len(group) * (state.round - version) for version, group in groups.items())
    return closed, metrics | {"staleness": staleness / len(everyone)}


def scaled(partial: Partial, weight: float) -> Partial:
    """A stale update's part in the sum; its weight in what the sum is divided by stays."""
    assert partial.total is not None
    return partial if weight == 1.0 else replace(partial, total=partial.total * weight)


def check(process: Process) -> None:
    """Refuse what needs all updates of a step to be from one model.

    Raises:
        CompositionError: naming the part and the way out.
    """
    way = "use schedule=atoll.schedule.rounds(), or"
    algorithm = process.algorithm
    if not algorithm.asynchronous or algorithm.sums(1) or algorithm.pooled or algorithm.sampler is not None:
        raise CompositionError(
            f"{algorithm.name} cannot run asynchronously: what its clients send is only right for the model they all "
            f"received. For buffered training {way} fedavg, fedprox, or a server optimiser on fedavg."
        )
    if process.chain.stages:
        raise CompositionError(
            f"{process.chain.stages[0].name} cannot run asynchronously: its server half belongs to one round's "
            f"updates. For buffered training {way} no transforms."
        )
    if process.downlink is not None:
        raise CompositionError(
            "a compressed downlink cannot run asynchronously: it tells clients what is new about one model. For "
            f"buffered training {way} downlink=()."
        )
    if process.chain.channel.sums_only:
        raise CompositionError(
            f"the channel {process.chain.channel.name} cannot run asynchronously: it adds up one round's updates, "
            f'which leaves no weight to stale ones. For buffered training {way} channel="plain".'
        )
    if process.aggregator.rule is not None:
        raise CompositionError(
            f"the aggregator {process.aggregator.name} cannot run asynchronously: it compares updates with each other, "
            f"and stale ones are of other models. For buffered training {way} aggregators.mean()."
        )
