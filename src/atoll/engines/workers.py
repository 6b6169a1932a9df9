"""Several processes on one machine: a round's tiles spread over workers, with the bits of one.

A worker is a fork of the driver, so that data, model and algorithm are there already and nothing is copied. In every
round it gets one message: the task's tensors in memory both see, and the tiles it is to work on. It sends back one
message, when its tiles are done: sums, not rows, wherever the aggregator needs no rows. What clients keep is read
from, and written to, the driver's own table. Tiles are those of one process, and partials are taken in their order:
the result does not depend on the number of workers.

Tiles go to workers the most work first, each to the one with the least to do. A worker that dies is replaced and its
tiles are done again; when the same tile kills a second worker, the run stops and names its clients. A tile that raises
is done again in the driver, where the error is seen by whoever debugs it.

Messages are JSON and raw tensors. Threads of the driver do not survive in a fork: workers use one thread of their own,
touch no journal and close every file they inherited.
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.engines.base import Chosen, Engine, Looked, Remembering, Tile
from atoll.errors import RunError, invalid
from atoll.mapped import Region
from atoll.memory import ClientMemory
from atoll.messages import Partial, Task
from atoll.tree import leaves, rebuild

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset
    from atoll.rounds import Process

START_SECONDS = 0.02
"""With workers="auto", rounds shorter than this stay in one process: a message to another costs as much."""

BOARD_BYTES = 64 * 2**20
"""A worker holds back so many bytes of results before it waits until they have been taken."""

ALIGN = 64


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def can_fork() -> str | None:
    """Why workers cannot be forked here, or None."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return f"processes cannot be forked safely on {sys.platform}"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return "processes cannot be forked once CUDA is in use"
    return None


class Workers(Engine):
    """Spreads another engine's tiles over processes.

    Args:
        inner: the engine that knows how to work on a tile.
        count: workers; "auto": as many as there are cores, and none while rounds are too short to gain from them.

    Raises:
        InvalidArgument: a count below 1, or above 1 where processes cannot be forked.
    """

    def __init__(self, inner: Engine, count: int | Literal["auto"] = "auto") -> None:
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise invalid("workers", count, 'a number of processes of at least 1, or "auto"')
        refused = can_fork()
        if refused is not None and count not in ("auto", 1):
            raise invalid("workers", count, f'1 or "auto": {refused}', 'Use engine="ray" for several processes.')
        super().__init__(inner.thread_count)
        self.name = inner.name
        self.inner = inner
        self._asked = count
        self._most = 1 if refused is not None else cores() if count == "auto" else count
        self._seconds: list[float] = []
        self._crew: _Crew | None = None

    def describe(self) -> dict[str, Any]:
        """Which path ran, and why."""
        return {**self.inner.describe(), "workers": 1 if self._crew is None else self._crew.size}

    def prepare(self, process: "Process", data: "FederatedDataset | LazyDataset") -> None:
        before = self.inner.prepared
        self.inner.prepare(process, data)
        if self.inner.prepared is not before:
            self.stop()
            self._seconds = []

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
        if not self._pays(len(tiles)):
            yield from self._timed(process, task, data, memory, tiles)
            return
        crew = self._hired(process, task, data, memory, len(tiles))
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
        prepared = self.inner.prepared
        if not self._pays(len(tiles)) or prepared is None or prepared[1] is not data:
            yield from self.inner.examine(process, task, data, memory, split)
            return
        first, *rest = tiles
        places, sums, metrics = self.inner.looked(process, task, data, memory, split, first)
        yield places, sums, metrics
        crew = self._hired(process, task, data, memory, len(tiles))
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

    def stop(self) -> None:
        """End the worker processes; the next round that needs them starts new ones."""
        if self._crew is not None:
            self._crew.stop()
            self._crew = None

    def _timed(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, tiles: list[Chosen]
    ) -> Iterator[Partial]:
        spent = 0.0
        for chosen in tiles:
            began = time.perf_counter()
            partials = list(self.inner.train(process, task, data, memory, chosen))
            spent += time.perf_counter() - began
            yield from partials
        self._seconds = [*self._seconds[-1:], spent]

    def _pays(self, tiles: int) -> bool:
        """Whether workers take part. This decides about time alone: the result has the same bits either way."""
        if self._most == 1 or tiles < 2:
            return False
        if self._asked != "auto" or self._crew is not None:
            return True
        # The first round warms up; one that is long all the same need not be measured twice.
        return len(self._seconds) > 0 and (
            min(self._seconds) > 10 * START_SECONDS or (len(self._seconds) > 1 and min(self._seconds) > START_SECONDS)
        )

    def _hired(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, tiles: int
    ) -> "_Crew":
        crew = self._crew
        if crew is None or not crew.fits(task, memory) or crew.size < min(self._most, tiles):
            self.stop()
            memory.share()
            crew = self._crew = _Crew(self.inner, process, task, data, memory, min(self._most, tiles))
        return crew


