"""The server's end of a round: partials taken in one by one, in order, and what they combine to."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor

from atoll import random
from atoll.aggregators import Ruling
from atoll.aggregators.rows import finite_rows
from atoll.errors import InvalidArgument, NonFiniteError, invalid
from atoll.messages import Partial, Task
from atoll.secagg import Void
from atoll.transforms.base import Codes, Keys
from atoll.transforms.chain import keys_of
from atoll.transforms.channel import Gathering, Group, Opened

if TYPE_CHECKING:
    from atoll.rounds import Process, State


REFUSED = 100
"""Refused clients that are told of in a round."""

PIECE = 2**18
"""Numbers that are added up at a time."""


Release = Callable[[Tensor, float], Tensor]
"""(sum of the clients' rows [L'] float64, L2 norm that one client adds to it at most) -> the sum with noise."""


@dataclass(frozen=True, slots=True)
class Collected:
    """A round's updates, combined.

    Attributes:
        mean: averaged part and averaged buffers.
        sums: summed part.
        weight: total weight.
        count: clients in it.
        loss, examples: sums over the clients' training.
        bytes_up: bytes all clients sent.
        saturated: values that were cut to the range of a channel.
        divisor: what the weighted sum was divided by.
        aggregator: what the rule keeps.
        refused: clients without a part in it, and why.
        seen: what stages that learn from the sum saw, by their number.
        cohort: clients it is the sum of, or the expected number under noise.
    """

    mean: Tensor
    sums: Tensor
    weight: float
    count: int
    loss: float
    examples: float
    bytes_up: int
    saturated: int
    divisor: float = 0.0
    aggregator: Any = None
    refused: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    root: Tensor | None = None  # the row [L] of the server's own data, where the rule judged by it
    seen: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    cohort: float = 0.0
    summed: tuple[frozenset[str], ...] = ()  # clients of each sum that a summing channel showed
    notes: tuple[str, ...] = ()


class Given:
    """A gathering that is over before it begins."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def add(self, clients: tuple[str, ...], codes: Codes) -> None:
        """Nothing more is taken in."""
        raise AssertionError("the sum is there already")

    def finish(self) -> list[Group]:
        """The sum."""
        return [self._group]


