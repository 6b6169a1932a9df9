"""Files and logs that survive a crash, on a file system that is handed in, so that its faults can be simulated.

What is durable, and when: the content of a file after `sync(path)`; its name after `sync_folder` of its folder. Until
then a crash may leave all, some or none of it.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from atoll.errors import RunError

if TYPE_CHECKING:  # a server's own process keeps files, and has no tensors
    import torch
    from torch import Tensor


class FileSystem(Protocol):
    """What is asked of a file system; paths are relative, with forward slashes. Every method may raise OSError."""

    def write(self, path: str, content: bytes) -> None:
        """Make a file with this content, or replace what it holds."""
        ...

    def append(self, path: str, content: bytes) -> None:
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


class Disk:
    """A folder of the machine.

    Args:
        root: the folder; made if there is none.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for folder in made:
            self._sync(folder.parent)

    def write(self, path: str, content: bytes) -> None:
        """Make a file with this content, or replace what it holds."""
        self._at(path).write_bytes(content)

    def append(self, path: str, content: bytes) -> None:
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

    def _at(self, path: str) -> Path:
        full = self._root / path
        full.parent.mkdir(parents=True, exist_ok=True)
        return full

    def _sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_durably(files: FileSystem, path: str, content: bytes) -> None:
    """Write a file whole or not at all; it is durable when this returns.

    Raises:
        OSError: nothing of that name was changed.
    """
    temporary = f"{path}.part"
    try:
        files.write(temporary, content)
        files.sync(temporary)
    except OSError:
        files.remove(temporary)  # a full disk needs the room
        raise
    files.rename(temporary, path)
    files.sync_folder(path.rpartition("/")[0])


def write_file(path: Path, content: bytes) -> None:
    """Write a file of the machine whole or not at all; it is durable when this returns."""
    write_durably(Disk(path.parent), path.name, content)


MARK = b"rec\n"
HEAD = 4 + 4 + 32 + 32
"""Bytes before each record: a mark, its length, the hash of everything before it, the hash of everything up to its end.
"""


class Log:
    """Append-only records in a file, each with the hash of all records before it and its own.

    A record in the middle that was changed or taken out is noticed. What stands behind the last whole record is taken
    for one that a crash tore, and left out (`torn` bytes): a last record that was damaged later cannot be told from it,
    and one that was cut off whole leaves no trace here.

    Attributes:
        torn: bytes behind the last whole record when the log was opened.

    Args:
        files: where.
        path: the file.

    Raises:
        RunError: a record that is not the last one is damaged.
    """

    def __init__(self, files: FileSystem, path: str) -> None:
        self._files, self._path = files, path
        self._chain, self._end, self._count = bytes(32), 0, 0
        content = files.read(path) if files.size(path) >= 0 else b""
        while (found := _record(content, self._end)) is not None and found[0] == self._chain:
            _, self._chain, record = found
            self._end += HEAD + len(record)
            self._count += 1
        # Only the record at work when the machine stopped can be torn: nothing that depends on it was released, and
        # nothing stands behind it.
        later = content.find(MARK, self._end)
        while later >= 0:
            if _record(content, later) is not None:
                raise RunError(
                    f"{path} is damaged at byte {self._end}: its records no longer fit together. Restore the folder "
                    "from a backup; nothing after that byte can be trusted."
                )
            later = content.find(MARK, later + 1)
        self.torn = len(content) - self._end
        self._torn = self.torn > 0

    def __iter__(self) -> Iterator[bytes]:
        """All records, read from the file anew."""
        content, at = self._files.read(self._path, 0, self._end) if self._end else b"", 0
        while at < self._end:
            found = _record(content, at)
            assert found is not None, "the file was changed under its log"
            yield found[2]
            at += HEAD + len(found[2])

    def __len__(self) -> int:
        return self._count

    @property
    def head(self) -> str:
        """Hash of all records, in hexadecimal digits."""
        return self._chain.hex()

    def append(self, record: bytes) -> None:
        """Add a record; it is durable when this returns.

        Raises:
            OSError: the record is not in the log.
        """
        chain = _chained(self._chain, record)
        head = MARK + len(record).to_bytes(4, "little") + self._chain + chain
        if self._torn:
            size = self._files.size(self._path)  # -1: the first append made no file
            if size > self._end:
                self._files.truncate(self._path, self._end)
            if size >= 0:
                self._files.sync(self._path)
            self._torn = False
        first = not self._end
        self._torn = True
        self._files.append(self._path, head + record)
        self._files.sync(self._path)
        if first:
            self._files.sync_folder(self._path.rpartition("/")[0])
        self._torn = False
        self._chain, self._end, self._count = chain, self._end + HEAD + len(record), self._count + 1


def _chained(chain: bytes, record: bytes) -> bytes:
    return hashlib.sha256(chain + record).digest()


def _record(content: bytes, at: int) -> tuple[bytes, bytes, bytes] | None:
    """The record at a place, by its own word whole: the hash before it, the hash up to its end, and what it says."""
    head = content[at : at + HEAD]
    size = int.from_bytes(head[4:8], "little")
    if len(head) < HEAD or head[:4] != MARK or at + HEAD + size > len(content):
        return None
    before, chain, record = head[8:40], head[40:72], content[at + HEAD : at + HEAD + size]
    return (before, chain, record) if _chained(before, record) == chain else None
