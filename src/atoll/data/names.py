"""Names of clients, and where a client stands in its population.

A population of a million clients without names of their own is one number, `Numbered`; with names it is one stretch of
text and offsets into it, `PackedNames`. Looking up a cohort costs what the cohort costs, not what the population does.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, repeat
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError, invalid

_DIGITS = 18
"""Digits of the longest number that can be a place: anything longer is a name nobody has."""


class Numbered(Sequence[str]):
    """The names "0" to "n-1" of clients that have none of their own, made when asked for."""

    __slots__ = ("_count",)

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(str(i) for i in range(self._count)[index])
        return str(range(self._count)[index])

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self._count))

    def __contains__(self, value: object) -> bool:
        return self.find(value) is not None

    def find(self, value: object) -> int | None:
        """The place of a name, or None."""
        if isinstance(value, str) and value.isascii() and value.isdigit() and (value == "0" or value[0] != "0"):
            place = int(value) if len(value) <= _DIGITS else self._count
            return place if place < self._count else None
        return None

    def take(self, places: NDArray[np.int64]) -> tuple[str, ...]:
        """The names at places in [0, n), in the order given."""
        return tuple(map(str, places.tolist()))

    def places(self, names: Sequence[str]) -> NDArray[np.int64] | None:
        """The places of several names, int64 [k]; None when one of them is not among these."""
        try:
            numbers = list(map(int, names))
            # int() takes "007", " 7" and 7 for seven; only what is written back the same is a name.
            if list(map(str, numbers)) != list(names):
                return None
            found = np.array(numbers, dtype=np.int64)
        except (TypeError, ValueError, OverflowError):
            return None
        return found if not len(found) or (found.min() >= 0 and found.max() < self._count) else None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Numbered):
            return self._count == other._count
        return _equal(self, other)

    def __hash__(self) -> int:
        return hash(("Numbered", self._count))

    def __repr__(self) -> str:
        return f"Numbered({self._count})"


class PackedNames(Sequence[str]):
    """Names kept as one stretch of UTF-8 text, each made when asked for.

    Args:
        text: uint8 [bytes], the names one after the other.
        offsets: int64 [n + 1], where each begins.

    Raises:
        DataError: when the offsets do not fit the text, or a name is empty.
    """

    __slots__ = ("_offsets", "_text")

    def __init__(self, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        if (
            offsets.ndim != 1
            or not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != len(text)
            or (len(offsets) > 1 and int(np.diff(offsets).min()) < 1)
        ):
            raise DataError(
                "names of clients: the offsets do not cut the text into names, or a name is empty. Give every client "
                "a name; a damaged file must be written again."
            )
        self._text, self._offsets = text, offsets

    @staticmethod
    def of(names: Iterable[str]) -> "PackedNames":
        """Pack names."""
        encoded = [name.encode() for name in names]
        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return PackedNames(
            np.frombuffer(b"".join(encoded), dtype=np.uint8), np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
        )

    @property
    def packed(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The text, uint8 [bytes], and the offsets, int64 [n + 1]."""
        return self._text, self._offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        place = range(len(self))[index]
        return self._text[self._offsets[place] : self._offsets[place + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        text, bounds = self._text.tobytes(), self._offsets.tolist()
        return (text[start:stop].decode() for start, stop in pairwise(bounds))

    def take(self, places: NDArray[np.int64]) -> tuple[str, ...]:
        """The names at places in [0, n), in the order given."""
        view = self._text.data
        bounds = zip(self._offsets[places].tolist(), self._offsets[places + 1].tolist(), strict=True)
        return tuple(str(view[start:stop], "utf-8") for start, stop in bounds)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedNames):
            return np.array_equal(self._offsets, other._offsets) and np.array_equal(self._text, other._text)
        return _equal(self, other)

    def __hash__(self) -> int:
        return hash(("PackedNames", len(self), self._text[:64].tobytes()))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"PackedNames({shown}{', ...' if len(self) > 3 else ''}; {len(self)} names)"


class Population:
    """Clients with names; what every dataset knows of whom it is about.

    Attributes:
        clients: the names, in order; a tuple, or a sequence that makes them when asked for.
    """

    __slots__ = ("_places", "clients")

    clients: Sequence[str]
    _places: dict[str, int] | None

    def __len__(self) -> int:
        return len(self.clients)

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __contains__(self, client: object) -> bool:
        return self._find(client) is not None

    def _find(self, client: object) -> int | None:
        if isinstance(self.clients, Numbered):
            return self.clients.find(client)
        return self._index().get(client) if isinstance(client, str) else None

    def _index(self) -> dict[str, int]:
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self.clients)}
        return self._places

    def index(self, client: str) -> int:
        """The place of a client in [0, clients).

        Raises:
            InvalidArgument: when there is no such client.
        """
        place = self._find(client)
        if place is None:
            shown = ", ".join(repr(name) for name in self.clients[:5]) + (", ..." if len(self) > 5 else "")
            close = difflib.get_close_matches(str(client), self.clients, n=1) if len(self) <= 10_000 else []
            hint = f"Did you mean {close[0]!r}?" if close else ""
            raise invalid("client", client, f"one of the {len(self)} clients ({shown})", hint)
        return place

    def places(self, clients: Sequence[str]) -> NDArray[np.int64]:
        """The places of several clients at once.

        Args:
            clients: names, all different; none is allowed.

        Returns:
            int64 [k], each in [0, clients), in the order given.

        Raises:
            InvalidArgument: when a name is unknown or repeated; the message names it.
        """
        if isinstance(clients, str):
            raise invalid("clients", clients, "a sequence of client names", f"Pass [{clients!r}].")
        if clients is self.clients:
            return np.arange(len(self), dtype=np.int64)
        found = self.clients.places(clients) if isinstance(self.clients, Numbered) else self._looked_up(clients)
        if found is None:
            # The first stranger raises, with the hint of the close name.
            found = np.fromiter((self.index(client) for client in clients), dtype=np.int64, count=len(clients))
        if len(found) > 1:
            order = np.argsort(found, kind="stable")
            same = np.flatnonzero(found[order][1:] == found[order][:-1])
            if len(same):
                twice = clients[int(order[same[0]])]
                raise invalid("clients", clients, f"names that are all different ({twice!r} appears more than once)")
        return found

    def _looked_up(self, clients: Sequence[str]) -> NDArray[np.int64] | None:
        try:
            found = map(self._index().get, clients, repeat(-1))
            places = np.fromiter(found, dtype=np.int64, count=len(clients))
        except TypeError:  # something that is no name at all, such as a list
            return None
        return None if len(places) and int(places.min()) < 0 else places


def named(client: object) -> str:
    """Refuse what cannot be a client's name."""
    if not isinstance(client, str) or not client:
        raise invalid("client", client, "a name: a string that is not empty", "Pass str(name).")
    return client


def some(names: Sequence[str], count: int, *, verb: bool = True) -> str:
    """How messages list clients: the first names and how many more there are."""
    shown = ", ".join(repr(name) for name in names)
    more = f" and {count - len(names)} more" if count > len(names) else ""
    has = (" has" if count == 1 else " have") if verb else ""
    return f"client{'' if count == 1 else 's'} {shown}{more}{has}"


def _equal(names: Sequence[str], other: object) -> Any:
    if isinstance(other, (tuple, list, Numbered, PackedNames)):
        given = cast(Sequence[object], other)
        return len(given) == len(names) and all(a == b for a, b in zip(names, given, strict=True))
    return NotImplemented
