"""A run's files on a disk that may be lost: what must outlive it is in an object store before it has its name here.

A file that was synced is brought to the store when it is given its name (`rename`); the disk is a cache, which nobody
waits for. What the disk has lost, or holds other than it was kept, comes from the store again when it is looked at.

    PATH/NUMBER-SHA256-SIZE/PART-PARTS        names in the store: PATH in hexadecimal digits, so that no name that
                                              somebody outside chose stands there

No name is used a second time: of two with the same path the one with the higher number counts, so that what was sent
long ago and arrives late is never taken for what is there now. Numbers are drawn by life: before a process keeps
anything, it keeps an empty object `life`, whose number is above all that are there. An object is there when all its
parts are, with as many bytes as it must have: a torn one is not. What is read is held to the hash in its name. Names
that are of no use any more go with their path.
"""

import hashlib
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from atoll.net.buffers import Buffer
from atoll.net.objects import PART, Store
from atoll.net.storage import FileSystem, Journal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 2**20
"""Bytes that are read from the disk at a time."""
LARGEST, MOST = 2**40, 2**27
"""Bytes of an object, and of one of its parts."""
TRIES = 3
"""How often an object is fetched that comes damaged."""
WIDTH = 128
"""Digits between two slashes of a name."""
LIFE = 16
"""Binary digits of the numbers that one life has for itself."""

_NAME = re.compile(r"((?:[0-9a-f]{2,128}/){1,32})([0-9a-f]{12})-([0-9a-f]{64})-([0-9]{1,13})/([0-9]{1,5})-([0-9]{1,5})")


class Kept(NamedTuple):
    """An object.

    Attributes:
        number: how many of its path there were before.
        sha256: of its content.
        size: of its content.
        parts: under what names.
    """

    number: int
    sha256: str
    size: int
    parts: tuple[str, ...]


