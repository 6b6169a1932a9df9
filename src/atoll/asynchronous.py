"""The driver of buffered asynchrony: which updates a step is made of, and from which models they were computed."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from atoll.errors import CompositionError, invalid
from atoll.messages import Task
from atoll.random import numpy_generator
from atoll.rounds import Process, State
from atoll.sampling import Sampler
from atoll.schedule import Buffered

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset


@dataclass(frozen=True, slots=True, order=True)
class _Work:
    """A client at work, or done and in the buffer."""

    finish: float
    order: int  # in which clients were asked
    client: str
    version: int  # round of the model it received


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
        self._at_work: list[_Work] = []
        self._buffer: list[_Work] = []
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
            self._buffer.append(done)
            self.clock = done.finish
        taken, self._buffer = self._buffer, []
        groups: dict[int, list[_Work]] = {}
        for work in sorted(taken, key=lambda w: (w.version, w.order)):
            groups.setdefault(work.version, []).append(work)
        everyone = tuple(w.client for group in groups.values() for w in group)
        task = process.open(state, everyone, len(self._data))
        collector = process.collector(state, task)
        try:
            with process.engine.threads():
                for version, group in groups.items():
                    weight = self._schedule.weight(state.round - version)
                    own = replace(self._tasks[version], clients=tuple(w.client for w in group))
                    drawn = self._data.draw(own.clients)
                    if drawn is not self._data:
                        process.engine.inspect(process, drawn)
                    for partial in process.engine.run(process, own, drawn, state.memory):
                        assert partial.total is not None
                        stale = partial if weight == 1.0 else replace(partial, total=partial.total * weight)
                        collector.add(stale)
            closed, metrics = process.finish(state, task, collector, float(size))
        except BaseException:
            state.memory.discard()
            raise
        in_use = {w.version for w in self._at_work}
        self._tasks = {v: t for v, t in self._tasks.items() if v in in_use}
        staleness = [state.round - w.version for w in taken]
        return closed, metrics | {"staleness": sum(staleness) / size, "clock": self.clock}

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
            self._at_work.append(_Work(finish, self._asked, client, state.round))
            self._asked += 1


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
