"""Exact samples of a law on the integers, many at once, by rejection from a table.

The support is cut into bins of 2^b integers. Bin i owns n_i of the table's 2^16 entries, with

    n_i >= A max_{x in bin i} rho(x),    rho(x) = P(x) / P(mode),

and A as large as the table allows. One word of 64 random bits proposes an entry (16 bits) and a place in its bin
(b bits): x with probability n_i 2^-(16 + b). It is accepted with probability A rho(x) / n_i, so that x is drawn with a
probability proportional to rho(x), exactly. The word's other bits begin a uniform number U; bits are added only when
those that are there do not decide: first U is compared with the smallest probability of the bin, which is an integer in
the table; then with the probability in double precision, within its error; then, about once in a million draws, with as
many digits as it takes. Nothing depends on rounding.

Rejection with bits on demand: von Neumann 1951; Knuth & Yao 1976. Cost: about 1.05 words a draw. Time is not constant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from atoll.secret.laws import Floats, Law, context

INDEX_BITS = 16
ENTRIES = 1 << INDEX_BITS
MOST_BINS = 1 << 13
CHUNK = 1 << 15
"""Draws at a time: their buffers stay in a core's cache."""

STRETCH = 8 * CHUNK
"""Draws whose rejected ones are drawn again together."""

Words = Callable[[int], NDArray[np.uint64]]
"""(count) -> uniform words of 64 bits."""


