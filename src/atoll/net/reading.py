"""Updates as they are read: once, in order and a block of coordinates at a time where that is possible.

What is read is hashed and judged or combined in the same pass, in memory that is used again, so that a model costs
neither a copy of itself nor a second reading.
"""

import errno
import hashlib
from dataclasses import replace
from itertools import accumulate

from torch import Tensor

from atoll.messages import Report
from atoll.net.control import Deliver
from atoll.net.frames import Limits, Place, Schema, locate, tensor
from atoll.net.packing import clear, report_of
from atoll.net.storage import Content
from atoll.rounds import Process

BLOCK = 2**18
"""Coordinates that are taken at a time: in double precision they stay in a processor's cache."""
PIECE = 2**20
"""Bytes that are read at a time where nothing but their hash is asked for."""


class Reading:
    """An update's frame, read once and in order, and checked on the way.

    Attributes:
        claim: its message.
        small: its weight and its sums, once it is located.

    Args:
        content: the frame.
        claim: see above.
        schema: of the frame.
        limits: of the frame.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, content: Content, claim: Deliver, schema: Schema, limits: Limits) -> None:
        self.claim, self._content = claim, content
        self._digest, self._read = hashlib.sha256(), 0
        self._room = memoryview(bytearray(0))
        self._start = self._taken(0, min(8, content.size))
        length = int.from_bytes(self._start, "little") if len(self._start) == 8 else 0
        if length <= limits.header and content.size > 8:
            self._start = bytes(self._start) + bytes(self._taken(8, min(8 + length, content.size)))
        self._limits, self._schema = limits, schema
        self._places: dict[str, Place] = {}
        self.small: dict[str, Tensor] = {}

    def locate(self) -> None:
        """Find the tensors, and read those that are no codes.

        Raises:
            FrameError: it is no such frame; `genuine` tells all the same whether it is the one that was announced.
            OSError: it cannot be read.
        """
        self._places = locate(bytes(self._start), self._content.size, self._schema, self._limits)
        for name, place in sorted(self._places.items(), key=lambda item: item[1].begin):
            if name in ("weight", "metrics"):
                self.small[name] = tensor(self._taken(place.begin, place.end), place.dtype).view(place.shape)

    def genuine(self) -> bool:
        """Whether it is what its message announced.

        Raises:
            OSError: it cannot be read.
        """
        if self._content.size != self.claim.size:
            return False
        while self._read < self._content.size:
            end = min(self._read + PIECE, self._content.size)
            self._taken(self._read, end, self._at_hand(end - self._read))
        return self._digest.hexdigest() == self.claim.sha256

    def report(self, process: Process) -> Report:
        """The whole report."""
        content = self._content.whole()
        if self._read < len(content):
            self._digest.update(content[self._read :])
            self._read = len(content)
        tensors = {
            n: tensor(content[p.begin : p.end], p.dtype, copy=False).view(p.shape) for n, p in self._places.items()
        }
        return report_of(process, self.claim, tensors)

    def columns(self, process: Process, a: int, b: int, room: memoryview | None = None) -> Report:
        """The report as if the row had only the columns from a to b.

        Args:
            process: whose.
            a: the first.
            b: behind the last.
            room: memory for them; default the reading's own, which the next columns are read into.

        Raises:
            FrameError: they are no such columns.
            OSError: they cannot be read.
        """
        place, claim = self._places["wire"], self.claim
        begin, end = (place.begin + i * place.dtype.itemsize for i in (a, b))
        room = self._at_hand(end - begin) if room is None else room
        row = tensor(self._taken(begin, end, room), place.dtype, copy=False)[None]
        ends = list(accumulate(claim.parts))
        first, second, third = (
            max(0, min(b, end) - max(a, end - length)) for end, length in zip(ends, claim.parts, strict=True)
        )
        report = report_of(process, claim, {"wire": row, **self.small})
        wire = clear(row, first) if process.adds_rows else row
        return replace(report, wire=wire, parts=(first, second, third))

    def _taken(self, begin: int, end: int, room: memoryview | None = None) -> memoryview:
        part = self._content.part(begin, end, room)
        if len(part) != end - begin:
            raise OSError(errno.EIO, "a file has become shorter while it was read")
        if begin <= self._read < end:
            self._digest.update(part[self._read - begin :])
            self._read = end
        return part

    def _at_hand(self, length: int) -> memoryview:
        """Memory that is used again and again."""
        if len(self._room) < length:
            self._room = memoryview(bytearray(length))
        return self._room


def in_columns(process: Process) -> bool:
    """Whether every coordinate of what travels is a coordinate of the row, and counts or not for itself."""
    chain, size = process.chain, (process.length, process.split)
    undone = any(s.decode_each is not None or s.decode_sum is not None or s.gives == "codes" for s in chain.stages)
    undone |= chain.judges  # a row is judged as a whole
    return not chain.channel.sums_only and not undone and set(chain.sizes(*size)) == {size}
