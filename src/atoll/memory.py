"""What clients keep between rounds: SCAFFOLD's variates, private parameters, local buffers.

Every client that has been visited owns one row `[M]` of a table, in RAM or in a memory-mapped file. What a client
computed is *staged* until its update is known to be accepted, then committed, else discarded. Rows are never written
in place: a new value takes a free slot, so that the slots a checkpoint refers to stay as they were when it was written.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.errors import RunError
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
        self._dtype = dtype
        self._path = path
        self._index: dict[str, int] = dict(index or {})
        self._staged: dict[str, int] = {}
        self._pins: deque[frozenset[int]] = deque([frozenset(self._index.values())], maxlen=PINS)
        self._pinned: frozenset[int] = self._pins[0]
        self._capacity = 0
        self._table = torch.empty(0, layout.size, dtype=dtype)
        self._mapped: np.memmap[Any, Any] | None = None
        used = max(self._pinned, default=-1) + 1
        if path is not None and used and layout.size:
            row = layout.size * dtype.itemsize
            self._capacity = path.stat().st_size // row if path.exists() else 0
            if self._capacity < used:
                raise RunError(f"{path} is missing or shorter than its checkpoint says: the client memory is damaged.")
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
        if not self.layout.size:
            return default.new_empty(len(clients), 0)
        out = default.expand(len(clients), -1).clone()
        seen = [(i, self._index[c]) for i, c in enumerate(clients) if c in self._index]
        if seen:
            at, slots = (torch.tensor(column) for column in zip(*seen, strict=True))
            out[at.to(out.device)] = self._table[slots].to(out.device)
        return out

    def stage(self, clients: Sequence[str], rows: Tensor) -> None:
        """Hold new rows [C, M] for clients until `commit` or `discard`."""
        if not self.layout.size:
            return
        slots = [self._take() for _ in clients]
        self._table[torch.tensor(slots)] = rows.detach().to("cpu", self._dtype)
        for client, slot in zip(clients, slots, strict=True):
            if client in self._staged:
                self._release(self._staged[client])
            self._staged[client] = slot

    def commit(self) -> None:
        """Make the staged rows the clients' memory."""
        if not self.layout.size:  # nothing is kept, so nothing can be out of date
            return
        for client, slot in self._staged.items():
            old = self._index.get(client)
            self._index[client] = slot
            if old is not None:
                self._release(old)
        self._staged.clear()
        self.version += 1

    def discard(self) -> None:
        """Forget the staged rows."""
        for slot in self._staged.values():
            self._release(slot)
        self._staged.clear()

    def flush(self) -> None:
        """Write mapped rows to disk, before a checkpoint that refers to them."""
        if self._mapped is not None:
            self._mapped.flush()

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
        if self._path is None:
            table = torch.empty(self._capacity, self.layout.size, dtype=self._dtype)
            table[:old] = self._table
            self._table = table
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            row = self.layout.size * self._dtype.itemsize
            with open(self._path, "ab") as file:
                file.truncate(self._capacity * row)
            self._map()
        self._free.extend(range(self._capacity - 1, old - 1, -1))

    def _map(self) -> None:
        # Mapped as bytes: numpy has no name for some of torch's dtypes.
        shape = (self._capacity, self.layout.size * self._dtype.itemsize)
        self._mapped = np.memmap(str(self._path), dtype=np.uint8, mode="r+", shape=shape)
        self._table = torch.from_numpy(self._mapped).view(self._dtype)
