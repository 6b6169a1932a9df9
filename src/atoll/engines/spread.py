"""What engines have in common that spread a round's tiles over workers: placement, what travels, the order of results.

Tiles are those of the inner engine alone, and partials are taken in their order: the result does not depend on the
number of workers, nor on who worked on what.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from atoll.engines.base import Chosen, Engine, Looked, Remembering, Tile
from atoll.errors import invalid
from atoll.evaluation import stretches
from atoll.memory import ClientMemory
from atoll.messages import Partial, Task
from atoll.tree import leaves, rebuild

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset
    from atoll.rounds import Process, State

STREAM_CLIENTS = 20_000
"""With more clients the global model is evaluated by the driver: telling who they are would take as long."""

Found = dict[str, Any]
"""What became of a tile: its tensors by name under "tensors", the rest as plain values."""


class Crew(ABC):
    """The workers of a process over some data.

    Attributes:
        carries: whether what clients remember has to be carried to the workers.
    """

    carries: bool = False

    @property
    @abstractmethod
    def size(self) -> int:
        """How many they are."""

    @abstractmethod
    def fits(self, task: Task, memory: ClientMemory) -> bool:
        """Whether they can read such a task and that memory."""

    @abstractmethod
    def work(
        self,
        kind: str,
        task: Task,
        tiles: list[Chosen],
        costs: list[int],
        data: "FederatedDataset",
        memory: ClientMemory,
        **more: Any,
    ) -> Iterator[tuple[int, Found | None]]:
        """Results of all tiles in order; None for a tile that raised.

        Args:
            kind: "train", "examine" or "survey".
            task: of the round.
            tiles: places in the task's cohort.
            costs: work of each tile, in any unit.
            data: what the tiles' clients hold.
            memory: what they remember.
            more: further values for the workers.
        """

    @abstractmethod
    def stop(self) -> None:
        """End all of them."""


class Spread(Engine):
    """Has another engine's tiles worked on by a crew."""

    def __init__(self, inner: Engine) -> None:
        if inner.elsewhere is not None:
            raise invalid(
                "workers", type(self).__name__, f"left out with an engine that trains on {inner.elsewhere}",
                "One process feeds the device.",
            )  # fmt: skip
        super().__init__(inner.thread_count)
        self.name = inner.name
        self.inner = inner
        self._crew: Crew | None = None

    def describe(self) -> dict[str, Any]:
        """Which path ran, and why."""
        return {**self.inner.describe(), "workers": 1 if self._crew is None else self._crew.size}

    def prepare(self, process: "Process", data: "FederatedDataset | LazyDataset") -> None:
        before = self.inner.prepared
        self.inner.prepare(process, data)
        if self.inner.prepared is not before:
            self.stop()

    def inspect(self, process: "Process", drawn: "FederatedDataset") -> None:
        self.inner.inspect(process, drawn)

    def split(self, task: Task, data: "FederatedDataset") -> list[Chosen]:
        return self.inner.split(task, data)

    def tile(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: Remembering, chosen: Chosen
    ) -> Tile:
        return self.inner.tile(process, task, data, memory, chosen)

    def run(self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory) -> Iterator[Partial]:
        tiles = self.inner.split(task, data)
        crew = self._hired(process, task, data, memory, len(tiles))
        if crew is None:
            yield from self._alone(process, task, data, memory, tiles)
            return
        work = [int(data.train.sizes.numpy()[data.places([task.clients[i] for i in chosen])].sum()) for chosen in tiles]
        finished = False
        try:
            for number, found in crew.work("train", task, tiles, work, data, memory):
                if found is None:  # it failed there: here the error shows, or it goes well
                    yield from self.inner.train(process, task, data, memory, tiles[number])
                else:
                    yield _partial(found)
            finished = True
        finally:
            if not finished:
                self.stop()

    def examine(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, split: str
    ) -> "Iterator[Looked]":
        tiles = self.inner.split(task, data)
        prepared, crew = self.inner.prepared, None
        if prepared is not None and prepared[1] is data:
            crew = self._hired(process, task, data, memory, len(tiles))
        if crew is None:
            yield from self.inner.examine(process, task, data, memory, split)
            return
        metrics: tuple[Any, ...] = ()
        rest = list(tiles)
        while rest and not metrics:  # what a tile's outputs are measured by, from the first with examples in this split
            places, sums, metrics = self.inner.looked(process, task, data, memory, split, rest.pop(0))
            yield places, sums, metrics
        work = [len(chosen) for chosen in rest]
        finished = False
        try:
            for number, found in crew.work("examine", task, rest, work, data, memory, split=split):
                if found is None:
                    yield self.inner.looked(process, task, data, memory, split, rest[number])
                else:
                    yield found["tensors"]["places"].numpy().copy(), found["tensors"]["sums"].clone(), metrics
            finished = True
        finally:
            if not finished:
                self.stop()

    def stream(
        self, process: "Process", state: "State", data: "FederatedDataset | LazyDataset", split: str
    ) -> "list[tuple[Tensor, tuple[Any, ...]]]":
        """A crew at work takes its share of large splits; for these alone none is hired."""
        from atoll.data import FederatedDataset, Split

        prepared, crew = self.inner.prepared, self._crew
        if (
            crew is None
            or prepared is None
            or prepared[1] is not data
            or not isinstance(data, FederatedDataset)
            or len(data) > STREAM_CLIENTS
            or (crew.carries and state.memory.layout.size)
        ):
            return self.inner.stream(process, state, data, split)
        pieces = list(stretches(getattr(data, split)))
        task = process.open_global(state, tuple(data.clients), len(data))
        if len(pieces) == 1 or not crew.fits(task, state.memory):
            return self.inner.stream(process, state, data, split)
        full = next((p for p in pieces if len(p)), pieces[0])
        few = Split({n: t[:4] for n, t in full.fields.items()}, torch.tensor([0, min(4, len(full))]))
        _, metrics = process.survey(task, few)  # what outputs are measured by
        ends = np.cumsum([len(p.sizes) for p in pieces])
        chosen = [np.arange(end - len(p.sizes), end) for end, p in zip(ends, pieces, strict=True)]
        sums: list[Tensor] = []
        try:
            found = crew.work("survey", task, chosen, [len(p) for p in pieces], data, state.memory, split=split)
            for number, answer in found:
                own = process.survey(task, pieces[number])[0] if answer is None else answer["tensors"]["sums"].clone()
                sums.append(own)
        finally:
            if len(sums) < len(pieces):
                self.stop()
        return [(each, metrics) for each in sums]

    def stop(self) -> None:
        """End the workers; the next round that needs them starts new ones."""
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    @abstractmethod
    def _hired(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, tiles: int
    ) -> Crew | None:
        """The crew for a task of so many tiles; None where it is not worth one."""

    def _alone(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, tiles: list[Chosen]
    ) -> Iterator[Partial]:
        """The work of all tiles without a crew."""
        for chosen in tiles:
            yield from self.inner.train(process, task, data, memory, chosen)


