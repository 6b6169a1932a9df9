"""Rows of a layout stored parameter by parameter: every parameter of a tile is one contiguous block [C, ...].

Batched products write into a contiguous block in one call; into the strided views of a row-major matrix [C, P] they go
row by row, which costs small models more than all their arithmetic. A weight may also stand as factors.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from atoll.engines.arena import Arena
from atoll.engines.factors import Factors
from atoll.engines.schedule import Members
from atoll.vectors import Layout

Part = Tensor | Factors
"""A parameter of some rows: its numbers [C, ...], or the factors of a weight."""

NOTHING: Mapping[int, int] = MappingProxyType({})


class Blocks:
    """The parameters of C rows.

    Attributes:
        layout: names and shapes.
        parts: one contiguous tensor [C, ...] for each parameter, in the layout's order, or the factors of a weight.
    """

    __slots__ = ("_arena", "layout", "parts")

    def __init__(self, layout: Layout, parts: Sequence[Part], arena: Arena | None = None) -> None:
        self.layout = layout
        self.parts = list(parts)
        self._arena = arena or Arena()

    @classmethod
    def zeros(cls, layout: Layout, count: int, like: Tensor) -> "Blocks":
        """Blocks of zeros."""
        return cls(layout, [like.new_zeros(count, *shape) for _, shape, _, _ in layout])

    @classmethod
    def of(
        cls, layout: Layout, rows: Tensor, arena: Arena | None = None, factored: Mapping[int, int] = NOTHING
    ) -> "Blocks":
        """A copy of rows [C, P].

        Args:
            layout: of the rows.
            rows: [C, P].
            arena: memory for the blocks.
            factored: weights that stand as factors, with room for so many places; the rows must then all be one vector.
        """
        arena = arena or Arena()
        views = layout.view(rows.detach()).values()
        # A single row is stored parameter by parameter already.
        flat = arena.empty(1, layout.size, like=rows) if len(rows) == 1 and not factored else None
        made: list[Part] = []
        for number, (view, (_, _, begin, end)) in enumerate(zip(views, layout, strict=True)):
            if number in factored:
                made.append(Factors(view[0], len(rows), factored[number], arena))
                continue
            part = arena.empty(*view.shape, like=rows) if flat is None else flat[:, begin:end].view(view.shape)
            made.append(part.copy_(view))
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

    @property
    def like(self) -> Tensor:
        """A tensor of their dtype, on their device."""
        first = self.parts[0]
        return first if isinstance(first, Tensor) else first.base

    def tensors(self, members: Members | None = None) -> list[Tensor]:
        """The parts of some rows, or of all, of blocks none of whose weights stand as factors."""
        return cast("list[Tensor]", self.parts if members is None else self.take(members))

    def take(self, members: Members) -> list[Part]:
        """The blocks of some rows: views for a slice, copies otherwise; a block of one row stands for all."""
        return [p.take(members) if isinstance(p, Factors) else p if len(p) == 1 else p[members] for p in self.parts]

    def put(self, members: Tensor, parts: Sequence[Part]) -> None:
        """Write copies back."""
        for own, part in zip(self.parts, parts, strict=True):
            if isinstance(own, Tensor) and isinstance(part, Tensor):
                own[members] = part

    def rows(self, into: Tensor | None = None) -> Tensor:
        """Rows [C, P], written to `into`; a single row without a copy where its blocks are one piece of memory."""
        first = self.parts[0]
        if into is None and len(first) == 1 and self._whole():
            return cast(Tensor, first).as_strided((1, self.layout.size), (self.layout.size, 1))
        rows = self._room(into)
        for part, view in zip(self.parts, _views(self.layout, rows), strict=True):
            if isinstance(part, Factors):
                part.changed(view)
                view.add_(part.base)
            else:
                view.copy_(part)
        return rows

    def minus(self, start: Tensor, into: Tensor | None = None) -> Tensor:
        """Rows [C, P] less `start` [C, P], in one pass, written to `into`."""
        rows = self._room(into)
        begun = _views(self.layout, start.detach())
        for part, view, before in zip(self.parts, _views(self.layout, rows), begun, strict=True):
            if isinstance(part, Tensor):
                torch.sub(part, before, out=view)
                continue
            part.changed(view)
            if not _same(part.base, before):
                view.add_(part.base - before)
        return rows

    def total(self, start: Tensor, weight: Tensor, into: Tensor) -> None:
        """Add the sum of the rows less `start` [C, P], weighted by weight [C], to `into` [P]."""
        begun = _views(self.layout, start.detach())
        wide = max((p.numel() for p in self.parts if isinstance(p, Tensor)), default=0)
        scratch = self._arena.empty(wide, like=into)
        for part, before, (_, _, a, b) in zip(self.parts, begun, self.layout, strict=True):
            own = into[a:b]
            if isinstance(part, Tensor):
                change = torch.sub(part, before, out=scratch[: part.numel()].view(part.shape))
                own.addmv_(change.view(len(part), -1).t(), weight)
                continue
            part.add_total(weight, own.view(part.base.shape))
            if not _same(part.base, before):
                own.add_((weight.sum() * part.base - torch.tensordot(weight, before, 1)).view(-1))
        self._arena.release(scratch)

    def spent(self, start: Tensor, weight: Tensor) -> Tensor:
        """The same total [P] of a single row without factors, in its own memory: nothing else may be asked then."""
        for part, before in zip(self.tensors(), _views(self.layout, start.detach()), strict=True):
            part.sub_(before).mul_(weight)
        return self.rows()[0]

    def _room(self, into: Tensor | None) -> Tensor:
        """Where rows [C, P] are written to."""
        return self._arena.empty(len(self), self.layout.size, like=self.like) if into is None else into

    def _whole(self) -> bool:
        """Whether the blocks of a single row lie one after the other in one storage."""
        base = self.parts[0]
        return all(
            isinstance(part, Tensor)
            and isinstance(base, Tensor)
            and part.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
            and part.data_ptr() == base.data_ptr() + begin * base.element_size()
            for part, (_, _, begin, _) in zip(self.parts, self.layout, strict=True)
        )


def _same(base: Tensor, rows: Tensor) -> bool:
    """Whether every row [C, ...] is the base itself."""
    return (
        rows.data_ptr() == base.data_ptr()
        and (len(rows) == 1 or rows.stride(0) == 0)
        and rows.stride()[1:] == base.stride()
    )


def _views(layout: Layout, rows: Tensor) -> list[Tensor]:
    """Each parameter of rows [C, P] as a view [C, ...]."""
    return list(layout.view(rows).values())
