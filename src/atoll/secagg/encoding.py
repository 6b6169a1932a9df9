"""Numbers as integers of a ring, so that no sum can wrap.

With n clients, b bits and the range [-1, 1] of what a client says,

    M = floor((2^(b-1) - 1) / n)                 largest integer of a client
    q(v) = clamp(floor(v M + u), -M, M)          u uniform in [0, 1): E q(v) = v M for |v| <= 1
    |sum of any k <= n clients| <= k M <= 2^(b-1) - 1

so the sum, read as a signed integer, is the integers' sum: that is the proof, and `Scale` refuses what has M < 1. What
a client that follows it sends differs from v by less than 1/M. A sum beyond k M shows that somebody did not.

Counts that must be exact travel as digits to the base M + 1, each of which obeys the same bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import invalid
from atoll.secagg.masks import RINGS, Ring
from atoll.secret import Source


@dataclass(frozen=True, slots=True)
class Scale:
    """The grid all clients of a sum share.

    Attributes:
        clients: largest number of clients in a sum.
        bits: of the sum, 8 to 48; up to 32 an element travels in 4 bytes, else in 8.

    Raises:
        InvalidArgument: bits with which a sum of so many clients might wrap.
    """

    clients: int
    bits: int

    def __post_init__(self) -> None:
        if isinstance(self.clients, bool) or not isinstance(self.clients, int) or self.clients < 1:
            raise invalid("clients", self.clients, "an integer above 0")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 8 <= self.bits <= 48:
            raise invalid("bits", self.bits, "an integer from 8 to 48")
        if self.largest < 1:
            least = (self.clients + 1).bit_length() + 1
            raise invalid(
                "bits", self.bits, f"at least {least}, so that no sum of {self.clients} clients can wrap",
                f"Use bits={min(48, max(least + 15, 32))}: the bits above {least} are the precision.",
            )  # fmt: skip

    @property
    def largest(self) -> int:
        """M: the largest absolute integer of a client."""
        return ((1 << (self.bits - 1)) - 1) // self.clients

    @property
    def ring(self) -> int:
        """Bits of the ring: 32 or 64."""
        return 32 if self.bits <= 32 else 64

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Of ring elements."""
        return RINGS[self.ring]

    def digits(self, count: int) -> int:
        """Elements in which a whole number from 0 to `count` travels."""
        places, reach = 1, self.largest + 1
        while reach <= count:
            places, reach = places + 1, reach * (self.largest + 1)
        return places


def encode(values: NDArray[np.float64], scale: Scale, draws: NDArray[Any] | None = None) -> tuple[Ring, Any]:
    """Values as ring elements.

    Args:
        values: [..., n], meant to lie in [-1, 1]; what does not is cut. Finite.
        scale: the grid.
        draws: uniform numbers in [0, 1) of the same shape that round; None: from the secure source.

    Returns:
        Ring elements of the same shape, and how many values were cut, by row [...].
    """
    cut = np.clip(values, -1.0, 1.0)
    saturated = (cut != values).sum(axis=-1)
    u = secure_uniforms(cut.size).reshape(cut.shape) if draws is None else draws
    # Clamped after rounding as well: 1 M + u may round up to the next number of double precision.
    integers = np.clip(np.floor(cut * scale.largest + u), -scale.largest, scale.largest).astype(np.int64)
    return integers.astype(scale.dtype), saturated


def decode(total: Ring, scale: Scale, clients: int) -> NDArray[np.float64]:
    """The sum of a number of clients' values.

    Raises:
        InvalidArgument: a sum that this many clients within the range cannot give.
    """
    integers = signed(total, scale)
    reach = clients * scale.largest
    if bool((np.abs(integers) > reach).any()):
        beyond = int((np.abs(integers) > reach).sum())
        raise invalid(
            "total", f"{beyond} elements beyond {reach}", f"a sum of {clients} clients' integers up to {scale.largest}",
            "At least one client sent numbers outside the range: discard this sum.",
        )  # fmt: skip
    return integers / scale.largest


def signed(total: Ring, scale: Scale) -> NDArray[np.int64]:
    """Ring elements as the signed integers they stand for."""
    return total.view(np.int32 if scale.ring == 32 else np.int64).astype(np.int64)


def encode_counts(counts: NDArray[np.int64], most: int, scale: Scale) -> Ring:
    """Whole numbers [C] from 0 to `most` as digits [C, places], exact in a sum."""
    base = scale.largest + 1
    places: list[NDArray[np.int64]] = []
    left = counts
    for _ in range(scale.digits(most)):
        places.append(left % base)
        left = left // base
    return np.stack(places, axis=1).astype(scale.dtype)


def decode_counts(total: Ring, scale: Scale) -> int:
    """The sum of whole numbers that travelled as digits."""
    places: Sequence[int] = signed(total, scale).tolist()
    return sum(place * (scale.largest + 1) ** i for i, place in enumerate(places))


def secure_uniforms(count: int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) of 24 bits from the secret source: [count]."""
    raw = Source().bytes(4 * count)
    return (np.frombuffer(raw, dtype="<u4") >> 8).astype(np.float32) * np.float32(2.0**-24)
