"""What clients keep between rounds: SCAFFOLD's variates, private parameters, local buffers.

Every client that has been visited owns one row `[M]` of a table, in RAM or in a memory-mapped file. What a client
computed is *staged* until its update is known to be accepted, then committed, else discarded: a client whose update a
rule gave no share keeps what it had. Rows are never written
in place: a new value takes a free slot, so that the slots a checkpoint refers to stay as they were when it was written.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from atoll.errors import RunError
from atoll.mapped import Region
from atoll.vectors import Layout

PINS = 2
"""Checkpoints whose rows are kept."""


class ClientMemory:
    """Rows of named fields, one for each client that has been visited.

    Args:
        layout: the fields of a client's row and their shapes; an empty layout keeps nothing.
        dtype: of the rows.
        path: file to map; None keeps the rows in RAM.
        index: slot of each client in an existing file, as a checkpoint stored it.
    """

    def __init__(
        self, layout: Layout, dtype: torch.dtype, path: Path | None = None, index: Mapping[str, int] | None = None
    ) -> None:
        self.layout = layout
        self.version = 0
        self.settled = 0  # commits and discards so far
        self._dtype = dtype
        self._path = path
        self._index: dict[str, int] = dict(index or {})
        self._staged: dict[str, int] = {}
        self._pins: deque[frozenset[int]] = deque([frozenset(self._index.values())], maxlen=PINS)
        self._pinned: frozenset[int] = self._pins[0]
        self._capacity = 0
        self._table = torch.empty(0, layout.size, dtype=dtype)
        self._region: Region | None = None
        used = max(self._pinned, default=-1) + 1
        if path is not None and used and layout.size:
            row = layout.size * dtype.itemsize
            self._capacity = path.stat().st_size // row if path.exists() else 0
            if self._capacity < used:
                raise RunError(f"{path} is missing or shorter than its checkpoint says: the client memory is damaged.")
            self._region = Region(path)
            self._map()
        self._free = sorted(set(range(self._capacity)) - self._pinned, reverse=True)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, client: str) -> bool:
        return client in self._index

    @property
    def index(self) -> dict[str, int]:
        """Slot of every client with a committed row."""
        return dict(self._index)

    def rows(self, clients: Sequence[str], default: Tensor) -> Tensor:
        """Committed rows of clients [C, M]; `default [M]` for those never visited."""
        return read_rows(self._table, [self._index.get(c, -1) for c in clients], default)

    def stage(self, clients: Sequence[str], rows: Tensor) -> None:
        """Hold new rows [C, M] for clients until `commit` or `discard`."""
        if self.layout.size:
            slots = torch.tensor(self.reserve(clients))  # may make a new table
            self._table.index_copy_(0, slots, rows.detach().to("cpu", self._dtype))

    def reserve(self, clients: Sequence[str]) -> list[int]:
        """Stage a slot for each client, to be written by whoever shares the table, before `commit` or `discard`."""
        if not self.layout.size:
            return []
        slots = [self._take() for _ in clients]
        for client, slot in zip(clients, slots, strict=True):
            if client in self._staged:
                self._release(self._staged[client])
            self._staged[client] = slot
        return slots

    def slots(self, clients: Sequence[str]) -> list[int]:
        """Where the committed rows of clients are; -1 for those never visited."""
        return [self._index.get(c, -1) for c in clients] if self.layout.size else []

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Files a process must keep open to share the table."""
        return () if self._region is None else (self._region.descriptor,)

    @property
    def capacity(self) -> int:
        """Rows the table has room for."""
        return self._capacity

    def share(self) -> None:
        """Open the table, so that processes forked from now on see the same rows."""
        if self.layout.size and not self._capacity:
            self._grow()

    def window(self, clients: Sequence[str], read: Sequence[int], write: Sequence[int], capacity: int) -> "Window":
        """Some clients' rows for a process that was forked from the one that owns this memory.

        Args:
            clients: whose rows.
            read: their `slots` with the owner.
            write: what the owner has `reserve`d for them; empty where nothing will be written.
            capacity: of the owner's table now.
        """
        if capacity != self._capacity and self._region is not None:
            self._capacity = capacity
            self._map()
        return Window(
            self.layout, self._table, dict(zip(clients, read, strict=False)), dict(zip(clients, write, strict=False))
        )

    def commit(self) -> None:
        """Make the staged rows the clients' memory."""
        if not self.layout.size:  # nothing is kept, so nothing can be out of date
            return
        self.settled += 1
        for client, slot in self._staged.items():
            old = self._index.get(client)
            self._index[client] = slot
            if old is not None:
                self._release(old)
        self._staged.clear()
        self.version += 1

    def withdraw(self, clients: Sequence[str]) -> None:
        """Forget the staged rows of some clients, before `commit`: they keep what they had."""
        self.settled += bool(clients)  # who holds copies of what was staged must not take them for accepted
        for client in clients:
            slot = self._staged.pop(client, None)
            if slot is not None:
                self._release(slot)

    def discard(self) -> None:
        """Forget the staged rows."""
        self.settled += 1
        for slot in self._staged.values():
            self._release(slot)
        self._staged.clear()

    def flush(self) -> None:
        """Write mapped rows to disk, before a checkpoint that refers to them."""
        if self._region is not None and self._path is not None:
            self._region.flush()

    def pin(self) -> None:
        """Keep the present slots untouched: a durable checkpoint refers to them. Frees those of the oldest one."""
        before = self._pinned
        self._pins.append(frozenset(self._index.values()))
        self._pinned = frozenset().union(*self._pins)
        in_use = self._pinned | set(self._staged.values())
        self._free.extend(sorted(before - in_use, reverse=True))

    def _take(self) -> int:
        if not self._free:
            self._grow()
        return self._free.pop()

    def _release(self, slot: int) -> None:
        if slot not in self._pinned:
            self._free.append(slot)

    def _grow(self) -> None:
        old = self._capacity
        self._capacity = max(16, 2 * old)
        if self._region is None:
            self._region = Region(self._path)
        self._region.grow(self._capacity * self.layout.size * self._dtype.itemsize)
        self._map()
        self._free.extend(range(self._capacity - 1, old - 1, -1))

    def _map(self) -> None:
        assert self._region is not None
        count = self._capacity * self.layout.size
        self._region.follow(count * self._dtype.itemsize)
        self._table = self._region.tensor(self._dtype, count).view(self._capacity, self.layout.size)


