"""Actors of a Ray cluster: a round's tiles spread over machines, with the bits of one.

An actor holds the process, an engine of its own and the data, which are placed once: in Ray's object store, which every
actor of a machine reads without a copy, or, where they were opened from a directory, by the actor itself. In every
round an actor gets one message: the task, which all share, and its tiles. It answers in pieces of some megabytes, and
waits when two of them have not been taken, so that a driver holds few. The process travels by Ray's own serialisation,
closures and functions of a notebook included; results are arrays.

What clients keep has its durable copy with the driver. An actor remembers the rows of the clients it worked on, and is
sent only those it has not got.

An actor that is lost is replaced, or, where the cluster has no room, its tiles go to the others. When the same tile
costs a second actor, the run stops and names its clients. A tile that raises is done again in the driver, where the
error is seen by whoever debugs it.
"""

import importlib.machinery
import os
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from atoll.engines.base import Chosen, Engine
from atoll.engines.spread import Crew, Found, Spread, done, order, placed, shapes, understood
from atoll.engines.workers import ALIGN, cores
from atoll.errors import DataError, InvalidArgument, RunError, invalid
from atoll.memory import ClientMemory, Window
from atoll.messages import Task

if TYPE_CHECKING:
    from atoll.data import FederatedDataset
    from atoll.rounds import Process

PIECE_BYTES = 32 * 2**20
"""Results that travel together, and client memory sent with one message."""

CACHE_BYTES = 2**30
"""Client memory an actor remembers."""

AHEAD = 2
"""Pieces an actor makes, and messages it gets, before those before them are taken."""

PATIENCE_SECONDS = 120.0
"""How long actors may take to start; those that have not by then are done without."""


def library() -> Any:
    """The module `ray`.

    Raises:
        InvalidArgument: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InvalidArgument(
            f'engine="ray" needs Ray, which cannot be imported here ({error}): pip install "atoll[ray]".'
        ) from error
    return ray


class Ray(Spread):
    """Spreads another engine's tiles over the actors of a Ray cluster.

    The cluster is the one the program is connected to (`ray.init` was called), else the one Ray finds (RAY_ADDRESS,
    `ray start`), else one on this machine, which is ended with the engine.

    Args:
        inner: the engine that knows how to work on a tile.
        count: actors; "auto": as many as the cluster has cores for. None works on more tiles than there are.

    Raises:
        InvalidArgument: a count below 1; Ray is not installed.
    """

    def __init__(self, inner: Engine, count: int | Literal["auto"] = "auto") -> None:
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise invalid("workers", count, 'a number of actors of at least 1, or "auto"')
        library()
        super().__init__(inner)
        self.name = "ray"
        self._asked: int | Literal["auto"] = count

    def describe(self) -> dict[str, Any]:
        """Which path ran, and why."""
        return {**super().describe(), "engine": self.name}

    def _hired(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: ClientMemory, tiles: int
    ) -> Crew | None:
        if not tiles:
            return None
        crew = self._crew
        if not isinstance(crew, _Crew) or not crew.fits(task, memory):
            self.stop()
            crew = self._crew = _Crew(self.inner, process, task, memory, self._asked)
        try:
            crew.grow(tiles)
        except BaseException:
            self.stop()
            raise
        return crew


# --- the cluster ------------------------------------------------------------------------------------------------------


class _Session:
    """This process's connection to Ray: made when the first crew needs one, and ended after the last if made here."""

    def __init__(self) -> None:
        self._crews: weakref.WeakSet[_Crew] = weakref.WeakSet()
        self._made: str | None = None  # the address of a connection made here
        self.own = False  # whether the cluster was started here, too

    @property
    def address(self) -> str | None:
        """Which cluster this process is connected to."""
        ray = library()
        return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None

    def join(self, crew: "_Crew") -> str:
        """Connect, to a new cluster on this machine if there is none; the address."""
        ray = library()
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
            try:
                ray.init(num_cpus=cores(), **quiet)
                self.own = True
            except ValueError as error:
                if "existing cluster" not in str(error):
                    raise
                ray.init(log_to_driver=False, logging_level="ERROR")  # its CPUs are not for us to say
                self.own = False
            self._made = self.address
        elif self._made != self.address:  # the user's
            self._made, self.own = None, False
        self._crews.add(crew)
        address = self.address
        assert address is not None
        return address

    def leave(self, crew: "_Crew") -> None:
        """Disconnect, when nobody else is left and the connection was made here."""
        self._crews.discard(crew)
        if not self._crews and self._made is not None and self._made == self.address:
            library().shutdown()
            self._made, self.own = None, False


