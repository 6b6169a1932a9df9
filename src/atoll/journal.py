"""The journal of a run: append-only events, in memory or in a database, and checkpoints beside it.

Everything that is shown of a run (history, progress, reports) and everything it is resumed from is read from here.
A run directory holds `journal.sqlite`, `checkpoints/round-*.safetensors`, `memory.bin` (what clients keep) and, once
the run is done, `result.json` and `result.safetensors`.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoll.errors import RunError
from atoll.history import Record

if TYPE_CHECKING:  # a run in memory need not open a database
    from atoll.database import Durability

KEEP = 2
"""Checkpoints kept: the newest may be damaged by a failing disk, then the one before it is used."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a journal."""

    number: int
    time: float  # seconds since 1970
    kind: str
    body: dict[str, Any]


class Journal:
    """Append-only events in memory."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def append(self, kind: str, body: dict[str, Any]) -> None:
        """Add an event; it is durable when this returns."""
        self._events.append(Event(len(self._events), time.time(), kind, body))

    def events(self, kind: str | None = None) -> Iterator[Event]:
        """Events in order, of one kind or of all."""
        return (e for e in self._events if kind is None or e.kind == kind)

    def history(self) -> list[Record]:
        """The record of every round, in order; what was computed again after a resume replaces what was there."""
        records: dict[int, Record] = {}
        for event in self.events():
            if event.kind == "round":
                record = Record.from_dict(event.body)
                records[record.round] = record
            elif event.kind == "resumed":
                records = {r: record for r, record in records.items() if r <= event.body["round"]}
        return [records[r] for r in sorted(records)]

    def close(self) -> None:
        """Release what the journal holds; memory needs no release."""
        return


class DatabaseJournal(Journal):
    """Append-only events in an SQL database.

    Args:
        url: of the database as SQLAlchemy writes it, for instance `sqlite:///runs/a/journal.sqlite`.
        durability: of what is written.
    """

    def __init__(self, url: str, durability: "Durability" = "process") -> None:
        import sqlalchemy as sql
        from sqlalchemy.exc import DatabaseError

        from atoll.database import connect, reason, shown

        super().__init__()
        self._engine, self._shown = connect(url, durability), shown(url)
        columns = (
            sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
            sql.Column("time", sql.Float, nullable=False),
            sql.Column("kind", sql.String(32), nullable=False),
            sql.Column("body", sql.Text, nullable=False),
        )
        metadata = sql.MetaData()
        self._table = sql.Table("events", metadata, *columns)
        try:
            metadata.create_all(self._engine)
        except DatabaseError as error:
            raise RunError(f"{self._shown} is not a journal: {reason(error)}. Choose another directory.") from error

    def append(self, kind: str, body: dict[str, Any]) -> None:
        """Add an event; it is durable when this returns, as far as `durability` says.

        Raises:
            RunError: the database is damaged.
            OSError: it has no room, or refuses for another reason.
        """
        self.enter(time.time(), kind, body)

    def enter(self, at: float, kind: str, body: dict[str, Any]) -> None:
        """Add an event of another time; raises as `append`.

        Args:
            at: seconds since 1970.
            kind: of the event.
            body: of the event.
        """
        from atoll.database import refusals

        row = {"time": at, "kind": kind, "body": json.dumps(body, allow_nan=False)}
        with refusals(self._shown), self._engine.begin() as connection:
            connection.execute(self._table.insert().values(**row))

    def events(self, kind: str | None = None) -> Iterator[Event]:
        """Events in order, of one kind or of all."""
        query = self._table.select().order_by(self._table.c.number)
        if kind is not None:
            query = query.where(self._table.c.kind == kind)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return (Event(r.number, r.time, r.kind, json.loads(r.body)) for r in rows)

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()


def open_journal(directory: Path | None, durability: "Durability" = "process") -> Journal:
    """The journal of a run directory, made if there is none; in memory without a directory.

    Args:
        directory: of the run.
        durability: of what is written.
    """
    if directory is None:
        return Journal()
    directory.mkdir(parents=True, exist_ok=True)
    return DatabaseJournal(f"sqlite:///{directory / 'journal.sqlite'}", durability)


def read_journal(directory: Path) -> Journal:
    """The journal of an existing run directory.

    Raises:
        RunError: there is none.
    """
    if not (directory / "journal.sqlite").exists():
        raise RunError(f"{directory} is not a run directory: it has no journal.sqlite.")
    return open_journal(directory)


@contextmanager
def locked(directory: Path) -> Generator[None]:
    """Hold a run directory for this process.

    Raises:
        RunError: another process is running in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another process is running in {directory}: wait for it, or choose another directory."
            ) from error
        yield


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run's state on disk: tensors by path and everything else as JSON."""

    round: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write_checkpoint(directory: Path, journal: Journal, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole or not at all, enter it in the journal, and remove those that are no longer needed."""
    from safetensors.torch import save

    folder = directory / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to("cpu").clone().contiguous() for n, t in checkpoint.tensors.items()}
    content = save(tensors, {"atoll": json.dumps({"round": checkpoint.round, **checkpoint.values})})
    name = f"round-{checkpoint.round:08d}.safetensors"
    write_atomically(folder / name, content)
    body = {"round": checkpoint.round, "file": name, "blake2b": hashlib.blake2b(content).hexdigest()}
    journal.append("checkpoint", body)
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEEP]:
        old.unlink()


def read_checkpoint(directory: Path, journal: Journal) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each damaged one that was passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    warnings: list[str] = []
    entries = {e.body["file"]: e.body for e in journal.events("checkpoint")}
    for entry in sorted(entries.values(), key=lambda e: -int(e["round"])):
        path = directory / "checkpoints" / Path(entry["file"]).name
        if not path.exists():
            continue
        content = path.read_bytes()
        if hashlib.blake2b(content).hexdigest() != entry["blake2b"]:
            warnings.append(f"checkpoint {path.name} is damaged and was passed over.")
            continue
        try:
            tensors = load(content)
        except SafetensorError:
            warnings.append(f"checkpoint {path.name} cannot be read and was passed over.")
            continue
        length = int.from_bytes(content[:8], "little")
        values = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["atoll"])
        return Checkpoint(values.pop("round"), tensors, values), warnings
    return None, warnings


def discard_checkpoints(directory: Path, *, keep: int) -> None:
    """Remove all checkpoints but that of one round."""
    for path in (directory / "checkpoints").glob("round-*.safetensors"):
        if path.name != f"round-{keep:08d}.safetensors":
            path.unlink()


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file whole or not at all, durably; who may read it is `mode` less the process's own mask."""
    with atomically(path) as temporary:
        _write(temporary, content, mode)


def _write(path: Path, content: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)


@contextmanager
def atomically(path: Path) -> Generator[Path]:
    """Where to write what takes the place of a file when the context ends, whole or not at all, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def encode_leaves(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split leaves by path into tensors and the rest."""
    tensors = {n: v for n, v in tree.items() if isinstance(v, torch.Tensor)}
    return tensors, {n: v for n, v in tree.items() if n not in tensors}