# --- what travels -----------------------------------------------------------------------------------------------------

Spec = list[tuple[str, str, list[int], int]]
"""Where tensors are on a board: name, dtype, shape, offset."""


class Board:
    """Shared memory that one process writes tensors to and others read them from."""

    def __init__(self) -> None:
        self.region = Region()
        self.region.grow(ALIGN)

    def put(self, tensors: Mapping[str, Tensor], offset: int = ALIGN) -> tuple[Spec, int]:
        """Write tensors from an offset on; where they are, and the next free offset."""
        spec: Spec = []
        flat = {n: t.detach().cpu().contiguous().reshape(-1) for n, t in tensors.items()}
        begin = offset
        for tensor in flat.values():
            offset += -(-tensor.nbytes // ALIGN) * ALIGN
        self.region.grow(offset)
        for name, tensor in flat.items():
            self.region.tensor(tensor.dtype, tensor.numel(), begin).copy_(tensor)
            spec.append((name, str(tensor.dtype).removeprefix("torch."), list(tensors[name].shape), begin))
            begin += -(-tensor.nbytes // ALIGN) * ALIGN
        return spec, offset

    def get(self, spec: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Tensors as views of the board."""
        return {
            name: self.region.tensor(getattr(torch, dtype), int(np.prod(shape, dtype=np.int64)), at).view(shape)
            for name, dtype, shape, at in spec
        }

    @property
    def mark(self) -> Tensor:
        """A number [1] at the board's beginning: the tile its writer is at."""
        return self.region.tensor(torch.int64, 1)


def _tree(task: Task) -> dict[str, Any]:
    return {"message": task.message, "buffers": task.buffers, "private": task.private, "shared": task.shared}


def _encoded(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A task's tensors and its other leaves by path."""
    every = dict(leaves(_tree(task)))
    tensors = {n: v for n, v in every.items() if isinstance(v, Tensor)}
    return tensors, {n: v for n, v in every.items() if n not in tensors}


def _shapes(task: Task) -> dict[str, Any]:
    tensors, values = _encoded(task)
    return {n: (t.shape, t.dtype) for n, t in tensors.items()} | {n: type(v) for n, v in values.items()}


def _partial(found: dict[str, Any]) -> Partial:
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
    )


# --- the driver's side ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Worker:
    """A process as the driver sees it."""

    pid: int
    connection: Connection
    board: Board
    queue: deque[int] = field(default_factory=deque[int])  # tiles it has not delivered, in order
    held: int = 0  # delivered and not yet taken
    waiting: bool = False


class _Crew:
    """The workers of a process over some data."""

    def __init__(
        self,
        inner: Engine,
        process: "Process",
        task: Task,
        data: "FederatedDataset",
        memory: ClientMemory,
        size: int,
    ) -> None:
        self.size = size
        self._inner, self._process, self._template, self._data, self._memory = inner, process, task, data, memory
        self._shapes = _shapes(task)
        self._down = Board()
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end, self._workers)
        for _ in range(size):
            self._workers.append(self._fork())

    def fits(self, task: Task, memory: ClientMemory) -> bool:
        """Whether these workers can read such a task and that memory."""
        return memory is self._memory and _shapes(task) == self._shapes

    def stop(self) -> None:
        """End all of them."""
        self._end()

    def work(
        self,
        kind: str,
        task: Task,
        tiles: list[Chosen],
        costs: list[int],
        data: "FederatedDataset",
        memory: ClientMemory,
        **more: Any,
    ) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Results of all tiles in order; None for a tile that raised.

        Args:
            kind: "train" or "examine".
            task: of the round.
            tiles: places in the task's cohort.
            costs: work of each tile, in any unit.
            data: what the tiles' clients hold.
            memory: what they remember.
            more: further values for the workers.
        """
        order = self._order(kind, task, data, memory, more)
        load = [0] * self.size
        for number in sorted(range(len(tiles)), key=lambda i: (-costs[i], i)):
            least = load.index(min(load))
            self._workers[least].queue.append(number)
            load[least] += costs[number]
        for worker in self._workers:
            worker.queue = deque(sorted(worker.queue))
            worker.held, worker.waiting = 0, False
            self._send(worker, order, task, tiles, memory)
        results: dict[int, tuple[_Worker, dict[str, Any]]] = {}
        deaths: dict[int, int] = {}
        for number in range(len(tiles)):
            while number not in results:
                self._receive(results, deaths, order, task, tiles, memory)
            worker, found = results.pop(number)
            if found.get("failed"):
                yield number, None
            else:
                worker.board.region.follow(found["size"])
                yield number, {**found, "tensors": worker.board.get(found["tensors"])}
            worker.held -= 1
            if worker.waiting and not worker.held:
                worker.waiting = False
                worker.connection.send_bytes(b"{}")

    def _order(
        self, kind: str, task: Task, data: "FederatedDataset", memory: ClientMemory, more: dict[str, Any]
    ) -> dict[str, Any]:
        """What every worker is told."""
        tensors, values = _encoded(task)
        named = {f"task/{n}": t for n, t in tensors.items()}
        if data is not self._data:  # drawn for this round: the workers have never seen it
            named |= {f"train/{n}": t for n, t in data.train.fields.items()} | {"offsets": data.train.offsets}
        spec, _ = self._down.put(named)
        return {
            "kind": kind,
            "seed": task.seed,
            "round": task.round,
            "clients": list(task.clients),
            "population": task.population,
            "values": values,
            "tensors": spec,
            "size": self._down.region.size,
            "capacity": memory.capacity,
            "drawn": list(data.clients) if data is not self._data else None,
            **more,
        }

    def _send(
        self, worker: _Worker, order: dict[str, Any], task: Task, tiles: list[Chosen], memory: ClientMemory
    ) -> None:
        """Give a worker the tiles of its queue."""
        jobs: list[dict[str, Any]] = []
        for number in worker.queue:
            clients = [task.clients[i] for i in tiles[number]]
            write = memory.reserve(clients) if order["kind"] == "train" else []
            jobs.append(
                {"tile": number, "chosen": tiles[number].tolist(), "read": memory.slots(clients), "write": write}
            )
        # Reserving may have made the table longer.
        message = json.dumps({**order, "jobs": jobs, "capacity": memory.capacity})
        with suppress(BrokenPipeError, ConnectionError):  # it has died: receiving tells, and it is replaced
            worker.connection.send_bytes(message.encode())

    def _receive(
        self,
        results: dict[int, tuple[_Worker, dict[str, Any]]],
        deaths: dict[int, int],
        order: dict[str, Any],
        task: Task,
        tiles: list[Chosen],
        memory: ClientMemory,
    ) -> None:
        """Take in what has arrived; replace workers that died."""
        busy = {w.connection: place for place, w in enumerate(self._workers) if w.queue}
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker = self._workers[busy[connection]]
            try:
                message = json.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                self._bury(worker, deaths, task, tiles)
                fresh = self._fork()
                fresh.queue = worker.queue
                self._workers[busy[connection]] = fresh
                self._send(fresh, order, task, tiles, memory)
                continue
            for found in message["results"]:
                worker.queue.remove(found["tile"])
                worker.held += 1
                results[found["tile"]] = worker, found
            worker.waiting = message["waiting"]

    def _bury(self, worker: _Worker, deaths: dict[int, int], task: Task, tiles: list[Chosen]) -> None:
        """Find out how a worker died, and stop the run when the same clients have killed two."""
        worker.connection.close()
        _, status = os.waitpid(worker.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        at = int(worker.board.mark[0])
        at = at if at in worker.queue else worker.queue[0]
        deaths[at] = deaths.get(at, 0) + 1
        names = ", ".join(task.clients[i] for i in tiles[at][:5]) + (" and others" if len(tiles[at]) > 5 else "")
        if deaths[at] > 1:
            raise RunError(
                f"round {task.round + 1}: two workers ended {how} while they worked on the same clients ({names}): "
                "most likely the machine has too little memory for them. Use a smaller batch_size, or fewer workers; "
                'engine="loop" shows an error where it happens.'
            )
        note = f"a worker ended {how} at {names}; its clients were done again by another"
        self._inner.notes[note] = None
        warnings.warn(f"round {task.round + 1}: {note}.", stacklevel=2)

    def _fork(self) -> _Worker:
        here, there = Pipe()
        board = Board()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Newer Pythons warn of threads that a fork leaves behind; none is needed there.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            there.close()
            return _Worker(pid, here, board)
        try:
            keep = {there.fileno(), board.region.descriptor, self._down.region.descriptor, *self._memory.descriptors}
            _close_all_but(keep | {0, 1, 2})
            _serve(there, board, self._down, self._inner, self._process, self._template, self._data, self._memory)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(worker.pid, 0)
    workers.clear()


# --- the worker's side ------------------------------------------------------------------------------------------------


def _close_all_but(keep: set[int]) -> None:
    """Close inherited files: a lock or a pipe must not outlive the driver because a worker still holds it.

    A mapping has a descriptor of its own for the file it maps, and closes it when it is replaced by a longer one.
    """
    folder = Path("/proc/self/fd")
    if not folder.exists():
        return
    mapped = {os.readlink(folder / str(number)) for number in keep}
    for number in [int(name) for name in os.listdir(folder)]:
        with suppress(OSError):
            if number not in keep and os.readlink(folder / str(number)) not in mapped:
                os.close(number)


def _serve(
    connection: Connection,
    board: Board,
    down: Board,
    inner: Engine,
    process: "Process",
    template: Task,
    data: "FederatedDataset",
    memory: ClientMemory,
) -> NoReturn:
    """Work on tiles until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with inner.threads():
        while True:
            try:
                order = json.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                os._exit(0)
            down.region.follow(order["size"])
            given = down.get(order["tensors"])
            tensors = {n.removeprefix("task/"): t for n, t in given.items() if n.startswith("task/")}
            tree = rebuild(_tree(template), {**tensors, **order["values"]})
            task = replace(
                template, **tree, seed=order["seed"], round=order["round"], clients=tuple(order["clients"]),
                population=order["population"], kind="train" if order["kind"] == "train" else "evaluate",
            )  # fmt: skip
            held = data if order["drawn"] is None else _drawn(order["drawn"], given)
            _do(connection, board, inner, process, task, held, memory, order)


def _do(
    connection: Connection,
    board: Board,
    inner: Engine,
    process: "Process",
    task: Task,
    data: "FederatedDataset",
    memory: ClientMemory,
    order: dict[str, Any],
) -> None:
    """All jobs of an order."""
    results: list[dict[str, Any]] = []
    offset = ALIGN
    for job in order["jobs"]:
        board.mark.fill_(job["tile"])
        chosen = np.asarray(job["chosen"], dtype=np.int64)
        clients = [task.clients[i] for i in chosen]
        window = memory.window(clients, job["read"], job["write"], order["capacity"])
        try:
            found = _done(inner, process, task, data, window, chosen, order)
        except Exception:
            results.append({"tile": job["tile"], "failed": True})
            continue
        tensors: dict[str, Tensor] = found.pop("tensors")
        spec, offset = board.put(tensors, offset)
        results.append({"tile": job["tile"], "tensors": spec, "size": board.region.size, **found})
        if offset > BOARD_BYTES and job is not order["jobs"][-1]:
            connection.send_bytes(json.dumps({"results": results, "waiting": True}).encode())
            connection.recv_bytes()
            results, offset = [], ALIGN
    connection.send_bytes(json.dumps({"results": results, "waiting": False}).encode())


def _done(
    inner: Engine,
    process: "Process",
    task: Task,
    data: "FederatedDataset",
    window: Remembering,
    chosen: NDArray[np.int64],
    order: dict[str, Any],
) -> dict[str, Any]:
    """One tile's result: tensors and what fits in JSON."""
    if order["kind"] == "examine":
        places, sums, _ = inner.looked(process, task, data, window, order["split"], chosen)
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
    }


def _drawn(clients: list[str], given: Mapping[str, Tensor]) -> "FederatedDataset":
    """The dataset of clients that were drawn for this round."""
    from atoll.data import FederatedDataset, Split

    fields = {n.removeprefix("train/"): t for n, t in given.items() if n.startswith("train/")}
    return FederatedDataset(clients, Split(fields, given["offsets"]))
