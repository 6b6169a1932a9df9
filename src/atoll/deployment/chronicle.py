"""The run as it is looked at, where its folder may be lost: each event is in the server's state before it is there."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from atoll.database import Durability
from atoll.journal import DatabaseJournal, Event
from atoll.net.mirror import Mirror
from atoll.net.shelves import RECORD, RESULT
from atoll.net.state import State
from atoll.net.storage import scope


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event as the state has it.

    Attributes:
        time: seconds since 1970.
        kind: of the event.
        body: of the event.
    """

    time: float
    kind: str
    body: dict[str, Any]


_decoder = msgspec.json.Decoder(Entry)


class Chronicle(DatabaseJournal):
    """The journal of a run's folder; what the folder has lost is entered again.

    Args:
        folder: of the run.
        state: of the server.
        run: its name.
        durability: of what is in the folder.

    Raises:
        RunError: the journal is damaged, here or there, or another process writes to it.
        OSError: it cannot be reached.
    """

    def __init__(self, folder: Path, state: State, run: str, durability: Durability = "process") -> None:
        super().__init__(f"sqlite:///{folder / RECORD}", durability)
        self._entered = sum(1 for _ in super().events())
        self._log = state.journal(f"{scope(run)}chronicle")
        self._catch_up()

    def append(self, kind: str, body: dict[str, Any]) -> None:
        """Add an event; it is durable when this returns.

        Raises:
            RunError: the state is damaged, or another process wrote to it.
            OSError: the state refuses.
        """
        entry = Entry(time.time(), kind, body)
        self._log.append(msgspec.json.encode(entry))
        if self._entered == len(self._log) - 1:
            with suppress(OSError):  # the state has it: it is entered before anybody reads here
                self._take(entry)

    def events(self, kind: str | None = None) -> Iterator[Event]:
        """Events in order, of one kind or of all."""
        self._catch_up()
        return super().events(kind)

    def _catch_up(self) -> None:
        """Enter what is in the state alone."""
        if self._entered < len(self._log):
            for record in islice(self._log, self._entered, None):
                self._take(_decoder.decode(record))

    def _take(self, entry: Entry) -> None:
        self.enter(entry.time, entry.kind, entry.body)
        self._entered += 1

    def close(self) -> None:
        """Let somebody else write."""
        self._log.close()
        super().close()


def keep_result(kept: Mirror, folder: Path) -> None:
    """Have a run's result outlive its folder.

    Args:
        kept: the folder's files.
        folder: where the result is.

    Raises:
        OSError: it does not yet.
    """
    for name in RESULT:
        kept.keep(name)
    copy = folder / f"{RECORD}.copy"  # one file, whatever is in the log beside the journal
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(folder / RECORD)) as line:
        line.execute("VACUUM INTO ?", (str(copy),))
    kept.keep(RECORD, copy.name)
    copy.unlink()