class Room:
    """Memory for the steps of so many draws: what is written again and again stays in the cache."""

    __slots__ = ("drawn", "late", "places")

    def __init__(self, count: int) -> None:
        self.places = np.empty(count, dtype=np.int64)
        self.drawn = np.empty(count, dtype=np.uint64)
        self.late = np.empty(count, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Table:
    """A law, ready to be sampled.

    Attributes:
        law: the law.
        shift: b; a bin has 2^b integers.
        bits: of the uniform number in a word, 64 - 16 - b.
        factor: A.
        owned: n_i, [bins].
        entries: [2^16]: the entry's bin, and in the low `bits` how many values of U are accepted whatever the place.
    """

    law: Law
    shift: int
    bits: int
    factor: float
    owned: Floats
    entries: NDArray[np.uint64]

    def fill(self, out: NDArray[np.int64], words: Words) -> None:
        """Fill a contiguous vector with independent draws."""
        room = Room(min(len(out), CHUNK))
        for begin in range(0, len(out), STRETCH):
            piece = out[begin : begin + STRETCH]
            missing = self._chunks(piece, words, room)
            while len(missing):
                again = np.empty(len(missing), dtype=np.int64)
                left = self._chunks(again, words, room)
                piece[missing] = again
                missing = missing[left]

    def _chunks(self, out: NDArray[np.int64], words: Words, room: "Room") -> NDArray[np.intp]:
        """As `_propose`, chunk by chunk."""
        found = [self._propose(out[at : at + CHUNK], words, room) + at for at in range(0, len(out), CHUNK)]
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _propose(self, out: NDArray[np.int64], words: Words, room: "Room") -> NDArray[np.intp]:
        """Write a proposal for each number of `out`; returns the places of those that are rejected."""
        word, entry = words(len(out)), out.view(np.uint64)
        places, drawn, late = room.places[: len(out)], room.drawn[: len(out)], room.late[: len(out)]
        np.bitwise_and(word, np.uint64(ENTRIES - 1), out=places.view(np.uint64))
        np.take(self.entries, places, out=entry, mode="wrap")
        np.right_shift(word, np.uint64(64 - self.bits), out=drawn)
        sure = np.bitwise_and(entry, np.uint64((1 << self.bits) - 1), out=places.view(np.uint64))
        slow = np.flatnonzero(np.greater_equal(drawn, sure, out=late))
        entry >>= np.uint64(self.bits)
        slow_bins = entry[slow].view(np.int64)
        if self.shift:
            entry <<= np.uint64(self.shift)
            word >>= np.uint64(INDEX_BITS)
            word &= np.uint64((1 << self.shift) - 1)
            entry |= word
        out += self.law.low
        if not len(slow):
            return slow
        return slow[~self._accept(out[slow], self.owned[slow_bins], drawn[slow], words)]

    def _accept(
        self, x: NDArray[np.int64], owned: Floats, drawn: NDArray[np.uint64], words: Words
    ) -> NDArray[np.bool_]:
        probability = self.factor * np.exp(self.law.log(x.astype(np.float64))) / owned * 2.0**self.bits
        margin = 2 * self.law.error + 2.0**-48
        low, high = probability * (1 - margin), probability * (1 + margin)
        position = drawn.astype(np.float64)
        accepted = position + 1 <= low
        for i in np.flatnonzero(~accepted & (position < high)).tolist():
            accepted[i] = self._decide(int(x[i]), int(owned[i]), int(drawn[i]), words)
        return accepted

    def _decide(self, x: int, owned: int, drawn: int, words: Words) -> bool:
        """Whether U, whose first bits are `drawn`, is below A rho(x) / n, with as many bits as it takes."""
        bits = self.bits
        while True:
            drawn, bits = drawn << 64 | int(words(1)[0]), bits + 64
            digits = bits // 3 + 5
            wide = context(digits + 10)
            share = wide.divide(Decimal(self.factor), Decimal(owned))
            edge = wide.multiply(wide.multiply(share, wide.exp(self.law.exact(x, digits))), Decimal(1 << bits))
            error = wide.multiply(edge, wide.power(Decimal(10), 1 - digits))
            if Decimal(drawn + 1) <= wide.subtract(edge, error):
                return True
            if Decimal(drawn) >= wide.add(edge, error):
                return False


def table(law: Law, *, most_bits: int = 64) -> Table:
    """The table for a law; the width of its bins is that which rejects least.

    Args:
        law: what to sample.
        most_bits: of the uniform number in a word; fewer make slow decisions frequent, for tests.
    """
    span = law.high - law.low + 1
    narrowest = max(0, (span - 1).bit_length() - (MOST_BINS - 1).bit_length())
    best: tuple[float, int, float, Floats] | None = None
    for shift in range(narrowest, narrowest + 8):
        factor, owned = _own(law, shift)
        if best is None or factor / 2.0**shift > best[0]:
            best = factor / 2.0**shift, shift, factor, owned
        if len(owned) == 1:
            break
    assert best is not None
    _, shift, factor, owned = best
    bits = min(64 - INDEX_BITS - shift, most_bits)
    first, last, _ = _ends(law, shift)
    least = np.exp(np.minimum(law.log(first), law.log(last))) * (1 - 2 * law.error - 2.0**-48)
    sure = np.minimum(np.floor(factor * least / owned * 2.0**bits), 2.0**bits - 1).astype(np.uint64)
    packed = np.arange(len(owned), dtype=np.uint64) << np.uint64(bits) | sure
    return Table(law, shift, bits, factor, owned, np.repeat(packed, owned.astype(np.int64)))


def _ends(law: Law, shift: int) -> tuple[Floats, Floats, Floats]:
    """First, last and likeliest integer of every bin."""
    count = -(-(law.high - law.low + 1) >> shift)
    first = law.low + np.arange(count, dtype=np.float64) * 2.0**shift
    last = first + (2.0**shift - 1)
    return first, last, np.clip(float(law.mode), first, last)


def _own(law: Law, shift: int) -> tuple[float, Floats]:
    """The largest A, and the entries n_i of every bin, 2^16 in all."""
    likeliest = _ends(law, shift)[2]
    most = np.exp(law.log(likeliest)) * (1 + 2 * law.error + 2.0**-48)

    def entries(factor: float) -> Floats:
        return np.maximum(np.ceil(factor * most), 1.0)

    low, high = 0.0, ENTRIES / float(most.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if entries(middle).sum() <= ENTRIES else (low, middle)
    owned = entries(low)
    # Entries that are left over only make the likeliest bin's proposals more frequent than they need be.
    owned[int(np.argmax(most))] += ENTRIES - owned.sum()
    assert owned.min() >= 1 and math.isclose(owned.sum(), ENTRIES)
    return low, owned
