"""What files looked like when a dataset first saw them, so that a change under a run is found out."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import DataError


@dataclass(frozen=True, slots=True)
class Seen:
    """A file as it was.

    Attributes:
        path: where.
        size: bytes.
        modified: time of the last change, nanoseconds since 1970.
        inode: which file of its disk it is; another after the file was replaced.
    """

    path: Path
    size: int
    modified: int
    inode: int

    @staticmethod
    def of(path: Path) -> "Seen":
        """Look at a file.

        Raises:
            DataError: when there is no such file.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(
                f"No file {str(path)!r} (looked in {str(path.resolve().parent)!r}): {error.strerror}. Check the path."
            ) from error
        return Seen(path, found.st_size, found.st_mtime_ns, found.st_ino)

    def check(self) -> None:
        """Refuse a file that is not as it was.

        Raises:
            DataError: naming the file, what changed and the way out.
        """
        remedy = (
            "A run must see the same data in every round: put the file back as it was and resume, or read the data "
            "again and begin a new run."
        )
        try:
            found = self.path.stat()
        except OSError as error:
            raise DataError(
                f"{str(self.path)!r} is gone while its data are in use ({error.strerror}). {remedy}"
            ) from error
        changes: list[str] = []
        if found.st_size != self.size:
            changes.append(f"its size from {self.size} to {found.st_size} bytes")
        if found.st_ino != self.inode:
            changes.append("it was replaced by another file")
        elif found.st_mtime_ns != self.modified:
            changes.append("it was written to")
        if changes:
            raise DataError(f"{str(self.path)!r} changed while its data are in use: {', '.join(changes)}. {remedy}")


def check_files(files: Iterable[Seen]) -> None:
    """Refuse files of which one is not as it was; about two microseconds each."""
    for seen in files:
        seen.check()