class Mirror:
    """A file system over another one and a store.

    Attributes:
        disk: the other one.
        trouble: what the store said when it refused last; "" since it did not.

    Args:
        disk: see above.
        store: where what is synced is kept.
        part: bytes that are brought at a time.

    Raises:
        OSError: the store does not tell what is there.
    """

    def __init__(self, disk: FileSystem, store: Store, *, part: int = PART) -> None:
        self.disk, self._store, self._part, self.trouble = disk, store, part, ""
        self._kept, self._names = dict[str, Kept](), dict[str, set[str]]()
        self._synced, self._sound = set[str](), set[str]()
        self._number, self._alive = 0, False
        self._look()

    def _look(self) -> None:
        """Learn what is in the store."""
        there = read(self._store.names())
        for path, found in there.items():
            self._names.setdefault(path, set()).update(found.names)
        self._kept = {path: max(found.whole) for path, found in there.items() if found.whole}
        self._sound.clear()
        if not self._alive:
            highest = max((_number(n) for names in self._names.values() for n in names), default=0)
            self._number = ((highest >> LIFE) + 1) << LIFE

    # --- what is kept -------------------------------------------------------------------------------------------------

    def sync(self, path: str) -> None:
        """Have a file's content durable as soon as the file is given its name."""
        self._synced.add(path)

    def sync_folder(self, path: str) -> None:
        """Names are durable already."""

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, under which it is kept if it was synced."""
        if source in self._synced or target in self._kept:
            self._keep(source, target)
        self._synced.discard(source)
        self._sound -= {source, target}  # what the disk has there is another file if it refuses now
        self.disk.rename(source, target)
        if target in self._kept:
            self._sound.add(target)

    def keep(self, path: str, source: str = "") -> None:
        """Have a file that others wrote kept.

        Args:
            path: under this name.
            source: the file; default the one of that name.
        """
        self._keep(source or path, path)
        if not source:
            self._sound.add(path)

    def drop(self, path: str) -> None:
        """Have a file no longer in the store; what the disk has of it stays there."""
        if names := self._names.get(path):
            with self._asking():
                self._store.delete(sorted(names))
            del self._names[path]
        self._kept.pop(path, None)
        self._sound.discard(path)

    @property
    def paths(self) -> list[str]:
        """Of everything that is in the store, whole or not."""
        return sorted(self._names)

    def _keep(self, source: str, target: str) -> None:
        size, digest = self.disk.size(source), hashlib.sha256()
        for part in self._parts(source, size, PIECE):
            digest.update(part)
        with self._asking():
            self._live()
        self._number += 1
        parts = _parts_of(target, self._number, digest.hexdigest(), size, max(1, -(-size // self._part)))
        before, names = self._kept.get(target), self._names.setdefault(target, set())
        names.update(parts)  # wherever it breaks off, they may be there
        with self._asking():
            for part, content in zip(parts, self._parts(source, size, self._part), strict=True):
                self._store.put(part, content)
        self._kept[target] = Kept(self._number, digest.hexdigest(), size, parts)
        if before is not None:
            try:
                self._store.delete(before.parts)
                names.difference_update(before.parts)
            except OSError:  # they go with their path
                pass

    def _live(self) -> None:
        """Take a number above all that were drawn before."""
        if not self._alive:
            (name,) = _parts_of("life", self._number, hashlib.sha256().hexdigest(), 0, 1)
            before = self._names.setdefault("life", set())
            before.add(name)
            self._store.put(name, b"")
            self._alive = True

    def _parts(self, path: str, size: int, length: int) -> Iterator[Buffer]:
        room = memoryview(bytearray(min(size, length)))
        for at in range(0, max(size, 1), length):
            got = self.disk.into(path, at, room[: size - at]) if size else 0
            yield room[:got]

    @contextmanager
    def _asking(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            self.trouble = str(error.strerror or error)
            raise
        self.trouble = ""

    # --- what is read -------------------------------------------------------------------------------------------------

    def read(self, path: str, offset: int = 0, length: int = -1) -> bytes:
        """Some bytes of a file, or all from an offset on."""
        self._here(path)
        return self.disk.read(path, offset, length)

    def into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Read bytes of a file from an offset on into a buffer; how many there were, fewer only at the file's end."""
        self._here(path)
        return self.disk.into(path, offset, buffer)

    def size(self, path: str) -> int:
        """Length of a file in bytes; -1 where there is none, or none that is what it was."""
        try:
            self._here(path)
        except FileNotFoundError:
            return -1
        return self.disk.size(path)

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted; empty where there is none."""
        start = len(folder) + 1
        known = {p[start:].split("/")[0] for p in self._names if p.startswith(f"{folder}/")}
        return sorted({*self.disk.names(folder), *known})

    def _here(self, path: str) -> None:
        """Have on the disk what was kept.

        Raises:
            FileNotFoundError: it is gone from both, or damaged in both.
        """
        if path not in self._kept or path in self._sound:
            return
        kept = self._kept[path]
        if self.disk.size(path) == kept.size:
            digest = hashlib.sha256()
            for part in self._parts(path, kept.size, PIECE):
                digest.update(part)
            if digest.hexdigest() == kept.sha256:
                self._sound.add(path)
                return
        with self._asking():
            for _ in range(TRIES):
                if self._fetched(path, kept):
                    self._sound.add(path)
                    return
            raise FileNotFoundError(
                2, f"{path} is gone from the object store or damaged there, and from the disk", path
            )

    def _fetched(self, path: str, kept: Kept) -> bool:
        temporary, digest, left = f"{path}.part", hashlib.sha256(), kept.size
        self.disk.write(temporary, b"")
        try:
            for part in kept.parts if kept.size else ():
                content = self._store.get(part, min(left, MOST))
                left -= len(content)
                digest.update(content)
                self.disk.append(temporary, content)
        except OSError:
            self.disk.remove(temporary)
            raise
        if left or digest.hexdigest() != kept.sha256:
            self.disk.remove(temporary)
            return False
        self.disk.rename(temporary, path)
        return True

    # --- what is the disk's alone -------------------------------------------------------------------------------------

    def write(self, path: str, content: Buffer) -> None:
        """Make a file with this content, or replace what it holds."""
        self._synced.discard(path)
        self.disk.write(path, content)

    def append(self, path: str, content: Buffer) -> None:
        """Add to the end of a file, which is made if there is none."""
        self._synced.discard(path)
        self.disk.append(path, content)

    def truncate(self, path: str, length: int) -> None:
        """Cut a file to a length in bytes."""
        self._synced.discard(path)
        self.disk.truncate(path, length)

    def remove(self, path: str) -> None:
        """Remove a file from both, or a folder that is empty, if it is there."""
        self.drop(path)
        self._synced.discard(path)
        self.disk.remove(path)

    def matrix(self, rows: int, columns: int, dtype: "torch.dtype") -> "Tensor":
        """A scratch matrix [rows, columns] that need not fit into memory and lasts as long as it is held."""
        return self.disk.matrix(rows, columns, dtype)

    def journal(self, name: str) -> Journal:
        """A journal, which is in the state and not among the files.

        Whoever wrote it before kept files until it let go: what is in the store is looked at again, and numbers are
        drawn, by the one that writes now.
        """
        made = self.disk.journal(name)
        try:
            self._look()
        except BaseException:
            made.close()
            raise
        with suppress(OSError):  # else with the first file
            self._live()
        return made


class Found(NamedTuple):
    """What a store has of a path: objects that are whole, and all names."""

    whole: list[Kept]
    names: list[str]


def read(names: dict[str, int]) -> dict[str, Found]:
    """What a store has, by path; names that are none of ours are left alone.

    Args:
        names: in the store, and the bytes under each.
    """
    parts, found = dict[tuple[str, int, str, int, int], dict[int, tuple[str, int]]](), dict[str, Found]()
    for name, size in names.items():
        path = _path(name)
        match = _NAME.fullmatch(name)
        if path is None or match is None:
            continue
        found.setdefault(path, Found([], [])).names.append(name)
        _, number, sha256, whole, part, count = match.groups()
        parts.setdefault((path, int(number, 16), sha256, int(whole), int(count)), {})[int(part)] = name, size
    for (path, number, sha256, size, count), there in parts.items():
        fits = sorted(there) == list(range(count)) and sum(s for _, s in there.values()) == size <= LARGEST
        if fits:
            found[path].whole.append(Kept(number, sha256, size, tuple(there[i][0] for i in range(count))))
    return found


def _parts_of(path: str, number: int, sha256: str, size: int, count: int) -> tuple[str, ...]:
    digits = path.encode().hex()
    spelled = "".join(f"{digits[i : i + WIDTH]}/" for i in range(0, len(digits), WIDTH))
    return tuple(f"{spelled}{number:012x}-{sha256}-{size}/{i}-{count}" for i in range(count))


def _number(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match.group(2), 16) if match else 0


def _path(name: str) -> str | None:
    match = _NAME.fullmatch(name)
    try:
        path = bytes.fromhex(match.group(1).replace("/", "")).decode() if match else ""
    except (ValueError, UnicodeDecodeError):
        return None
    plain = path and not path.startswith("/") and not {"", ".", ".."} & set(path.split("/")) and "\0" not in path
    return path if plain else None