_session = _Session()


def _share(inner: Engine) -> dict[str, Any]:
    """What of a machine one actor takes. On a cluster of one's own there is nobody to share with."""
    return {"num_cpus": 0 if _session.own else inner.thread_count}


# --- what travels -----------------------------------------------------------------------------------------------------

Packed = tuple[str, tuple[int, ...], Any]
"""A tensor as Ray carries it without a copy: dtype, shape, its bytes as a numpy array."""


def packed(tensor: Tensor) -> Packed:
    """A tensor, ready to travel."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numpy()


def unpacked(given: Packed) -> Tensor:
    """The tensor, in place where its bytes are aligned. It is shared with others: nobody may write to it."""
    kind, shape, array = given
    dtype = getattr(torch, kind)
    if not array.size:
        return torch.empty(shape, dtype=dtype)
    if array.ctypes.data % ALIGN:  # products of other addresses may be rounded otherwise
        own = torch.empty(array.size, dtype=torch.uint8)
        own.numpy()[:] = array
        return own.view(dtype).view(shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return torch.from_numpy(array).view(dtype).view(shape)


def _all_packed(tensors: Mapping[str, Tensor]) -> dict[str, Packed]:
    return {name: packed(tensor) for name, tensor in tensors.items()}


def _all_unpacked(given: Mapping[str, Packed]) -> dict[str, Tensor]:
    return {name: unpacked(value) for name, value in given.items()}


def _stored(data: "FederatedDataset") -> dict[str, Any]:
    """Where the object store keeps data: every tensor by itself."""
    ray = library()

    splits: dict[str, Any] = {}
    for label, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if split is not None:
            fields = {name: ray.put(packed(tensor)) for name, tensor in split.fields.items()}
            splits[label] = ray.put(packed(split.offsets)), fields
    return {"clients": data.clients, "splits": splits, "name": data.name, "features": data.features}


def _restored(place: Mapping[str, Any]) -> "FederatedDataset":
    """The data of the object store, in place."""
    from atoll.data import FederatedDataset, Split

    ray = library()

    def mapped(kept: Any) -> Split:
        offsets, fields = kept
        return Split({n: unpacked(ray.get(ref)) for n, ref in fields.items()}, unpacked(ray.get(offsets)))

    splits = {label: mapped(kept) for label, kept in place["splits"].items()}
    return FederatedDataset.trusted(
        place["clients"],
        splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        holdout=None,
        name=place["name"],
        features=place["features"],
    )


def _opened(directory: str, fingerprint: str) -> "FederatedDataset | None":
    """The data of a directory, if it is there and holds the same."""
    from atoll.data import FederatedDataset

    with suppress(DataError, OSError):
        data = FederatedDataset.open(directory)
        return data if data.fingerprint() == fingerprint else None
    return None


@contextmanager
def _by_value(ray: Any) -> Generator[None]:
    """Modules that no other process could import travel with the functions in them: the file of `atoll run`."""
    loaded = [(n, m) for n, m in list(sys.modules.items()) if isinstance(m, ModuleType) and "." not in n]
    own = [module for name, module in loaded if name != "__main__" and not _importable(name, module)]
    for module in own:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str, module: ModuleType) -> bool:
    """Whether a module that was loaded from a file would be found by its name."""
    file = vars(module).get("__file__")
    if file is None or not file.endswith(".py"):
        return True
    found = importlib.machinery.PathFinder.find_spec(name)
    return found is not None and found.origin is not None and os.path.realpath(found.origin) == os.path.realpath(file)


# --- the driver's side ------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor as the driver sees it."""

    actor: Any
    unsent: deque[int] = field(default_factory=deque[int])  # tiles it has not been told of, in order
    queue: deque[int] = field(default_factory=deque[int])  # tiles it has not delivered, in order
    streams: deque[Any] = field(default_factory=deque[Any])  # its answers to messages
    holds: dict[str, int] = field(default_factory=dict[str, int])  # which clients' rows it remembers: their stamps
    careful: bool = False  # tiles go one at a time, so that it is known who ended an actor


