"""Files of data sets that do not come with Atoll: from a folder, from the user's cache, or downloaded into it once."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from atoll.data.frames import need
from atoll.errors import DataError


def locate(
    name: str, checksums: Mapping[str, str], url: str | None = None, *, twin: str = "", source: str = ""
) -> dict[str, bytes]:
    """The contents of a data set's files.

    They are looked for in the folder that the environment variable ATOLL_DATA names and its subfolder of the data set's
    name; then in the user's cache, where they are downloaded to if there is an address.

    Args:
        name: of the data set.
        checksums: SHA-256 of each file, hex.
        url: where the files are, with a final slash; None: nowhere they can be fetched from.
        twin: another data set whose files have the same names.
        source: where a person finds the files, if they cannot be fetched.

    Returns:
        The bytes of each file, checked.

    Raises:
        DataError: when a file has another checksum, is not at hand, or cannot be downloaded.
    """
    folder = os.environ.get("ATOLL_DATA")
    if folder:
        for place in (Path(folder) / name, Path(folder)):
            if all((place / file).is_file() for file in checksums):
                return {file: _checked(name, place / file, digest, twin) for file, digest in checksums.items()}
    looked = f"ATOLL_DATA={folder} does not hold all of it" if folder else "ATOLL_DATA is not set"
    if url is None:
        raise DataError(
            f"{name}: {', '.join(checksums)} is not at hand ({looked}). Get it from {source}, put it in a folder and "
            "set ATOLL_DATA to that."
        )
    return _downloaded(name, checksums, url, looked, twin)


def _checked(name: str, path: Path, digest: str, twin: str) -> bytes:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        other = f"another data set under the same name ({twin})" if twin else "another edition"
        raise DataError(
            f"{str(path)!r} is not the canonical file of {name}: SHA-256 {found[:16]}..., expected {digest[:16]}.... "
            f"It may be damaged, compressed again, or {other}. Replace it, or unset ATOLL_DATA to have it fetched, "
            "where that is possible."
        )
    return content


def _downloaded(name: str, checksums: Mapping[str, str], url: str, looked: str, twin: str) -> dict[str, bytes]:
    pooch = need("pooch", "pooch", f"Downloading {name}", extra="datasets")
    cache = Path(pooch.os_cache("atoll")) / name
    store = pooch.create(
        path=cache, base_url=url, registry={file: f"sha256:{digest}" for file, digest in checksums.items()}
    )
    out: dict[str, bytes] = {}
    for file, digest in checksums.items():
        try:
            out[file] = _checked(name, Path(store.fetch(file)), digest, twin)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{name}: {file} is not at hand ({looked}, nothing in {str(cache)!r}) and cannot be downloaded from "
                f"{url}{file}: {error}. Connect to the network, or put the files {', '.join(checksums)} in a folder "
                "and set ATOLL_DATA to it."
            ) from error
    return out
