"""The vector space federated learning happens in: layouts, rows and updates.

A model's trainable parameters are one vector `[P]`; every per-client quantity is a tensor whose first axis is the
client. A `Layout` says which slice of the vector is which named tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import invalid


@dataclass(frozen=True, slots=True)
class Layout:
    """Which slice of a flat vector holds which named tensor.

    Attributes:
        names: one name per tensor.
        shapes: one shape per tensor.
        offsets: where each tensor starts; one more entry than names, the last is `size`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        offsets = [0]
        for shape in self.shapes:
            offsets.append(offsets[-1] + prod(shape))
        object.__setattr__(self, "offsets", tuple(offsets))

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Layout":
        """The layout of named tensors, in their order."""
        return Layout(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for i, name in enumerate(self.names):
            yield name, self.shapes[i], self.offsets[i], self.offsets[i + 1]

    def view(self, vector: Tensor) -> dict[str, Tensor]:
        """Named tensors of a vector `[P]` or of rows `[C, P]`, as views (rows keep their first axis)."""
        if vector.shape[-1] != self.size:
            raise invalid("vector", tuple(vector.shape), f"of length {self.size}")
        lead = tuple(vector.shape[:-1])
        return {name: vector[..., a:b].view(lead + shape) for name, shape, a, b in self}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One new vector from named tensors."""
        if not self.names:
            first = next(iter(tensors.values()), None)
            return torch.empty(0, dtype=first.dtype if first is not None else torch.float32)
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    def matching(self, patterns: Iterable[str]) -> frozenset[str]:
        """Names that match any of the shell-style patterns (`"head.*"`)."""
        wanted = tuple(patterns)
        return frozenset(n for n in self.names if any(fnmatchcase(n, p) for p in wanted))

    def without(self, names: Iterable[str]) -> "Selection":
        """The part of this layout that is left when `names` are taken out."""
        dropped = frozenset(names)
        return Selection(self, tuple(n for n in self.names if n not in dropped))

    def mask(self, names: Iterable[str]) -> Tensor:
        """Boolean vector `[P]`, true on the named tensors."""
        wanted = frozenset(names)
        out = torch.zeros(self.size, dtype=torch.bool)
        for name, _, a, b in self:
            if name in wanted:
                out[a:b] = True
        return out


@dataclass(frozen=True, slots=True)
class Selection:
    """Some of a layout's tensors, in its order, as a vector of their own."""

    whole: Layout
    names: tuple[str, ...]
    layout: Layout = field(init=False)
    runs: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        wanted = frozenset(self.names)
        kept = [(n, s, a, b) for n, s, a, b in self.whole if n in wanted]
        object.__setattr__(self, "layout", Layout(tuple(k[0] for k in kept), tuple(k[1] for k in kept)))
        runs: list[tuple[int, int]] = []
        for _, _, a, b in kept:
            if runs and runs[-1][1] == a:
                runs[-1] = (runs[-1][0], b)
            else:
                runs.append((a, b))
        object.__setattr__(self, "runs", tuple(runs))

    @property
    def size(self) -> int:
        """Length of the selected vector."""
        return self.layout.size

    @property
    def everything(self) -> bool:
        """Whether nothing was left out."""
        return self.size == self.whole.size

    def take(self, vector: Tensor) -> Tensor:
        """The selected part of `[..., P]`; the tensor itself when nothing was left out."""
        if self.everything:
            return vector
        if not self.runs:
            return vector[..., :0]
        return torch.cat([vector[..., a:b] for a, b in self.runs], dim=-1)

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """Write the selected part into `into [..., P]` in place (the part broadcasts over rows); returns `into`."""
        at = 0
        for a, b in self.runs:
            into[..., a:b] = part[..., at : at + b - a]
            at += b - a
        return into


PIECE = 128
"""Squares that are added up in single precision."""

EXCESS = (PIECE // 2 + 3) * 2.0**-24
"""What a norm by pieces may be too small by: half the roundings of the squares and their sum, and those of roots."""


def lengths(rows: Tensor) -> Tensor:
    """L2 norms [C, 1] of rows [C, L], float64; of rows in single precision never too small, and at most 8e-6 too large.

    Of these, squares are added up in single precision by pieces of `PIECE` numbers, which cannot be off by more than
    their number of roundings, whatever their order; pieces in double. It takes a fifth of the time.
    """
    count = rows.shape[1] // PIECE
    if rows.dtype != torch.float32 or count < 2:
        return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    pieces = torch.linalg.vector_norm(rows[:, : count * PIECE].unflatten(1, (count, PIECE)), dim=2).double()
    rest = torch.linalg.vector_norm(rows[:, count * PIECE :], dim=1, dtype=torch.float64)
    found = (pieces.square().sum(dim=1) + rest.square()).sqrt().mul_(1 + EXCESS)
    # Squares may be too large for single precision, or too small.
    for i in (~((found > 1e-6) & torch.isfinite(found))).nonzero()[:, 0].tolist():
        found[i] = torch.linalg.vector_norm(rows[i], dtype=torch.float64)
    return found[:, None]


class Change:
    """What training changed, one row per client: all rows [C, D] are made when they are asked for.

    Attributes:
        shape: (C, D).

    Args:
        shape: (C, D).
        rows: rows [C, D], or what makes them.
        total: (weight [C], last) -> sum of the rows by weight [D], where it can be had without them; when it is the
            `last` question, their memory may be used for the answer.
    """

    __slots__ = ("_rows", "_total", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        rows: Tensor | Callable[[], Tensor],
        total: Callable[[Tensor, bool], Tensor] | None = None,
    ) -> None:
        self.shape = shape
        self._rows, self._total = rows, total

    @property
    def rows(self) -> Tensor:
        """All rows [C, D]."""
        if not isinstance(self._rows, Tensor):
            self._rows = self._rows()
        return self._rows

    def total(self, weight: Tensor, *, last: bool = False) -> Tensor:
        """The sum of the rows by weight [C, 1], [D], in the weight's precision. After the `last` nothing is asked."""
        if self._total is not None and not isinstance(self._rows, Tensor):
            return self._total(weight[:, 0], last)
        return (weight.T @ self.rows.to(weight.dtype))[0]

    def take(self, selection: Selection) -> "Change":
        """The part of some of the tensors, [C, D']."""
        if selection.everything:
            return self
        return Change(
            (self.shape[0], selection.size),
            lambda: selection.take(self.rows),
            lambda weight, last: selection.take(self.total(weight[:, None], last=last)),
        )


class Trained:
    """What local training gave, one row per client.

    Attributes:
        buffers: floating buffers after training, [C, B].
        steps: local steps that really ran, [C, 1].
        rates: sum of the learning rates of these steps, [C, 1] (K * eta under a constant rate).
        loss: sum over steps of the mean batch loss times the batch size, [C, 1], float64.
        examples: examples processed, counting repeats, [C, 1], float64.

    Args:
        rows: parameters after training, [C, P], or what makes them when they are asked for.
        buffers: see above, as the rest.
        steps: local steps.
        rates: sum of learning rates.
        loss: sum of losses.
        examples: examples processed.
        change: gives what changed since a start [C, P]; None: by subtraction.
    """

    __slots__ = ("_change", "_changed", "_rows", "buffers", "examples", "loss", "rates", "steps")

    def __init__(
        self,
        rows: Tensor | Callable[[], Tensor],
        buffers: Tensor,
        steps: Tensor,
        rates: Tensor,
        loss: Tensor,
        examples: Tensor,
        *,
        change: Callable[[Tensor], Change] | None = None,
    ) -> None:
        self._rows, self._change = rows, change
        self._changed: tuple[Tensor, Change] | None = None
        self.buffers, self.steps, self.rates, self.loss, self.examples = buffers, steps, rates, loss, examples

    @property
    def rows(self) -> Tensor:
        """Parameters after training, [C, P]; like all a tile's work gives, valid until the next tile is made."""
        if not isinstance(self._rows, Tensor):
            self._rows = self._rows()
        return self._rows

    def change(self, start: Tensor) -> Change:
        """What training changed since `start` [C, P]; kept for the next question about the same start."""
        if self._changed is None or self._changed[0] is not start:
            shape = (start.shape[0], start.shape[1])
            made = Change(shape, lambda: self.rows - start) if self._change is None else self._change(start)
            self._changed = start, made
        return self._changed[1]

    def minus(self, start: Tensor) -> Tensor:
        """The same as rows [C, P]."""
        return self.change(start).rows


class Update:
    """What a tile of clients returns to the server, one row per client.

    Attributes:
        change: the part that is averaged by weight, [C, D].
        layout: names of the averaged part, of size D.
        sums: the part that is added up unweighted, [C, S].
        weight: of each client in the average, [C, 1].
        metrics: sums (loss, examples) of local work, [C, 2], float64.
        trained: what each client's model became; the framework takes buffers and private parameters from it.

    Args:
        mean: the averaged part: rows [C, D], or what gives them.
        layout: see above, as the rest.
        sums: the summed part.
        weight: of each client.
        metrics: of local work.
        trained: the clients' models.
    """

    __slots__ = ("change", "layout", "metrics", "sums", "trained", "weight")

    def __init__(
        self,
        mean: Tensor | Change,
        layout: Layout,
        sums: Tensor,
        weight: Tensor,
        metrics: Tensor,
        trained: Trained | None = None,
    ) -> None:
        self.change = mean if isinstance(mean, Change) else Change(tuple(mean.shape), mean)
        self.layout, self.sums, self.weight, self.metrics, self.trained = layout, sums, weight, metrics, trained

    @property
    def mean(self) -> Tensor:
        """The averaged part as rows [C, D]."""
        return self.change.rows

    def replace(
        self,
        *,
        mean: Tensor | Change | None = None,
        sums: Tensor | None = None,
        weight: Tensor | None = None,
        metrics: Tensor | None = None,
    ) -> "Update":
        """The same update with some of it in another's place."""
        return Update(
            self.change if mean is None else mean,
            self.layout,
            self.sums if sums is None else sums,
            self.weight if weight is None else weight,
            self.metrics if metrics is None else metrics,
            self.trained,
        )


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What the server's step reads.

    Attributes:
        mean: weighted mean of the updates' averaged part, [D].
        sums: sum of the updates' summed part over the cohort, [S].
        weight: total weight.
        count: clients whose updates are in it.
        population: clients there are.
        round: the round, from 0.
        divisor: what the weighted sum was divided by: the total weight, or the expected one.
        root: what training on the server's own data gave, averaged and summed part [D + S], where anybody looks at it.
        spare: whether nobody needs the mean after the step, which may write a model into its memory.
    """

    mean: Tensor
    sums: Tensor
    weight: float
    count: int
    population: int
    round: int
    divisor: float
    root: Tensor | None = None
    spare: bool = False


class Personal(NamedTuple):
    """The models clients would use: parameters [C, P] and, where they differ from the received ones, buffers [C, B]."""

    rows: Tensor
    buffers: Tensor | None = None


Weights = Callable[[Tensor, Sequence[str]], Tensor]
"""A rule for weights: (examples [1, 1], [client name]) -> weight [1, 1]; called for one client at a time."""