class Window:
    """Some clients' rows as a forked process sees them: it writes no slot but those reserved for it."""

    def __init__(self, layout: Layout, table: Tensor, read: Mapping[str, int], write: Mapping[str, int]) -> None:
        self.layout = layout
        self._table, self._read, self._write = table, read, write

    def rows(self, clients: Sequence[str], default: Tensor) -> Tensor:
        """As of the whole memory."""
        return read_rows(
            self._table, [self._read[c] for c in clients] if self.layout.size else [-1] * len(clients), default
        )

    def stage(self, clients: Sequence[str], rows: Tensor) -> None:
        """Write new rows [C, M] to the reserved slots."""
        if self.layout.size:
            slots = torch.tensor([self._write[c] for c in clients])
            self._table.index_copy_(0, slots, rows.detach().to("cpu", self._table.dtype))


def read_rows(table: Tensor, slots: Sequence[int], default: Tensor) -> Tensor:
    """Rows [C, M] at slots of a table; `default [M]` where a slot is -1.

    Whole rows are read and written by `index_select` and `index_copy_`: indexing goes number by number.
    """
    if not default.numel():
        return default.new_empty(len(slots), 0)
    places = torch.tensor(slots, dtype=torch.int64)
    if not len(slots) or int(places.min()) >= 0:
        return table.index_select(0, places).to(default.device)
    out = default.expand(len(slots), -1).clone()
    seen = torch.nonzero(places >= 0)[:, 0]
    if len(seen):
        out.index_copy_(0, seen.to(out.device), table.index_select(0, places[seen]).to(out.device))
    return out