class Collector:
    """Takes in a round's partials in order and combines them: a running sum, or rows where a rule needs them."""

    def __init__(self, process: "Process", task: Task, state: "State") -> None:
        self._process = process
        self._task = task
        self._state = state.aggregator
        self._memory = state.memory
        self._total: Tensor | None = None
        self._gathering: Gathering | None = None
        self._rows: Tensor | None = None
        self._names: list[str] = []
        self.broken: list[str] = []
        self._told = dict[str, Mapping[str, Any]]()  # whom stages left out, and why
        self.left_out: list[str] = []  # clients without a part in the round, whose memory stays as it was
        self.dropped: list[str] = []  # clients whose rows are in no sum: theirs does too
        self._weights: list[Tensor] = []
        self._parts = (0, 0, 0)
        self._weight = 0.0
        self._count = 0
        self._metrics = torch.zeros(2, dtype=torch.float64)
        self._bytes = 0

    def add(self, partial: Partial) -> None:
        """Take in one tile.

        Raises:
            NonFiniteError: a client's update, loss or weight is not finite, and there is no rule to leave it out.
        """
        if partial.broken and partial.rows is None:
            if self._process.chain.noise is None:
                self._refuse(partial.broken)
            self.left_out += partial.broken  # they add nothing, and nobody is told
        self._parts = partial.parts
        if partial.codes is not None:
            self._gather(partial, partial.codes)
            return
        self._count += len(partial.clients)
        self._told |= partial.refused
        self._metrics += partial.metrics.cpu()
        self._bytes += partial.bytes
        if partial.rows is not None:
            if len(partial.clients) == len(self._task.clients):  # those of everybody need no other place
                self._rows = partial.rows
            else:
                if self._rows is None:  # rows go straight to their place: there is no second copy of them all
                    self._rows = partial.rows.new_empty(len(self._task.clients), partial.rows.shape[1])
                self._rows[self._count - len(partial.clients) : self._count] = partial.rows
            self._names += partial.clients
            self.broken += partial.broken
            self._weights.append(partial.weight[:, 0])
            return
        assert partial.total is not None
        if self._total is None:
            self._total = partial.total.to(torch.float64, copy=True)  # a partial is valid until the next
        else:
            # In pieces: adding numbers of another precision makes a wide copy of them first.
            for own, other in zip(self._total.split(PIECE), partial.total.split(PIECE), strict=True):
                own += other
        self._weight += float(partial.weight.double().sum())

    def _gather(self, partial: Partial, codes: Codes) -> None:
        """Hand a tile's codes to the channel's machine."""
        task, channel = self._task, self._process.chain.channel
        if self._gathering is None:
            assert channel.gather is not None
            keys = Keys(task.seed, "channel", task.round, random.client_keys(task.clients))
            self._gathering = channel.gather(task.clients, keys)
        gone = self._process.gone(task, partial.clients)
        here = tuple(c for c in partial.clients if c not in gone)
        self.dropped += sorted(gone)
        if here:
            self._gathering.add(here, codes)
        self._names += here
        self._count += len(here)
        self._bytes += partial.bytes // len(partial.clients) * len(here)

    def take(self, group: Group, parts: tuple[int, int, int], sent: int) -> None:
        """Take in the sum that a summing channel's machines gave elsewhere, in place of its clients' partials.

        Args:
            group: the sum and whose it is.
            parts: lengths of a row's averaged part, averaged buffers and summed part.
            sent: bytes that these clients sent.
        """
        self._gathering, self._parts, self._bytes = Given(group), parts, sent
        self._names, self._count = list(group.members), len(group.members)

    def _void(self, why: str) -> Collected:
        """A round that gives nothing: nobody's update counts."""
        self.dropped += self._names
        empty = torch.empty(0, dtype=self._process.model.dtype)
        return Collected(
            empty, empty, 0.0, 0, 0.0, 0.0, self._bytes, 0, 0.0, self._state, notes=(f"No update counts: {why}",)
        )

    def _opened(self, width: int) -> tuple[list[Group], list[Opened]]:
        """The sums a channel shows, and what they say.

        Raises:
            Void: it shows none.
        """
        process, count = self._process, len(self._task.clients)
        assert self._gathering is not None and process.chain.channel.unseal is not None
        sealed, unseal = process.chain.sizes(sum(self._parts), width)[-1][1], process.chain.channel.unseal
        groups = self._gathering.finish()
        kept = {c for g in groups for c in g.members}
        self.dropped += [c for c in self._names if c not in kept]
        self._count = len(kept)
        return groups, [unseal(g.total, sealed, count, len(g.members)) for g in groups]

    def _ruled(self, groups: list[Group], opened: list[Opened], keys: Keys) -> tuple[Ruling, dict[str, Any]]:
        """A rule over the means of groups, and the groups it gave no share."""
        process, task = self._process, self._task
        rows: list[Tensor] = []
        for group, found in zip(groups, opened, strict=True):
            mean = torch.cat((found.weighted / max(found.weight, 1e-300), found.sums / len(group.members)))
            rows.append(process.chain.decode_sum(mean, task.shared, sum(self._parts), keys))
        matrix = torch.stack(rows).to(process.model.dtype)
        weights = torch.tensor([found.weight for found in opened], dtype=torch.float64)
        names = [f"the group of {', '.join(g.members)}" for g in groups]
        ruling = process.judge.combine(matrix, weights, self._state, names)
        self._names = names
        refused, out = self._refused(matrix, ruling)
        self.left_out += [c for g, name in zip(groups, names, strict=True) if name in out for c in g.members]
        return ruling, refused

    def finish(
        self,
        expected: float | None = None,
        release: Release | None = None,
        entered: Callable[[], None] | None = None,
    ) -> Collected:
        """The round's aggregate.

        Args:
            expected: expected cohort size, for `mean(denominator="expected")`; default the cohort's own.
            release: adds the noise, where a stage asks for it.
            entered: called when a channel has shown a sum and before it is used.

        Raises:
            CompositionError: too few clients for the rule.
            InvalidArgument: every client has weight 0.
        """
        process = self._process
        dtype, width = process.model.dtype, self._parts[0] + self._parts[1]
        saturated, kept, refused = 0, self._state, dict[str, Mapping[str, Any]]()
        length, task = sum(self._parts), self._task
        keys = keys_of(task.seed, task.round, random.client_keys(()), width)
        if process.chain.noise is not None:
            return self._finish_private(expected, release)
        root: Tensor | None = None
        if self._count and len(self._told) == self._count:
            name, told = next(iter(self._told.items()))
            raise NonFiniteError(
                f"round {task.round + 1}: all {self._count} updates were refused; that of {name}, for instance, "
                f"because {told['reason']}. Likely causes: a learning rate that is too high (halve lr), or a bound "
                "that is too low. The model of the round before is kept."
            )
        if not self._count:
            if self._gathering is not None:
                return self._void("all clients have dropped out.")
            empty = torch.empty(0, dtype=dtype)
            return Collected(empty, empty, 0.0, 0, 0.0, 0.0, 0, 0, 0.0, kept)
        ruled: Ruling | None = None
        seen: dict[int, Tensor] = {}
        groups, opened = list[Group](), list[Opened]()
        if self._gathering is not None:
            try:
                groups, opened = self._opened(width)
            except Void as error:
                return self._void(str(error))
            if entered is not None:
                entered()
            self._weight = math.fsum(o.weight for o in opened)
            saturated = sum(o.saturated for o in opened)
            self._metrics = torch.tensor([math.fsum(o.loss for o in opened), self._weight], dtype=torch.float64)
            if process.chain.channel.rule is not None:
                if len(groups) < (needed := process.judge.least(len(groups))):
                    self._names = [c for g in groups for c in g.members]
                    return self._void(f"{len(groups)} groups are left; {process.judge.name} needs {needed}.")
                if not self._weight > 0:
                    self._weightless()
                ruled, refused = self._ruled(groups, opened, keys)
                kept = ruled.state
        if self._rows is None:
            self._count -= len(self._told)
            if self._told:
                refused, self.left_out = dict(list(self._told.items())[:REFUSED]), list(self._told)
        else:
            process.aggregator.check(self._count, self._task.round)
            if len(self.broken) + len(self._told) == self._count:
                self._refuse(self.broken)
            weights = torch.cat(self._weights).double()
            if self.broken or self._told:
                gone = set(self.broken) | self._told.keys()
                out = torch.tensor([name in gone for name in self._names], device=weights.device)
                self._rows[: self._count][out], weights = torch.nan, weights.masked_fill(out, 0.0)
                self._count -= len(gone)
            if process.aggregator.rooted:
                root = process.serve(task, self._memory)
            ruling = process.aggregator.combine(self._rows[: len(weights)], weights, self._state, self._names, root)
            (refused, self.left_out), kept = self._refused(self._rows[: len(weights)], ruling), ruling.state
            self._weight = float(weights.sum())
            if process.aggregator.averages:  # a mean under an attack: the rows that were sent are added up as ever
                assert ruling.rows is not None and ruling.weights is not None
                sent = process.aggregator.fine(ruling.rows, ruling.weights)
                rows, claimed = ruling.rows[sent].double(), ruling.weights[sent].double()
                self._count = len(rows)
                split = process.chain.seen_size(length, width)[1]
                self._total = torch.cat((claimed @ rows[:, :split], rows[:, split:].sum(dim=0)))
                self._weight = float(claimed.sum())
            else:
                ruled = ruling
        if ruled is not None:
            combined = ruled.row if groups else process.chain.decode_sum(ruled.row, task.shared, length, keys)
            average, sums = combined[:width], combined[width:] * self._count
            weight = divisor = self._weight
        else:
            if opened:
                total, weight = torch.cat((opened[0].weighted, opened[0].sums)), opened[0].weight
            else:
                assert self._total is not None
                total, weight, self._total = self._total, self._weight, None
            total = process.chain.decode_sum(total, task.shared, length, keys, seen=seen)
            divisor = weight
            if process.aggregator.denominator == "expected":
                divisor = float(len(self._task.clients)) if expected is None else expected
            if not divisor > 0:
                self._weightless()
            average, sums = total[:width].div_(divisor), total[width:]
        loss, examples = self._metrics.tolist()
        return Collected(
            average.to(dtype),
            sums if process.algorithm.statistics else sums.to(dtype),
            weight,
            self._count,
            loss,
            examples,
            self._bytes,
            saturated,
            divisor,
            kept,
            refused,
            root,
            seen,
            float(self._count),
            tuple(frozenset(g.members) for g in groups),
        )

    def _weightless(self) -> Never:
        raise InvalidArgument(
            f"round {self._task.round + 1}: all {self._count} clients of the cohort have weight 0: "
            "give some of them a weight above 0."
        )

    def _finish_private(self, expected: float | None, release: Release | None) -> Collected:
        """The aggregate of a round with noise; of an empty cohort it is noise alone."""
        process, task = self._process, self._task
        if expected is None or not expected > 0:
            raise invalid(
                "expected", expected, "the expected cohort size in a run with noise",
                "Dividing by who came would tell of the data.",
            )  # fmt: skip
        total, self._total = self._total, None
        if total is None:
            total = torch.zeros(process.chain.seen_size(process.length, process.split)[0], dtype=torch.float64)
        collected = process.released(task, total, expected, release)
        return replace(collected, aggregator=self._state, bytes_up=self._bytes)

    def _refused(self, rows: Tensor, ruling: Ruling) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
        """Clients that had no part in the ruling, the farthest first: why, and how long and how far off a row is."""
        rows = rows if ruling.rows is None else ruling.rows
        fine, rule = finite_rows(rows).tolist(), self._process.judge
        broken = [name for name, good in zip(self._names, fine, strict=True) if not good]
        found: dict[str, Mapping[str, Any]] = {
            n: self._told.get(n, {"reason": "the update or loss is not finite"}) for n in broken
        }
        if ruling.share is not None:
            away: list[tuple[float, float, str, str]] = []
            for i in (ruling.share == 0).nonzero()[:, 0].tolist():
                claimed = 1.0 if ruling.weights is None else float(ruling.weights[i])
                reason = f"{rule.name} gave it no share"
                if not 0 <= claimed <= rule.cap:
                    reason = f"it claims a weight of {claimed:g}, where 0 to {rule.cap:g} is allowed"
                elif rule.averages:  # whoever weighs nothing may still add to the summed part
                    continue
                if fine[i]:
                    row = rows[i].double()
                    away.append((float((row - ruling.row).norm()), float(row.norm()), self._names[i], reason))
            away.sort(reverse=True)
            found |= {name: {"reason": reason, "norm": norm, "distance": far} for far, norm, name, reason in away}
        return dict(list(found.items())[:REFUSED]), list(found)

    def _refuse(self, names: Sequence[str]) -> None:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise NonFiniteError(
            f"round {self._task.round + 1}: training became non-finite at {shown}. Likely causes: a learning rate that "
            "is too high (halve lr), features that are not standardised, or a loss that takes the logarithm of zero. "
            "The model of the round before is kept."
        )
