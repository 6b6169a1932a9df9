"""Files and journals that survive a crash, on a file system that is handed in, so that its faults can be simulated.

What is durable, and when: the content of a file after `sync(path)`; its name after `sync_folder` of its folder. Until
then a crash may leave all, some or none of it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from atoll.net.buffers import Buffer, room

if TYPE_CHECKING:  # a server's own process keeps files, and has no tensors
    import torch
    from torch import Tensor

    from atoll.database import Durability
    from atoll.net.state import State


class Journal(Protocol):
    """Append-only records that one process writes. A record that was changed, taken out or moved is noticed."""

    def append(self, record: bytes) -> None:
        """Add a record; it is durable when this returns.

        Raises:
            RunError: another process wrote to the journal.
            OSError: the record is not in the journal; after a crash it may be.
        """
        ...

    def __iter__(self) -> Iterator[bytes]:
        """All records, read anew."""
        ...

    def __len__(self) -> int: ...

    @property
    def head(self) -> str:
        """Hash of all records, in hexadecimal digits."""
        ...

    def close(self) -> None:
        """Let somebody else write."""
        ...


class FileSystem(Protocol):
    """What is asked of a file system; paths are relative, with forward slashes. Every method may raise OSError."""

    def write(self, path: str, content: Buffer) -> None:
        """Make a file with this content, or replace what it holds."""
        ...

    def append(self, path: str, content: Buffer) -> None:
        """Add to the end of a file, which is made if there is none."""
        ...

    def truncate(self, path: str, length: int) -> None:
        """Cut a file to a length in bytes."""
        ...

    def sync(self, path: str) -> None:
        """Make a file's content durable."""
        ...

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, in the place of what has it now."""
        ...

    def read(self, path: str, offset: int = 0, length: int = -1) -> bytes:
        """Some bytes of a file, or all from an offset on.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Read bytes of a file from an offset on into a buffer; how many there were, fewer only at the file's end.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def size(self, path: str) -> int:
        """Length of a file in bytes; -1 where there is none."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; empty where there is none."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a folder that is empty, if it is there."""
        ...

    def matrix(self, rows: int, columns: int, dtype: "torch.dtype") -> "Tensor":
        """A scratch matrix [rows, columns] that need not fit into memory and lasts as long as it is held."""
        ...

    def journal(self, name: str) -> Journal:
        """A journal, made if there is none, whose one writer this process is until it is closed.

        Raises:
            RunError: another process writes to it; it is damaged.
        """
        ...


