"""Files that are part of the package."""

import gzip
import io
from importlib.resources import files

from atoll.data.frames import Frame, pandas


def read_bundled(name: str) -> Frame:
    """Read a CSV file of the package, plain or gzipped."""
    content = files("atoll.data.catalog").joinpath("files", name).read_bytes()
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    return pandas().read_csv(io.BytesIO(content))
