"""MNIST from a folder or, once, from its mirror; read with every check the format allows."""

import gzip
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.catalog.dealing import dealt
from atoll.data.catalog.fetching import locate
from atoll.data.dataset import FederatedDataset
from atoll.data.packed import Split
from atoll.errors import DataError

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"

CHECKSUMS: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte.gz": "db8f937d487057fb14a9f0fbe97f0bc8d311ab41b750d41e1ff37c43b9e55e19",
        "train-labels-idx1-ubyte.gz": "51fc562b6747b666fbf6e84ce29d43c3cb5f9c388c664d43b33f02095313405a",
        "t10k-images-idx3-ubyte.gz": "cfeddb84311ecf044fc6a5b0f6ee8a24d265d4e83e388400186eb114082f4209",
        "t10k-labels-idx1-ubyte.gz": "e41c74e484045d39b462a7790a4af51301bd9b0b24f0154798d713ec68c45920",
    }
)

_UNSIGNED_BYTE = 8


def mnist(
    clients: int = 100,
    *,
    partition: str = "iid",
    test: float | None = None,
    validation: float | None = None,
    seed: int = 0,
    stratify: bool = False,
    flat: bool = False,
    **options: Any,
) -> FederatedDataset:
    """MNIST's 60,000 training images dealt out to clients; the official 10,000 test images are the holdout.

    The files are looked for in the folder that the environment variable ATOLL_DATA names (and its subfolder
    "mnist"), then in the user's cache; else they are downloaded there once (11.6 MB).

    Args:
        clients: how many clients.
        partition: "iid", "dirichlet", "shards", "quantity" or "by_label".
        test: fraction of each client's images for a test of its own, or None.
        validation: fraction of each client's images for validation, or None.
        seed: of the partition and the cut.
        stratify: whether the cut keeps each client's label shares.
        flat: x is [n, 784] rather than [n, 1, 28, 28].
        options: arguments of the partitioner, such as alpha= or per_client=.

    Returns:
        The dataset: x float32 in [0, 1], y int64 [n].

    Raises:
        DataError: when the files are neither at hand nor to be had, or are not MNIST's.

    Source: LeCun, Cortes and Burges; the partition of McMahan et al. 2017 is partition="shards", clients=100.
    """
    found = locate("mnist", CHECKSUMS, URL, twin="Fashion-MNIST")
    images, labels, held, held_labels = (decode_idx(found[name], name) for name in CHECKSUMS)
    data = dealt(
        partition,
        {"x": _shaped(images, flat), "y": torch.as_tensor(labels.astype(np.int64))},
        clients,
        options=options,
        seed=seed,
        test=test,
        validation=validation,
        stratify=stratify,
        name="mnist",
    )
    # Bytes are dealt out and then scaled split by split: a quarter of the memory of dealing out floats.
    return FederatedDataset(
        data.clients,
        _scaled(data.train),
        validation=None if data.validation is None else _scaled(data.validation),
        test=None if data.test is None else _scaled(data.test),
        holdout={
            "x": _shaped(held, flat).to(torch.float32).div_(255.0),
            "y": torch.as_tensor(held_labels.astype(np.int64)),
        },
        name="mnist",
    )


def _shaped(images: NDArray[np.uint8], flat: bool) -> Tensor:
    pixels = torch.as_tensor(images)
    return pixels.reshape(len(pixels), -1) if flat else pixels.unsqueeze(1)


def _scaled(split: Split) -> Split:
    return Split({**split.fields, "x": split.fields["x"].to(torch.float32).div_(255.0)}, split.offsets)


def decode_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """Decode a gzipped idx file of unsigned bytes.

    Args:
        content: the file's bytes.
        name: the file, for the messages.

    Returns:
        uint8 array of the shape the header states.

    Raises:
        DataError: when the compression, the header or the length is wrong.

    Source: the idx format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as
    a big-endian 32-bit integer, then the values in row-major order.
    """
    try:
        body = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a whole gzip file: {error}. Fetch it again.") from error
    if len(body) < 4 or body[0] != 0 or body[1] != 0 or body[2] != _UNSIGNED_BYTE:
        raise DataError(f"{name} is not an idx file of unsigned bytes: it begins with {body[:4].hex() or 'nothing'}.")
    dimensions = body[3]
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(body) < start:
        raise DataError(f"{name}: the idx header is cut short. Fetch the file again.")
    shape = tuple(int(size) for size in np.frombuffer(body, dtype=">u4", count=dimensions, offset=4))
    expected = int(np.prod(shape, dtype=np.int64))
    if len(body) - start != expected:
        raise DataError(
            f"{name}: the header states {' x '.join(map(str, shape))} = {expected} bytes, the file holds "
            f"{len(body) - start}. Fetch it again."
        )
    return np.frombuffer(body, dtype=np.uint8, offset=start).reshape(shape).copy()