class Disk:
    """A folder of the machine.

    Args:
        root: the folder; made if there is none.
        state: where its journals are; default a file of its own in it, `state.sqlite`.
        scope: what their names begin with there.
        durability: "process": nothing is waited for, and what was synced outlives the process alone.
    """

    def __init__(
        self, root: Path, *, state: "State | None" = None, scope: str = "", durability: "Durability" = "power"
    ) -> None:
        self._root, self._state, self._scope = root, state, scope
        self._durability: Durability = durability
        self._journals: list[Journal] = []
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for folder in made:
            self._sync(folder.parent)

    def write(self, path: str, content: Buffer) -> None:
        """Make a file with this content, or replace what it holds."""
        self._at(path).write_bytes(content)

    def append(self, path: str, content: Buffer) -> None:
        """Add to the end of a file, which is made if there is none."""
        with open(self._at(path), "ab") as file:
            file.write(content)

    def truncate(self, path: str, length: int) -> None:
        """Cut a file to a length in bytes."""
        os.truncate(self._at(path), length)

    def sync(self, path: str) -> None:
        """Make a file's content durable."""
        self._sync(self._at(path))

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable, and its own."""
        folder = self._root / path
        for each in (folder, *folder.parents):
            self._sync(each)
            if each == self._root:
                return

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, in the place of what has it now."""
        os.replace(self._root / source, self._at(target))

    def read(self, path: str, offset: int = 0, length: int = -1) -> bytes:
        """Some bytes of a file, or all from an offset on."""
        with open(self._root / path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Read bytes of a file from an offset on into a buffer; how many there were, fewer only at the file's end."""
        at = 0
        with open(self._root / path, "rb", buffering=0) as file:
            file.seek(offset)
            while at < len(buffer) and (got := file.readinto(buffer[at:])):
                at += got
        return at

    def size(self, path: str) -> int:
        """Length of a file in bytes; -1 where there is none."""
        try:
            return (self._root / path).stat().st_size
        except FileNotFoundError:
            return -1

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; empty where there is none."""
        try:
            return sorted(os.listdir(self._root / folder))
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        """Remove a file, or a folder that is empty, if it is there."""
        full = self._root / path
        with suppress(FileNotFoundError):
            full.rmdir() if full.is_dir() else full.unlink()

    def matrix(self, rows: int, columns: int, dtype: "torch.dtype") -> "Tensor":
        """A mapped scratch file as a matrix [rows, columns]; its name is gone at once."""
        from atoll.mapped import Region

        path = self._at("scratch")
        region = Region(path)
        region.grow(rows * columns * dtype.itemsize)
        path.unlink()
        return region.tensor(dtype, rows * columns).view(rows, columns)

    def journal(self, name: str) -> Journal:
        """A journal, made if there is none, whose one writer this process is until it is closed."""
        if self._state is None:
            self._state = state_of(self._root, durability=self._durability)
        made = self._state.journal(f"{self._scope}{name}")
        self._journals.append(made)
        return made

    def close(self) -> None:
        """Let somebody else write to the journals that were opened here."""
        while self._journals:
            self._journals.pop().close()

    def _at(self, path: str) -> Path:
        full = self._root / path
        full.parent.mkdir(parents=True, exist_ok=True)
        return full

    def _sync(self, path: Path) -> None:
        if self._durability == "process":
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def scope(run: str) -> str:
    """What the names of a run's journals begin with, in the state of a server or a site."""
    return f"runs/{run}/"


def state_of(folder: Path, *, durability: "Durability" = "power") -> "State":
    """The state that a folder has of its own: `state.sqlite` in it, made if there is none."""
    from atoll.database import sqlite
    from atoll.net.state import State

    return State(sqlite(folder / "state.sqlite"), durability=durability)


class Content:
    """Bytes that came beside a message: in memory, or in a file of the same file system.

    Args:
        held: the bytes.
        files: instead, where they lie in a file.
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, held: Buffer = b"", files: FileSystem | None = None, path: str = "") -> None:
        self._held, self._files, self._path = memoryview(held), files, path
        self.size = len(held) if files is None else files.size(path)
        if self.size < 0:
            raise FileNotFoundError(path)

    def part(self, begin: int, end: int, room: memoryview | None = None) -> memoryview:
        """The bytes from `begin` to `end`.

        Args:
            begin: from the first byte.
            end: likewise.
            room: memory that they are read into, if they lie in a file; default new memory.

        Raises:
            OSError: they cannot be read.
        """
        if self._files is None:
            return self._held[begin:end]
        into = (memoryview(bytearray(end - begin)) if room is None else room)[: end - begin]
        return into[: self._files.into(self._path, begin, into)]

    def whole(self) -> memoryview:
        """All of them.

        Raises:
            OSError: they cannot be read.
        """
        return self.part(0, self.size, None if self._files is None else room(self.size))

    def keep(self, files: FileSystem, path: str) -> None:
        """Have them durable in a file of that name, in the place of what has it: what lay in a file is moved there.

        Raises:
            OSError: they are not.
        """
        if self._files is None:
            write_durably(files, path, self._held)
            return
        assert files is self._files
        files.sync(self._path)
        files.rename(self._path, path)
        files.sync_folder(path.rpartition("/")[0])
        self._path = path


def write_durably(files: FileSystem, path: str, *parts: Buffer) -> None:
    """Write a file whole or not at all; it is durable when this returns.

    Args:
        files: where.
        path: of the file.
        parts: its content, one after the other.

    Raises:
        OSError: nothing of that name was changed.
    """
    _written(files, path, parts, durably=True)
    files.sync_folder(path.rpartition("/")[0])


def write_whole(files: FileSystem, path: str, *parts: Buffer) -> None:
    """Write a file whole or not at all, for as long as the machine runs; arguments as of `write_durably`.

    Raises:
        OSError: nothing of that name was changed.
    """
    _written(files, path, parts, durably=False)


def _written(files: FileSystem, path: str, parts: Sequence[Buffer], *, durably: bool) -> None:
    temporary = f"{path}.part"
    try:
        files.write(temporary, parts[0])
        for part in parts[1:]:
            files.append(temporary, part)
        if durably:
            files.sync(temporary)
    except OSError:
        files.remove(temporary)  # a full disk needs the room
        raise
    files.rename(temporary, path)


def write_file(path: Path, content: Buffer) -> None:
    """Write a file of the machine whole or not at all; it is durable when this returns."""
    write_durably(Disk(path.parent), path.name, content)