@dataclass(slots=True)
class _Round:
    """What a crew works on."""

    task: Task
    tiles: list[Chosen]
    memory: ClientMemory
    told: Any
    training: bool
    results: dict[int, Found] = field(default_factory=dict[int, Found])
    deaths: dict[int, int] = field(default_factory=dict[int, int])

    def clients(self, number: int) -> list[str]:
        """A tile's clients."""
        return [self.task.clients[i] for i in self.tiles[number]]

    def named(self, number: int) -> str:
        """A tile's clients, for people."""
        clients = self.clients(number)
        return ", ".join(clients[:5]) + (" and others" if len(clients) > 5 else "")


class _Crew(Crew):
    """The actors of a process over some data."""

    carries = True

    def __init__(
        self,
        inner: Engine,
        process: "Process",
        task: Task,
        memory: ClientMemory,
        asked: int | Literal["auto"],
    ) -> None:
        ray = library()
        prepared = inner.prepared
        assert prepared is not None, "prepare() comes first"
        self._inner, self._memory, self._shapes = inner, memory, shapes(task)
        self._data = prepared[1].sample()  # all of them where they are packed
        self._workers: list[_Worker] = []
        self._stored: Any = None
        # Stamps say which value of a client's row an actor remembers: the time at which it was sent or computed.
        self._time, self._settled, self._version = 0, memory.settled, memory.version
        self._stamps: dict[str, int] = {}
        self._new: dict[str, int] = {}
        self._address = _session.join(self)
        room = max(1, int(ray.cluster_resources().get("CPU", 0)) // inner.thread_count)
        if asked != "auto" and asked > room and not _session.own:
            _session.leave(self)
            raise invalid("workers", asked, f"at most {room}, for which the cluster at {self._address} has CPUs")
        self._most = room if asked == "auto" else asked
        self._class = ray.remote(max_restarts=0, **_share(inner))(_Actor)
        self._known = {"torch": torch.__version__, **_choice(inner)}
        lean = copy(process)
        lean.engine = inner.fresh()
        lean.stay_home()
        row = memory.layout.size * process.model.dtype.itemsize
        self._row, self._limit = row, CACHE_BYTES // row if row else 0
        try:
            with _by_value(ray):
                self._parts = ray.put({"process": lean, "template": task, "layout": memory.layout})
        except (TypeError, AttributeError, OSError) as error:
            _session.leave(self)
            part = next((name for name, value in vars(lean).items() if not _travels(ray, value)), "process")
            raise InvalidArgument(
                f"the {part} cannot be sent to Ray's actors ({_line(error.__cause__ or error)}): models, algorithms "
                "and transforms must not hold open files, locks or generators. "
                'engine="auto" shares the work on one machine without sending them.'
            ) from error

    @property
    def size(self) -> int:
        return len(self._workers)

    def fits(self, task: Task, memory: ClientMemory) -> bool:
        """Whether these actors are there, and can read such a task and that memory."""
        return memory is self._memory and shapes(task) == self._shapes and _session.address == self._address

    def grow(self, tiles: int) -> None:
        """Start actors up to one for each tile, and no more than there may be."""
        wanted = min(self._most, tiles) - self.size
        if wanted <= 0:
            return
        began = self._start(wanted)
        self._workers += began
        if len(began) < wanted:
            self._most = self.size
            note = f"the cluster had room for {self.size} actors, not for {self.size + wanted - len(began)}"
            self._tell(note, note)
        if not self._workers:
            raise RunError(
                f"no actor could start within {PATIENCE_SECONDS:g} seconds on the Ray cluster at {self._address}, "
                f"which has {library().available_resources()} free: end what occupies it, or use another engine."
            )

    def stop(self) -> None:
        ray = library()
        if _session.address == self._address:
            for worker in self._workers:
                ray.kill(worker.actor)
        self._workers = []
        _session.leave(self)

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
        tensors, told = order(kind, task, data if data is not self._data else None, more)
        reference = library().put({**told, "tensors": _all_packed(tensors)})
        now = _Round(task, tiles, memory, reference, kind == "train")
        self._begin()
        held: list[list[int]] | None = None
        if self._row:
            held = [[self._at_hand(worker, now.clients(n)) for worker in self._workers] for n in range(len(tiles))]
        for worker, queue in zip(self._workers, placed(costs, self.size, held), strict=True):
            worker.queue, worker.unsent = deque(queue), deque(queue)
            worker.streams, worker.careful = deque(), False
            self._send(worker, now)
        for number in range(len(tiles)):
            while number not in now.results:
                self._receive(next(w for w in self._workers if number in w.queue), now)
            found = now.results.pop(number)
            if "failed" not in found:
                yield number, found
                continue
            yield number, None
            note = f"clients failed at an actor, but not in this process ({found['failed']})"
            self._tell(note, f"round {task.round + 1}: {note}: {now.named(number)}")

    def _at_hand(self, worker: _Worker, clients: Sequence[str]) -> int:
        """How many of these clients' rows an actor remembers as they are now."""
        return sum(worker.holds.get(c, 0) == self._stamps.get(c, -1) for c in clients)

    def _tell(self, note: str, text: str) -> None:
        self._inner.notes[note] = None
        warnings.warn(f"{text}.", stacklevel=3)

    # --- actors -------------------------------------------------------------------------------------------------------

    def _start(self, count: int) -> list[_Worker]:
        """Up to so many actors, ready to work."""
        ray, directory = library(), self._data.directory
        place = None if directory is None else (str(directory.resolve()), self._data.fingerprint())
        waiting: dict[Any, Any] = {}
        for _ in range(count):
            actor = self._class.remote(sys.path)
            waiting[actor.begin.remote(self._parts, self._place() if place is None else place)] = actor
        began: list[_Worker] = []
        while waiting:
            ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=PATIENCE_SECONDS)
            for reference in late:
                ray.kill(waiting.pop(reference))
            for reference in ready:
                actor = waiting.pop(reference)
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None) or error
                    raise RunError(
                        f"an actor could not be prepared ({type(cause).__name__}: {_line(cause)}). Modules of your own "
                        "must be on every machine of the cluster: install them there, or let Ray bring them, with "
                        'ray.init(runtime_env={"working_dir": "."}) before the run.'
                    ) from error
                if found is None:  # the directory is not there, or holds something else
                    waiting[actor.begin.remote(self._parts, self._place())] = actor
                    continue
                if found != self._known:
                    raise RunError(
                        f"an actor would not give the bits of this process: there it is {found}, here {self._known}. "
                        "Use the same version of torch, and processors of one kind, on all machines."
                    )
                began.append(_Worker(actor))
        return began

    def _place(self) -> Any:
        """Where the object store keeps the data."""
        if self._stored is None:
            self._stored = _stored(self._data)
        return self._stored

    def _lost(self, worker: _Worker, error: Exception, now: _Round) -> None:
        """Give a lost actor's tiles to another; stop the run when the same clients have cost two."""
        how, at = _line(error), worker.queue[0]
        with suppress(Exception):  # whatever is left of it
            library().kill(worker.actor)
        place = self._workers.index(worker)
        self._workers.remove(worker)
        now.deaths[at] = now.deaths.get(at, 0) + 1
        if now.deaths[at] > 1:
            raise RunError(
                f"round {now.task.round + 1}: two actors were lost while they worked on the same clients "
                f"({now.named(at)}): {how} Most likely their machines have too little memory for them: use a smaller "
                'batch_size, or fewer workers; engine="loop" shows an error where it happens.'
            )
        note = f"an actor was lost at {now.named(at)}, whose clients were done again by another"
        self._tell(f"{note} ({how})", f"round {now.task.round + 1}: {note} ({how})")
        fresh = self._start(1)
        self._workers[place:place] = fresh
        if not self._workers:
            raise RunError(f"round {now.task.round + 1}: the last actor was lost, and none could be started: {how}")
        heir = fresh[0] if fresh else min(self._workers, key=lambda w: len(w.queue))
        heir.queue += worker.queue
        heir.unsent += worker.queue
        heir.careful = True
        self._send(heir, now)

    # --- a round ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Find out what became of the rows that the run before this left."""
        memory = self._memory
        if memory.version == self._version + 1 and memory.settled == self._settled + 1:  # they were accepted
            self._stamps |= self._new
        elif memory.version != self._version:  # others have changed the memory
            self._stamps = {}
        self._new = {}
        self._settled, self._version = memory.settled, memory.version
        self._time += 2  # rows sent in this run have this stamp, rows computed in it the next

    def _send(self, worker: _Worker, now: _Round) -> None:
        """Tell an actor of its next tiles: of all of them, but for what is too much for one message."""
        ahead = 1 if worker.careful else AHEAD
        while worker.unsent and len(worker.streams) < ahead:
            jobs: list[tuple[int, Chosen, list[bool]]] = []
            lacking: list[str] = []
            asked: set[str] = set()
            while worker.unsent and not (jobs and (worker.careful or len(lacking) * self._row > PIECE_BYTES)):
                number = worker.unsent.popleft()
                clients = now.clients(number)
                visited = [slot >= 0 for slot in now.memory.slots(clients)]
                jobs.append((number, now.tiles[number], visited))
                asked.update(clients)
                for client in [c for c, known in zip(clients, visited, strict=False) if known]:
                    stamp = self._stamps.setdefault(client, self._time)
                    if worker.holds.pop(client, None) != stamp:
                        lacking.append(client)
                    worker.holds[client] = stamp  # now the youngest
            surplus = max(0, len(worker.holds) - self._limit)
            forgotten = [c for c in list(worker.holds)[:surplus] if c not in asked]
            for client in forgotten:
                del worker.holds[client]
            rows = now.memory.rows(lacking, torch.zeros(now.memory.layout.size)) if lacking else torch.empty(0)
            job = {"tiles": jobs, "names": lacking, "rows": packed(rows), "forget": forgotten, "piece": PIECE_BYTES}
            method = worker.actor.work.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
            worker.streams.append(method.remote(now.told, job))

    def _receive(self, worker: _Worker, now: _Round) -> None:
        """Take an actor's next piece."""
        ray = library()
        try:
            piece: list[Found] = ray.get(next(worker.streams[0]))
        except StopIteration:
            worker.streams.popleft()
            self._send(worker, now)
            return
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            self._lost(worker, error, now)
            return
        for found in piece:
            number = found["tile"]
            worker.queue.remove(number)
            now.results[number] = found
            clients = now.clients(number)
            if now.training and self._row:
                self._new |= dict.fromkeys(clients, self._time + 1)
            if "failed" in found:
                continue
            found["tensors"] = _all_unpacked(found["tensors"])
            if now.training:
                now.memory.stage(clients, found["tensors"].pop("memory"))
                if self._row:
                    worker.holds |= dict.fromkeys(clients, self._time + 1)


