"""What a server keeps in an object store: of each run what it needs to go on on another machine, and its result.

    FINGERPRINT/RUN/...      a run's objects (`mirror`): the fingerprint is that of the server's key, RUN the hash of
                             the run's name

Of a run that is over nothing but `ENDURING` stays. Whether a server's objects are anywhere, and where, is a document of
its state, so that no server goes on beside them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import RunError
from atoll.net.buffers import Buffer
from atoll.net.mirror import Mirror
from atoll.net.objects import environment, probe, shown, store
from atoll.net.storage import Disk, write_durably

if TYPE_CHECKING:
    from atoll.net.state import State

RECORD = "journal.sqlite"
"""The file of the run as it is looked at."""
RESULT = ("result.json", "result.safetensors")
"""Files of its result."""
ENDURING = ("objects/", RECORD, *RESULT)
"""What paths begin with that stay when a run is over: the app file, the record and the result."""


class Shelves:
    """A server's objects.

    Attributes:
        shown: its address.
        environment: variables that say how it is reached.

    Args:
        url: of the store.
        fingerprint: of the server's key.
    """

    def __init__(self, url: str, fingerprint: str) -> None:
        self.shown, self._fingerprint = shown(url), fingerprint
        self.environment = environment()

    def url(self, run: str) -> str:
        """The address of a run's objects."""
        return f"{self.shown}/{self._fingerprint}/{hashlib.sha256(run.encode()).hexdigest()[:32]}"

    def probe(self) -> None:
        """Look whether the store can be written, read and deleted from.

        Raises:
            RunError: it cannot; the text says which.
        """
        try:
            probe(store(f"{self.shown}/{self._fingerprint}"), self.shown)
        except OSError as error:
            raise RunError(
                f"{error.strerror or error}. Mend that, or name another store with --objects (ATOLL_OBJECTS)."
            ) from None

    def begin(self, run: str, folder: Path, path: str, content: Buffer) -> None:
        """Keep a run's first file, in a place where there is nothing of another run of its name that never began.

        Raises:
            OSError: it cannot be kept.
        """
        self.sweep(run, ())
        write_durably(Mirror(Disk(folder), store(self.url(run))), path, content)

    def sweep(self, run: str, enduring: Sequence[str] = ENDURING) -> None:
        """Remove what is kept of a run.

        Args:
            run: its name.
            enduring: what paths begin with that stay.

        Raises:
            OSError: it cannot be removed.
        """
        there = store(self.url(run))
        kept = Mirror(Disk(Path()), there)
        for path in kept.paths:
            if not path.startswith(tuple(enduring)):
                kept.drop(path)

    def settle(self, run: str, folder: Path) -> None:
        """Of a run that is over, have nothing but what stays in the store, and that in its folder.

        Raises:
            RunError, OSError: not all could be done.
        """
        self.sweep(run)
        self.restore(run, folder)

    def restore(self, run: str, folder: Path) -> None:
        """Have the folder of a run that is over as it was, where the disk has lost it.

        Raises:
            RunError, OSError: it cannot be.
        """
        if (folder / RECORD).exists() and all((folder / name).exists() for name in RESULT):
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = Mirror(Disk(folder), store(self.url(run)))
        for path in kept.paths:
            if not path.startswith(ENDURING) or (folder / path).exists():
                continue
            if path == RECORD:  # whose log would be taken for that of the file which comes
                for ending in ("-wal", "-shm"):
                    (folder / f"{RECORD}{ending}").unlink(missing_ok=True)
            if kept.size(path) < 0:
                raise RunError(f"{path} of the run {run} is gone from {self.shown}, or damaged there.")


def settled(shelves: Shelves | None, state: "State") -> None:
    """Note where a server's objects are, once they can be kept there.

    Args:
        shelves: where they are to be; None: in the server's folder alone.
        state: of the server.

    Raises:
        RunError: they are elsewhere, and a run is at work; or the store cannot be used.
        OSError: the state cannot be used.
    """
    noted = state.documents("place").get("objects", b"").decode()
    place = "" if shelves is None else shelves.shown
    over = state.documents("charter").keys() <= state.documents("final").keys()
    if place != noted and not over:
        there = f"in {noted}: name it with --objects (or ATOLL_OBJECTS)" if noted else "in the server's folder alone"
        raise RunError(f"a run is at work whose objects are {there}. They can be elsewhere when no run is at work.")
    if shelves is not None:
        shelves.probe()
    if place != noted:
        state.put("place", "objects", place.encode())
