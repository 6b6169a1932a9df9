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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from atoll.engines.base import Chosen, Engine
from atoll.engines.spread import Crew, Found, Spread, done, order, placed, shapes, understood
from atoll.errors import RunError, invalid
from atoll.mapped import Region
from atoll.memory import ClientMemory
from atoll.messages import Partial, Task

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset
    from atoll.rounds import Process

START_SECONDS = 0.008
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


class Workers(Spread):
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
        if inner.thread_count > 1 and count not in ("auto", 1):
            raise invalid(
                "workers",
                count,
                "1 with an engine of several threads",
                "Each worker has one thread: leave threads= out.",
            )
        super().__init__(inner)
        self._asked = count
        self._most = 1 if refused is not None or inner.thread_count > 1 else cores() if count == "auto" else count
        self._seconds: list[float] = []

    def prepare(self, process: "Process", data: "FederatedDataset | LazyDataset") -> None:
        before = self.inner.prepared
        super().prepare(process, data)
        if self.inner.prepared is not before:
            self._seconds = []

    def _alone(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, tiles: list[Chosen]
    ) -> Iterator[Partial]:
        spent = 0.0
        for chosen in tiles:
            began = time.perf_counter()
            for partial in self.inner.train(process, task, data, memory, chosen):
                spent += time.perf_counter() - began
                yield partial
                del partial  # large models: nothing is held that the next tile does not need
                began = time.perf_counter()
        self.inner.rest()
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
    ) -> Crew | None:
        if not self._pays(tiles):
            return None
        crew = self._crew
        if not isinstance(crew, _Crew) or not crew.fits(task, memory) or crew.size < min(self._most, tiles):
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


class _Crew(Crew):
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
        self._inner, self._process, self._template, self._data, self._memory = inner, process, task, data, memory
        self._shapes = shapes(task)
        self._down = Board()
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end, self._workers, os.getpid())
        for _ in range(size):
            self._workers.append(self._fork())

    @property
    def size(self) -> int:
        return len(self._workers)

    def fits(self, task: Task, memory: ClientMemory) -> bool:
        """Whether these workers can read such a task and that memory."""
        return memory is self._memory and shapes(task) == self._shapes

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
    ) -> Iterator[tuple[int, Found | None]]:
        told = self._order(kind, task, data, memory, more)
        for worker, queue in zip(self._workers, placed(costs, self.size), strict=True):
            worker.queue = deque(queue)
            worker.held, worker.waiting = 0, False
            self._send(worker, told, task, tiles, memory)
        results: dict[int, tuple[_Worker, Found]] = {}
        deaths: dict[int, int] = {}
        for number in range(len(tiles)):
            while number not in results:
                self._receive(results, deaths, told, task, tiles, memory)
            worker, found = results.pop(number)
            if found.get("failed"):
                self._inner.notes[f"a tile failed in a worker and was done by the driver ({found['failed']})"] = None
                yield number, None
            else:
                worker.board.region.follow(found["size"])
                yield number, {**found, "tensors": worker.board.get(found["tensors"])}
            worker.held -= 1
            if worker.waiting and not worker.held:
                worker.waiting = False
                with suppress(OSError):  # it has died: receiving tells, and it is replaced
                    worker.connection.send_bytes(b"{}")

    def _order(
        self, kind: str, task: Task, data: "FederatedDataset", memory: ClientMemory, more: dict[str, Any]
    ) -> dict[str, Any]:
        """What every worker is told."""
        tensors, told = order(kind, task, data if data is not self._data else None, more)
        spec, _ = self._down.put(tensors)
        return {**told, "tensors": spec, "size": self._down.region.size, "capacity": memory.capacity}

    def _send(
        self, worker: _Worker, told: dict[str, Any], task: Task, tiles: list[Chosen], memory: ClientMemory
    ) -> None:
        """Give a worker the tiles of its queue."""
        jobs: list[dict[str, Any]] = []
        for number in worker.queue:
            clients = [task.clients[i] for i in tiles[number]]
            write = memory.reserve(clients) if told["kind"] == "train" else []
            jobs.append(
                {"tile": number, "chosen": tiles[number].tolist(), "read": memory.slots(clients), "write": write}
            )
        # Reserving may have made the table longer.
        message = json.dumps({**told, "jobs": jobs, "capacity": memory.capacity})
        with suppress(OSError):  # it has died: receiving tells, and it is replaced
            worker.connection.send_bytes(message.encode())

    def _receive(
        self,
        results: dict[int, tuple[_Worker, Found]],
        deaths: dict[int, int],
        told: dict[str, Any],
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
                self._send(fresh, told, task, tiles, memory)
                continue
            for found in message["results"]:
                worker.queue.remove(found["tile"])
                worker.held += 1
                results[found["tile"]] = worker, found
            worker.waiting = message["waiting"]

    def _bury(self, worker: _Worker, deaths: dict[int, int], task: Task, tiles: list[Chosen]) -> None:
        """Find out how a worker died, and stop the run when the same clients have killed two."""
        worker.connection.close()
        worker.waiting = False
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


def _end(workers: list[_Worker], driver: int) -> None:
    if os.getpid() != driver:  # a child that the user's program forked: the workers are not its own
        return
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
    with inner.threads(), suppress(EOFError, ConnectionError):
        while True:
            told = json.loads(connection.recv_bytes())
            down.region.follow(told["size"])
            task, drawn = understood(template, down.get(told["tensors"]), told)
            _do(connection, board, inner, process, task, data if drawn is None else drawn, memory, told)
    os._exit(0)


def _do(
    connection: Connection,
    board: Board,
    inner: Engine,
    process: "Process",
    task: Task,
    data: "FederatedDataset",
    memory: ClientMemory,
    told: dict[str, Any],
) -> None:
    """All jobs of an order."""
    results: list[dict[str, Any]] = []
    offset = ALIGN
    for job in told["jobs"]:
        board.mark.fill_(job["tile"])
        chosen = np.asarray(job["chosen"], dtype=np.int64)
        clients = [task.clients[i] for i in chosen]
        window = memory.window(clients, job["read"], job["write"], told["capacity"])
        try:
            found = done(inner, process, task, data, window, chosen, told)
        except Exception as error:
            results.append({"tile": job["tile"], "failed": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        tensors: dict[str, Tensor] = found.pop("tensors")
        spec, offset = board.put(tensors, offset)
        results.append({"tile": job["tile"], "tensors": spec, "size": board.region.size, **found})
        if offset > BOARD_BYTES and job is not told["jobs"][-1]:
            connection.send_bytes(json.dumps({"results": results, "waiting": True}).encode())
            connection.recv_bytes()
            results, offset = [], ALIGN
    connection.send_bytes(json.dumps({"results": results, "waiting": False}).encode())
