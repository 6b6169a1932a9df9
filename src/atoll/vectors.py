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
        minus: gives rows less a start [C, P]; None: by subtraction.
    """

    __slots__ = ("_changed", "_minus", "_rows", "buffers", "examples", "loss", "rates", "steps")

    def __init__(
        self,
        rows: Tensor | Callable[[], Tensor],
        buffers: Tensor,
        steps: Tensor,
        rates: Tensor,
        loss: Tensor,
        examples: Tensor,
        *,
        minus: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._rows, self._minus = rows, minus
        self._changed: tuple[Tensor, Tensor] | None = None
        self.buffers, self.steps, self.rates, self.loss, self.examples = buffers, steps, rates, loss, examples

    @property
    def rows(self) -> Tensor:
        """Parameters after training, [C, P]; like all a tile's work gives, valid until the next tile is made."""
        if not isinstance(self._rows, Tensor):
            self._rows = self._rows()
        return self._rows

    def minus(self, start: Tensor) -> Tensor:
        """What training changed: rows less `start`, both [C, P]; kept for the next question about the same start."""
        if self._changed is None or self._changed[0] is not start:
            change = self._minus(start) if self._minus is not None else self.rows - start
            self._changed = start, change
        return self._changed[1]


@dataclass(frozen=True, slots=True)
class Update:
    """What a tile of clients returns to the server, one row per client.

    Attributes:
        mean: the part that is averaged by weight, [C, D].
        layout: names of the averaged part, of size D.
        sums: the part that is added up unweighted, [C, S].
        weight: of each client in the average, [C, 1].
        metrics: sums (loss, examples) of local work, [C, 2], float64.
        trained: what each client's model became; the framework takes buffers and private parameters from it.
    """

    mean: Tensor
    layout: Layout
    sums: Tensor
    weight: Tensor
    metrics: Tensor
    trained: Trained | None = None


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
    """

    mean: Tensor
    sums: Tensor
    weight: float
    count: int
    population: int
    round: int


class Personal(NamedTuple):
    """The models clients would use: parameters [C, P] and, where they differ from the received ones, buffers [C, B]."""

    rows: Tensor
    buffers: Tensor | None = None


Weights = Callable[[Tensor, Sequence[str]], Tensor]
"""A rule for weights: (examples [1, 1], [client name]) -> weight [1, 1]; called for one client at a time."""