def placed(costs: Sequence[int], size: int, held: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """Which tiles each of some workers gets, in order: the most work first, each to the one with the least to do.

    Args:
        costs: work of each tile, in any unit.
        size: workers.
        held: [tiles][workers], what a worker has at hand of a tile; decides between workers with equally much to do.
    """
    load, queues = [0] * size, [list[int]() for _ in range(size)]
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(size), key=lambda w: (load[w], -held[number][w] if held is not None else 0, w))
        queues[least].append(number)
        load[least] += costs[number]
    return [sorted(queue) for queue in queues]


# --- what travels -----------------------------------------------------------------------------------------------------


def shapes(task: Task) -> dict[str, Any]:
    """What a template must have in common with a task that is rebuilt by it."""
    tensors, values = _encoded(task)
    return {n: (t.shape, t.dtype) for n, t in tensors.items()} | {n: type(v) for n, v in values.items()}


def order(
    kind: str, task: Task, drawn: "FederatedDataset | None", more: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What every worker is told of a round: tensors, and values that JSON can carry.

    Args:
        kind: "train", "examine" or "survey".
        task: of the round.
        drawn: clients drawn for this round, whom workers have never seen; None: those they have.
        more: further values.
    """
    tensors, values = _encoded(task)
    named = {f"task/{n}": t for n, t in tensors.items()}
    if drawn is not None:
        named |= {f"train/{n}": t for n, t in drawn.train.fields.items()} | {"offsets": drawn.train.offsets}
    return named, {
        "kind": kind,
        "seed": task.seed,
        "round": task.round,
        "clients": list(task.clients),
        "population": task.population,
        "values": values,
        "drawn": None if drawn is None else list(drawn.clients),
        **more,
    }


def understood(
    template: Task, given: Mapping[str, Tensor], told: Mapping[str, Any]
) -> "tuple[Task, FederatedDataset | None]":
    """The task and the drawn clients of an `order`; the template is any task of its `shapes`."""
    tensors = {n.removeprefix("task/"): t for n, t in given.items() if n.startswith("task/")}
    tree = rebuild(_tree(template), {**tensors, **told["values"]})
    task = replace(
        template, **tree, seed=told["seed"], round=told["round"], clients=tuple(told["clients"]),
        population=told["population"], kind="train" if told["kind"] == "train" else "evaluate",
    )  # fmt: skip
    if told["drawn"] is None:
        return task, None
    from atoll.data import FederatedDataset, Split

    fields = {n.removeprefix("train/"): t for n, t in given.items() if n.startswith("train/")}
    return task, FederatedDataset(told["drawn"], Split(fields, given["offsets"]))


def done(
    inner: Engine,
    process: "Process",
    task: Task,
    data: "FederatedDataset",
    window: Remembering,
    chosen: Chosen,
    told: Mapping[str, Any],
) -> Found:
    """One tile's result; what its clients keep is staged in the window."""
    if told["kind"] == "survey":
        part = getattr(data, told["split"])
        sums, _ = process.survey(task, part.part(int(chosen[0]), int(chosen[-1]) + 1))
        return {"tensors": {"sums": sums}}
    if told["kind"] == "examine":
        places, sums, _ = inner.looked(process, task, data, window, told["split"], chosen)
        return {"tensors": {"places": torch.from_numpy(places), "sums": sums}}
    cohort, remembered = inner.tile(process, task, data, window, chosen)
    report = process.work(task, cohort, remembered)
    partial = process.combine(task, report)
    window.stage(report.clients, report.memory)
    tensors = {"weight": partial.weight, "metrics": partial.metrics}
    tensors |= {n: t for n, t in (("total", partial.total), ("rows", partial.rows)) if t is not None}
    tensors |= {f"codes/{n}": t for n, t in (partial.codes or {}).items()}
    return {
        "tensors": tensors,
        "clients": list(partial.clients),
        "broken": list(partial.broken),
        "parts": list(partial.parts),
        "bytes": partial.bytes,
        "refused": {name: dict(told) for name, told in partial.refused.items()},
    }


def _partial(found: Found) -> Partial:
    """A partial from what a worker sent; copies where the collector keeps what it gets."""
    tensors = found["tensors"]
    codes = {n.removeprefix("codes/"): t.clone() for n, t in tensors.items() if n.startswith("codes/")}
    first, second, third = found["parts"]
    return Partial(
        tuple(found["clients"]),
        tuple(found["broken"]),
        (first, second, third),
        tensors.get("total"),
        tensors["rows"].clone() if "rows" in tensors else None,
        codes or None,
        tensors["weight"].clone(),
        tensors["metrics"].clone(),
        found["bytes"],
        found["refused"],
    )


def _tree(task: Task) -> dict[str, Any]:
    return {"message": task.message, "buffers": task.buffers, "private": task.private, "shared": task.shared}


def _encoded(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A task's tensors and its other leaves by path."""
    every = dict(leaves(_tree(task)))
    tensors = {n: v for n, v in every.items() if isinstance(v, Tensor)}
    return tensors, {n: v for n, v in every.items() if n not in tensors}
