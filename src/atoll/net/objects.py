"""Where objects are kept that outlive the server's disk: a folder, or a store such as S3 that fsspec reaches.

A store holds bytes under names. A name is written once and never changed, its content is small enough for memory, and
whatever a store does wrong is an `OSError` in one sentence. Credentials are the environment's or fsspec's own: an
address holds none.
"""

import errno
import os
import re
import secrets
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from atoll.errors import InvalidArgument, RunError, invalid
from atoll.net.buffers import Buffer
from atoll.net.storage import Disk, write_durably

PART = 2**25
"""Bytes that are brought or fetched at a time."""
WAIT, STALL, TRIES = 10.0, 30.0, 2
"""Seconds to connect to S3, seconds within which it must get on, and how often the library beneath tries."""
PATIENCE = 60.0
"""Seconds that one call to a store may take: for a part, half a megabyte a second."""
VARIABLES = ("AWS_", "BOTO_", "FSSPEC_", "GOOGLE_", "GCSFS_", "AZURE_")
"""What variables begin with that say how a store is reached."""
MORE = ("XDG_CONFIG_HOME", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Others that do."""


class Store(Protocol):
    """Bytes under names of letters, digits, `-`, `.` and `/`. Every method may raise OSError."""

    def put(self, name: str, content: Buffer) -> None:
        """Keep content under a new name, or the same again; it is durable when this returns.

        Raises:
            OSError: it may be there or not.
        """
        ...

    def get(self, name: str, limit: int) -> bytes:
        """What is kept under a name, cut off behind a number of bytes.

        Raises:
            FileNotFoundError: nothing is.
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Remove what is kept under these names, if it is there."""
        ...

    def names(self) -> dict[str, int]:
        """All names, and the bytes under each."""
        ...


def shown(url: str) -> str:
    """An address of a store as it may be told: without options.

    Raises:
        InvalidArgument: it is none, or has a user's name or a password in it; the text never repeats it.
    """
    allowed = "an address such as s3://BUCKET/PREFIX or file:///PATH"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidArgument(f"the object store must be {allowed}; what was given is none.") from None
    if (
        not re.fullmatch(r"[a-z][a-z0-9+]*", parts.scheme)
        or "://" not in url
        or not (parts.netloc + parts.path).strip("/")
    ):
        raise InvalidArgument(f"the object store must be {allowed}; what was given is none.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidArgument(
            f"the object store must be {allowed}, without credentials and options: they belong into the environment "
            "(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) or into fsspec's configuration."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def store(url: str) -> Store:
    """The store at an address.

    Raises:
        InvalidArgument: it is no address of one.
        RunError: a library is missing.
        OSError: it cannot be reached.
    """
    told = shown(url)
    if told.startswith("file://"):
        path = unquote(urlsplit(told).path)
        if not told.startswith("file:///"):
            raise invalid("objects", told, "file:///PATH, with the whole path")
        return Folder(Path(path))
    return Remote(told)


def environment() -> dict[str, str]:
    """Variables that say how a store is reached, for a process that is given few."""
    return {n: v for n, v in os.environ.items() if n.startswith(VARIABLES) or n in MORE}


def probe(tried: Store, where: str) -> None:
    """Write, read and delete something.

    Raises:
        OSError: one of them cannot be done; the text says which.
    """
    name, content = f"probe/{secrets.token_hex(16)}", secrets.token_bytes(1024)
    doing = "written"
    try:
        tried.put(name, content)
        doing = "read"
        if tried.get(name, 2048) != content:
            raise OSError(errno.EIO, f"{where}: what was read is not what was written")
        doing = "deleted"
        tried.delete([name])
    except OSError as error:
        with suppress(OSError):
            tried.delete([name])
        raise OSError(errno.EIO, f"objects cannot be {doing}: {error.strerror or error}") from None


class Folder:
    """A folder, of this machine or of a network's file system: each object is a file, synced before it has its name.

    Args:
        root: the folder.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._disk = root, Disk(root)

    def put(self, name: str, content: Buffer) -> None:
        """Keep content under a new name, or the same again; it is durable when this returns."""
        write_durably(self._disk, name, content)

    def get(self, name: str, limit: int) -> bytes:
        """What is kept under a name, cut off behind a number of bytes."""
        return self._disk.read(name, 0, limit)

    def delete(self, names: Iterable[str]) -> None:
        """Remove what is kept under these names, and folders that are empty then."""
        for name in names:
            self._disk.remove(name)
            for folder in Path(name).parents:
                try:
                    (self._root / folder).rmdir() if folder.name else None
                except OSError:
                    break

    def names(self) -> dict[str, int]:
        """All names, and the bytes under each."""
        found = dict[str, int]()
        for path in self._root.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return found


class Remote:
    """A store that fsspec reaches.

    Args:
        url: of its root.

    Raises:
        RunError: a library is missing.
        OSError: it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._where = url
        scheme = url.partition("://")[0]
        self._flat = scheme in ("s3", "s3a")  # without folders, of which one may be missing
        try:
            import fsspec
        except ImportError:
            raise RunError("object stores need fsspec: pip install 'atoll[objects]'.") from None
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if self._flat:
            options["config_kwargs"] = {
                "connect_timeout": WAIT, "read_timeout": STALL, "retries": {"max_attempts": TRIES, "mode": "standard"},
            }  # fmt: skip
        try:
            with refusals(url):
                self._files: Any = fsspec.filesystem(scheme, **options)
                self._root: str = self._files._strip_protocol(url).rstrip("/")
        except ImportError:
            raise RunError(f"{scheme}:// needs a library: pip install 'atoll[objects]' has that of s3://.") from None

    def put(self, name: str, content: Buffer) -> None:
        """Keep content under a new name, or the same again; it is durable when this returns."""
        try:
            self._called("pipe_file", f"{self._root}/{name}", bytes(content))
        except FileNotFoundError as error:
            raise self._gone(error) from None

    def get(self, name: str, limit: int) -> bytes:
        """What is kept under a name, cut off behind a number of bytes."""
        return bytes(self._called("cat_file", f"{self._root}/{name}", start=0, end=limit)) if limit else b""

    def delete(self, names: Iterable[str]) -> None:
        """Remove what is kept under these names, if it is there."""
        for name in names:
            with suppress(FileNotFoundError):
                self._called("rm_file", f"{self._root}/{name}")

    def names(self) -> dict[str, int]:
        """All names, and the bytes under each."""
        try:
            found: Mapping[str, Mapping[str, Any]] = self._called("find", self._root, detail=True)
        except FileNotFoundError as error:
            if self._flat:
                raise self._gone(error) from None
            return {}
        start = len(self._root) + 1
        return {path[start:]: int(about.get("size") or 0) for path, about in found.items() if len(path) > start}

    def _gone(self, error: FileNotFoundError) -> OSError:
        """That there is no bucket, which is not that there is no object."""
        said = error.filename or error.strerror or error
        return OSError(errno.EIO, f"the object store {self._where}: there is no such bucket or folder ({said})")

    def _called(self, method: str, *words: Any, **options: Any) -> Any:
        """What a method of the library gives, in a thread that is left alone when it takes too long."""
        given, failed = list[Any](), list[Exception]()

        def call() -> None:
            try:
                given.append(getattr(self._files, method)(*words, **options))
            except Exception as error:
                failed.append(error)

        with refusals(self._where):
            thread = Thread(target=call, name=f"objects {method}", daemon=True)
            thread.start()
            thread.join(PATIENCE)
            if failed:
                raise failed[0]
            if not given:
                raise TimeoutError(f"no answer within {PATIENCE:g} seconds")
            return given[0]


@contextmanager
def refusals(where: str) -> Generator[None]:
    """Tell what a store or its library refuses as what a disk does, in a sentence without secrets.

    Raises:
        FileNotFoundError: as it is.
        OSError: anything else.
    """
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # each library has errors of its own
        said = re.sub(r"//\S*@", "//", " ".join(str(error).split()))
        said = re.sub(r"(//[^\s?]*)\?\S*", r"\1", said)[:300] or type(error).__name__  # signatures stand in queries
        raise OSError(errno.EIO, f"the object store {where}: {said}") from None
