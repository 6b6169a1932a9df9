"""Rows of a layout stored parameter by parameter: every parameter of a tile is one contiguous block [C, ...].

Batched products write into a contiguous block in one call; into the strided views of a row-major matrix [C, P] they go
row by row, which costs small models more than all their arithmetic.
"""

from math import prod

import torch
from torch import Tensor

from atoll.vectors import Layout

ARENA_BYTES = 128 * 2**10
"""Smaller tensors are left to torch's allocator."""


class Arena:
    """Memory that tiles use one after the other.

    A fresh tensor of some megabytes is a fresh mapping whose every page must first be filled in by the system; on
    models of that size this takes as long as the products. What was taken from an arena is valid until `reset`.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._used: list[Tensor] = []

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, with the dtype and device of another."""
        count = prod(shape)
        if like.device.type != "cpu" or count * like.element_size() < ARENA_BYTES:
            return like.new_empty(shape)
        fits = [t for t in self._free if t.dtype == like.dtype and t.numel() >= count]
        found = min(fits, key=Tensor.numel, default=None)
        if found is None:
            found = like.new_empty(count)
        else:
            self._free = [t for t in self._free if t is not found]
        self._used.append(found)
        return found[:count].view(shape)

    def reset(self) -> None:
        """Take everything back: nothing that came from here may be in use."""
        self._free += self._used
        self._used = []

    def trim(self) -> None:
        """Give back what is too much to be kept from one round to the next."""
        self.reset()
        if sum(t.nbytes for t in self._free) > ARENA_KEPT:
            self._free = []


ARENA_KEPT = 256 * 2**20
"""An arena of more than this is given back after a round."""

Members = slice | Tensor
"""Rows of a tile: a slice where they follow each other (their blocks are views), else their numbers, int64 [k]."""


class Blocks:
    """The parameters of C rows.

    Attributes:
        layout: names and shapes.
        parts: one contiguous tensor [C, ...] for each parameter, in the layout's order.
    """

    __slots__ = ("_arena", "layout", "parts")

    def __init__(self, layout: Layout, parts: list[Tensor], arena: Arena | None = None) -> None:
        self.layout = layout
        self.parts = parts
        self._arena = arena or Arena()

    @classmethod
    def zeros(cls, layout: Layout, count: int, like: Tensor) -> "Blocks":
        """Blocks of zeros."""
        return cls(layout, [like.new_zeros(count, *shape) for _, shape, _, _ in layout])

    @classmethod
    def of(cls, layout: Layout, rows: Tensor, arena: Arena | None = None) -> "Blocks":
        """A copy of rows [C, P]."""
        arena = arena or Arena()
        # A single row is stored parameter by parameter already.
        flat = arena.empty(1, layout.size, like=rows) if len(rows) == 1 else None
        made = (
            _views(layout, flat)
            if flat is not None
            else [arena.empty(len(rows), *shape, like=rows) for _, shape, _, _ in layout]
        )
        for part, view in zip(made, _views(layout, rows.detach()), strict=True):
            part.copy_(view)
        return cls(layout, made, arena)

    @classmethod
    def shown(cls, layout: Layout, rows: Tensor) -> "Blocks":
        """Rows [C, P] or a vector [P], to be read: views, with one row that stands for all where there is a vector."""
        return cls(layout, list(layout.view(rows.detach()[None] if rows.ndim == 1 else rows.detach()).values()))

    @classmethod
    def held(cls, layout: Layout, rows: Tensor, arena: Arena | None = None) -> "Blocks":
        """Rows [C, P] or a vector [P], to be read many times: contiguous, and one row stands for all of a vector."""
        return cls.shown(layout, rows) if rows.ndim == 1 else cls.of(layout, rows, arena)

    def __len__(self) -> int:
        return len(self.parts[0])

    def take(self, members: Members) -> list[Tensor]:
        """The blocks of some rows: views for a slice, copies otherwise; a block of one row stands for all."""
        return [p if len(p) == 1 else p[members] for p in self.parts]

    def put(self, members: Tensor, parts: list[Tensor]) -> None:
        """Write copies back."""
        for own, part in zip(self.parts, parts, strict=True):
            own[members] = part

    def rows(self, into: Tensor | None = None) -> Tensor:
        """Rows [C, P], written to `into`; a single row without a copy where its blocks are one piece of memory."""
        first = self.parts[0]
        if into is None and len(first) == 1 and self._whole():
            return first.as_strided((1, self.layout.size), (self.layout.size, 1))
        rows = self._arena.empty(len(first), self.layout.size, like=first) if into is None else into
        for part, view in zip(self.parts, _views(self.layout, rows), strict=True):
            view.copy_(part)
        return rows

    def minus(self, start: Tensor, into: Tensor | None = None) -> Tensor:
        """Rows [C, P] less `start` [C, P], in one pass, written to `into`."""
        rows = self._arena.empty(len(self), self.layout.size, like=start) if into is None else into
        for part, view, begun in zip(
            self.parts, _views(self.layout, rows), _views(self.layout, start.detach()), strict=True
        ):
            torch.sub(part, begun, out=view)
        return rows

    def _whole(self) -> bool:
        """Whether the blocks of a single row lie one after the other in one storage."""
        base, size = self.parts[0], self.parts[0].element_size()
        return all(
            part.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
            and part.data_ptr() == base.data_ptr() + begin * size
            for part, (_, _, begin, _) in zip(self.parts, self.layout, strict=True)
        )


def _views(layout: Layout, rows: Tensor) -> list[Tensor]:
    """Each parameter of rows [C, P] as a view [C, ...]."""
    return list(layout.view(rows).values())