def _travels(ray: Any, part: Any) -> bool:
    """Whether Ray can serialise a part of a process."""
    try:
        with _by_value(ray):
            ray.cloudpickle.dumps(part)
    except Exception:
        return False
    return True


def _choice(engine: Engine) -> dict[str, Any]:
    """The way an engine runs the model, as far as its bits depend on it."""
    return {name: value for name, value in engine.describe().items() if name != "notes"}


def _line(error: BaseException) -> str:
    """The last line of what Ray says of an error, without its advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(" Some common causes include")[0].strip()


# --- the actor's side -------------------------------------------------------------------------------------------------


class _Actor:
    """Works on tiles, far from the driver."""

    def __init__(self, paths: Sequence[str]) -> None:
        # What the driver can import from its own folders can be imported here too, where they are there.
        sys.path += [path for path in paths if path not in sys.path]

    def begin(self, parts: Mapping[str, Any], place: Any) -> dict[str, Any] | None:
        """Take over the process and open the data; the choices made, or None without the data."""
        data = _opened(*place) if isinstance(place, tuple) else _restored(place)
        if data is None:
            return None
        self._process: Process = parts["process"]
        self._template, self._layout, self._data = parts["template"], parts["layout"], data
        self._inner = self._process.engine
        self._kept: dict[str, Tensor] = {}
        with self._inner.threads():
            self._inner.prepare(self._process, data)
        return {"torch": torch.__version__, **_choice(self._inner)}

    def work(self, told: Mapping[str, Any], job: Mapping[str, Any]) -> Iterator[list[Found]]:
        """Results of some tiles, in pieces."""
        for client in job["forget"]:
            self._kept.pop(client, None)
        for client, row in zip(job["names"], unpacked(job["rows"]), strict=True):
            self._kept[client] = row.clone()
        task, drawn = understood(self._template, _all_unpacked(told["tensors"]), told)
        self._data.check_unchanged()
        data = self._data if drawn is None else drawn
        piece, size = list[Found](), 0
        for number, chosen, visited in job["tiles"]:
            with self._inner.threads():
                try:
                    found = self._tile(task, data, np.array(chosen), visited, told)
                except Exception as error:
                    piece.append({"tile": number, "failed": f"{type(error).__name__}: {error}"})
                    continue
            # A tile's own memory is used again by the next.
            tensors = _all_packed({name: tensor.clone() for name, tensor in found["tensors"].items()})
            piece.append({**found, "tile": number, "tensors": tensors})
            size += sum(array.nbytes for _, _, array in tensors.values())
            if size > job["piece"]:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece

    def _tile(
        self, task: Task, data: "FederatedDataset", chosen: Chosen, visited: Sequence[bool], told: Mapping[str, Any]
    ) -> Found:
        """One tile's result, and what its clients keep."""
        clients, layout = [task.clients[i] for i in chosen], self._layout
        known = [c for c, seen in zip(clients, visited, strict=False) if seen]
        table = torch.empty(len(known) + len(clients), layout.size, dtype=self._process.model.dtype)
        for row, client in zip(table, known, strict=False):
            row.copy_(self._kept[client])
        read = {**dict.fromkeys(clients, -1), **{c: i for i, c in enumerate(known)}}
        write = {c: len(known) + i for i, c in enumerate(clients)}
        found = done(self._inner, self._process, task, data, Window(layout, table, read, write), chosen, told)
        if told["kind"] == "train":
            rows = found["tensors"]["memory"] = table[len(known) :]
            if layout.size:
                self._kept |= {c: row.clone() for c, row in zip(clients, rows, strict=True)}
        return found
