"""Masks: ChaCha20 key streams read as elements of a ring, added to a vector block by block.

The ring is that of unsigned integers of 32 or 64 bits, in which numpy's sums wrap by themselves. A mask is uniform over
the whole ring in every place, under a key that is used for nothing else. Memory: one block beside the vector.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import invalid
from atoll.secagg.primitives import stream

BLOCK = 2**16
"""Bytes of a mask that are made at a time: block, mask and zeros stay in the second cache."""
GROUP = 512
"""Streams that are open at a time."""
LONGEST = 2**38
"""Bytes of a ChaCha20 stream, whose counter has 32 bits of 64-byte blocks."""

RINGS: dict[int, "np.dtype[Any]"] = {32: np.dtype("<u4"), 64: np.dtype("<u8")}
"""Bits of a ring, and its elements as they travel."""

Ring = NDArray[Any]
"""A vector of ring elements."""

_ZEROS = bytes(BLOCK)


def add_masks(vector: Ring, keys: Sequence[tuple[bytes, int]]) -> None:
    """Add masks to a vector of ring elements, in place.

    Args:
        vector: [n] of one of the types in `RINGS`.
        keys: 32 bytes of each mask, and 1 to add it or -1 to take it away.
    """
    if vector.dtype not in RINGS.values() or not vector.flags.c_contiguous:
        raise invalid("vector", vector.dtype, "contiguous unsigned integers of 32 or 64 bits")
    if vector.nbytes > LONGEST:
        raise invalid("vector", f"{vector.nbytes} bytes", f"at most {LONGEST} bytes")
    per_block = BLOCK // vector.itemsize
    mask = np.empty(per_block, dtype=vector.dtype)
    raw = memoryview(mask.data).cast("B")
    for first in range(0, len(keys), GROUP):
        streams = [(stream(key), sign) for key, sign in keys[first : first + GROUP]]
        for begin in range(0, len(vector), per_block):
            block = vector[begin : begin + per_block]
            size = block.nbytes
            for encryptor, sign in streams:
                encryptor.update_into(_ZEROS[:size] if size != BLOCK else _ZEROS, raw[:size])
                if sign > 0:
                    block += mask[: len(block)]
                else:
                    block -= mask[: len(block)]
