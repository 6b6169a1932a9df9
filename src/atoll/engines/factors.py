"""Weights of rows that are never written out: what all rows share, plus each row's own sum of products.

Local sgd changes a weight by one product after the other, W_c <- W_c - rate * slopes^T inputs. Clients that see few
examples change it by a matrix of low rank, and everything a layer does can be done with its factors:

    W_c = W + S_c^T X_c                 S_c [t, m], X_c [t, n]: one row for each place seen so far
    x W_c^T = x W^T + (x X_c^T) S_c     one product for all clients, and two small ones
    sum of a_c (W_c - W) = (a S)^T X    one product for all clients

This saves the memory of a matrix for each client, and all the work of reading and writing it. It pays while the places
seen are fewer than `most` says: a step's two small products cost t (m + n) for each of its places, the step on the
matrix itself m n.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.engines.arena import Arena
from atoll.engines.schedule import Members

SMALLEST = 2**14
"""Weights of fewer numbers stay in the cache and are stepped on as they are."""


class Use(NamedTuple):
    """How a model goes through a weight.

    Attributes:
        places: at which an example goes through it: one, or as many as a sequence is long.
        most: places up to which factors cost less than the weight.
    """

    places: int
    most: int


def most(rows: int, columns: int, *, below: bool) -> int:
    """Places up to which factors of a weight [rows, columns] cost less than the weight: found by measurement.

    `below` says whether the gradient of the layer's input is wanted, which takes as many products again.
    """
    if rows * columns < SMALLEST:
        return 0
    return (2 if below else 3) * rows * columns // (4 * (rows + columns))


def factored(uses: Mapping[int, Use], examples: int) -> dict[int, int]:
    """Weights that had better stand as factors, with the room each needs.

    Args:
        uses: by number of the weight.
        examples: seen by the client that sees most, repeats counted.
    """
    return {n: use.places * examples for n, use in uses.items() if 0 < use.places * examples <= use.most}


class _Store:
    """What the views of one weight share.

    Attributes:
        base: [m, n].
        inputs: [C, room, n].
        slopes: [C, room, m], with the learning rates; zeros where nothing was seen.
        filled: places seen by each row, int64 [C].
    """

    def __init__(self, base: Tensor, count: int, room: int, arena: Arena) -> None:
        high, wide = base.shape
        self.base = base
        self.inputs = arena.empty(count, room, wide, like=base)
        self.slopes = arena.empty(count, room, high, like=base)
        self.filled = np.zeros(count, np.int64)
        self.clean = 0  # places before this one hold zeros or what was written, in every row

    def grow(self, room: int) -> None:
        """Make room for more places than the layer was expected to see."""
        more = room - self.inputs.shape[1]
        self.inputs, self.slopes = (
            torch.cat((t, t.new_zeros(len(t), more, t.shape[2])), dim=1) for t in (self.inputs, self.slopes)
        )

    def reach(self, places: int) -> None:
        """Make places that were not all written safe to be read."""
        if places > self.clean:
            self.inputs[:, self.clean : places].zero_()
            self.slopes[:, self.clean : places].zero_()
            self.clean = places


class Factors:
    """A weight [C, m, n] of some rows.

    Args:
        base: the weight all rows start from, [m, n].
        count: rows.
        room: places each may see.
        arena: memory for the factors.
    """

    __slots__ = ("_members", "_numbers", "_store")

    def __init__(self, base: Tensor, count: int, room: int, arena: Arena) -> None:
        self._store = _Store(base, count, room, arena)
        self._members: Members = slice(0, count)
        self._numbers: NDArray[np.int64] = np.arange(count)

    def take(self, members: Members) -> "Factors":
        """Some rows; what they append is seen by the whole."""
        part = object.__new__(Factors)
        part._store = self._store
        part._members, part._numbers = members, np.arange(len(self._store.filled))[_index(members)]
        return part

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def base(self) -> Tensor:
        """What all rows start from, [m, n]."""
        return self._store.base

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, m, n]."""
        high, wide = self._store.base.shape
        return len(self), high, wide

    def _seen(self) -> tuple[Tensor, Tensor] | None:
        """Slopes [k, t, m] and inputs [k, t, n] of what these rows have seen; None: nothing yet."""
        store = self._store
        filled = store.filled[self._numbers]
        last = int(filled.max(initial=0))
        if not last:
            return None
        return store.slopes[self._members, :last], store.inputs[self._members, :last]

    def forward(self, x: Tensor) -> Tensor:
        """x W^T of x [k, b, n]."""
        out = _shared(x, self._store.base.t())
        if (seen := self._seen()) is not None:
            slopes, inputs = seen
            out.baddbmm_(torch.bmm(x, inputs.mT), slopes)
        return out

    def backward(self, slope: Tensor) -> Tensor:
        """slope W of slope [k, b, m]."""
        out = _shared(slope, self._store.base)
        if (seen := self._seen()) is not None:
            slopes, inputs = seen
            out.baddbmm_(torch.bmm(slope, slopes.mT), inputs)
        return out

    def append(self, slope: Tensor, x: Tensor, *, beta: float, alpha: float) -> None:
        """W - base <- beta (W - base) + alpha slope^T x, of slope [k, b, m] and x [k, b, n]."""
        self.scale(beta)
        store, count = self._store, slope.shape[1]
        filled = store.filled[self._numbers]
        first, last = int(filled.min()), int(filled.max())
        if last + count > store.inputs.shape[1]:
            store.grow(last + count)
        if first == last:
            if len(self) < len(store.filled):
                store.reach(last + count)
            store.clean = max(store.clean, last + count)
            at = slice(first, first + count)
            store.inputs[self._members, at] = x
            if isinstance(self._members, slice):
                torch.mul(slope, alpha, out=store.slopes[self._members, at])
            else:
                store.slopes[self._members, at] = slope * alpha
        else:
            store.reach(last + count)
            rows = torch.from_numpy(self._numbers)[:, None]
            places = torch.from_numpy(filled)[:, None] + torch.arange(count)
            store.inputs[rows, places] = x
            store.slopes[rows, places] = slope * alpha
        store.filled[self._numbers] = filled + count

    def scale(self, beta: float) -> None:
        """W - base <- beta (W - base)."""
        if beta != 1.0 and (seen := self._seen()) is not None:
            store = self._store
            store.slopes[self._members, : seen[0].shape[1]] *= beta

    def changed(self, out: Tensor) -> None:
        """Write W - base [C, m, n]."""
        if (seen := self._seen()) is None:
            out.zero_()
        elif out.is_contiguous():
            torch.bmm(seen[0].mT, seen[1], out=out)
        else:  # row by row: into what is strided, products go through a copy
            for one, slopes, inputs in zip(out, *seen, strict=True):
                torch.mm(slopes.t(), inputs, out=one)

    def add_total(self, weight: Tensor, into: Tensor) -> None:
        """Add the sum of W - base over the rows, weighted by weight [C], to `into` [m, n]."""
        if (seen := self._seen()) is not None:
            slopes, inputs = seen
            into.addmm_((slopes * weight[:, None, None]).flatten(0, 1).t(), inputs.flatten(0, 1))


def _shared(x: Tensor, matrix: Tensor) -> Tensor:
    """x [k, b, n] times a matrix all rows share, as one product."""
    return torch.mm(x.reshape(-1, x.shape[2]), matrix).view(x.shape[0], x.shape[1], -1)


def _index(members: Members) -> slice | NDArray[np.int64]:
    return members if isinstance(members, slice) else members.numpy()
