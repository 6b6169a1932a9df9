"""A tile of clients whose models are rows of one matrix.

At every step rows are grouped by true batch size; clients that are done leave the group, and nothing is padded.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atoll import random
from atoll.cohort import Cohort, Minibatch, Term
from atoll.engines import paths
from atoll.engines.arena import Arena
from atoll.engines.base import orders
from atoll.engines.blocks import Blocks, Part
from atoll.engines.dropout import Draw
from atoll.engines.factors import Use, factored
from atoll.engines.minibatches import minibatches
from atoll.engines.objective import slopes
from atoll.engines.private import PerBatch, PerExample, Sums, example_keys, factors, train_privately
from atoll.engines.program import Program
from atoll.engines.schedule import Members, schedule
from atoll.engines.steps import Gradients, Rule, Sink, by_factors, splits
from atoll.errors import CompositionError
from atoll.local import Plan
from atoll.model import Batch, Model
from atoll.vectors import Change, Trained

if TYPE_CHECKING:
    from atoll.data import Split

GATHER_BYTES = 4 * 2**20
"""Examples of several steps are gathered at once up to this size."""

LOOK = 64
"""Examples of each client that go through a forward at once."""


TOGETHER = 64
"""Examples whose gradients are found at once under example-level privacy."""

STRIP_BYTES = 4 * 2**20
"""Parameters of clients that are trained from their first step to their last before the next ones begin."""


@dataclass(frozen=True, slots=True)
class Paths:
    """How a tile finds outputs and gradients.

    Attributes:
        program: of the training forward and backward; None: autograd.
        uses: of weights that may stand as factors.
        evaluating: the program of the evaluating forward; None: the module itself, client by client.
        batched: whether autograd goes through the batching transform; else tiles have one client.
        dropout: whether the model has dropout that can be keyed.
        draws: whether it draws from torch's own generator.
        mixed: whether products are in lower precision (`precision.py`).
    """

    program: Program | None
    uses: Mapping[int, Use]
    evaluating: Program | None
    batched: bool
    dropout: bool
    draws: bool
    mixed: bool = False

    @property
    def random(self) -> bool:
        """Whether forwards draw random numbers."""
        return self.dropout or self.draws


class Buffers:
    """Floating and integer buffers of a tile's rows, updated in place by forwards."""

    def __init__(self, model: Model, floating: Tensor) -> None:
        self.floating = floating
        counts = len(floating)
        self._all = model.buffer_layout.view(floating)
        own = {n: t.to(floating.device) for n, t in model.counters().items()}
        self._all |= {n: t.expand(counts, *t.shape).clone() for n, t in own.items()}

    def take(self, members: Members) -> dict[str, Tensor]:
        """Buffers of some rows: views for a slice, copies for a list."""
        return {n: t[members] for n, t in self._all.items()}

    def put(self, members: Tensor, values: Mapping[str, Tensor]) -> None:
        """Write copies back."""
        for name, tensor in self._all.items():
            tensor[members] = values[name]


class Terms:
    """A term of the loss over a tile's clients, whose given values stand one client after the other.

    Args:
        term: with one tensor per client for each argument.
        begin: where each client's examples begin in the packed data, [C].
    """

    def __init__(self, term: Term, begin: NDArray[np.int64]) -> None:
        self._loss = term.loss
        self._given = [torch.cat(list(each)) for each in term.given]
        sizes = [len(one) for one in term.given[0]] if term.given else [0] * len(begin)
        self._offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(sizes)[:-1])) - begin)

    def take(self, rows: NDArray[np.int64], places: Tensor) -> Term:
        """The term of some rows [k] on their batches, at places [k, b] of the packed data."""
        at = places + self._offsets[torch.from_numpy(rows)][:, None]
        flat = at.reshape(-1)
        return Term(
            self._loss, tuple(g.index_select(0, flat.to(g.device)).view(*at.shape, *g.shape[1:]) for g in self._given)
        )


class Rows(Cohort):
    """A tile of clients at work."""

    def attach(
        self, train: "Split", places: NDArray[np.int64], seed: int, how: Paths, arena: Arena | None = None
    ) -> None:
        """Give the clients their examples.

        Args:
            train: everybody's training examples.
            places: of the clients in it, [C].
            seed: of keyed randomness.
            how: outputs and gradients are found.
            arena: memory for what lives no longer than this tile; default torch's own.
        """
        self._train, self._places, self._seed, self._how, self._arena = train, places, seed, how, arena
        self._keys = random.client_keys(self.clients)
        offsets = train.offsets.numpy()
        self._begin = offsets[places]
        self._sizes = offsets[places + 1] - self._begin
        self._example_bytes = sum(t.element_size() * math.prod(t.shape[1:]) for t in train.fields.values())

    # --- training -----------------------------------------------------------------------------------------------------

    def sgd(
        self,
        rows: Tensor,
        plan: Plan,
        *,
        anchor: Tensor | None = None,
        pull: float = 0.0,
        shift: Tensor | None = None,
        train: Tensor | None = None,
        buffers: Tensor | None = None,
        term: Term | None = None,
        purpose: str = "train",
    ) -> Trained:
        if plan.privacy is not None:
            if term is not None:
                self.expose("the features of a term of the loss")
            arena = self._arena or Arena()
            return train_privately(
                self, self._clipped_sums(rows, purpose, train, arena), rows, plan, anchor=anchor, pull=pull,
                shift=shift, train=train, buffers=buffers, purpose=purpose, arena=arena,
            )  # fmt: skip
        self.expose("training without privacy=")
        model, count = self.model, len(self.clients)
        floating = (self.buffers if buffers is None else buffers).detach().clone()
        totals = plan.steps_of(self._sizes, self.clients, self.round)
        loss = torch.zeros(count, dtype=torch.float64, device=rows.device)
        seen, rates = np.zeros(count), np.zeros(count)
        by = self._factored(plan, totals, rows, anchor, pull, shift, train)
        terms = None if term is None else Terms(term, self._begin)
        if terms is not None and not self._writes:
            by = {}
        strips = self._strips(by)
        trained: list[Blocks] = []
        kept: dict[int, Tensor] = {}

        def places(number: int, strip: slice) -> Tensor:
            """Where the strip's rows find their examples, in the order of a pass: int64 [k, n]."""
            if number not in kept:
                room = GATHER_BYTES // (8 * count * int(self._sizes.max()))
                rows = slice(None) if len(strips) > 1 and len(kept) < room else strip
                order = orders(plan, self._seed, purpose, self.round, number, self._keys[rows], self._sizes[rows])
                found = torch.from_numpy(order + self._begin[rows, None])
                if rows is strip:
                    return found
                kept[number] = found  # drawn once for the whole tile
            return kept[number][strip]

        for strip in strips:
            y = Blocks.of(model.layout, rows[strip], self._arena, by)
            own = {n: t if t is None or t.ndim == 1 else t[strip] for n, t in (("anchor", anchor), ("shift", shift))}
            rule = Rule(plan, model.layout, y, **own, pull=pull, train=train, arena=self._arena)
            held = Buffers(model, floating[strip])
            self._train_strip(strip, y, held, rule, totals, purpose, places, terms, loss, seen, rates)
            trained.append(y)

        def whole(start: Tensor | None = None) -> Tensor:
            if len(trained) == 1:
                return trained[0].rows() if start is None else trained[0].minus(start)
            out = (self._arena or Arena()).empty(count, model.size, like=rows)
            for strip, y in zip(strips, trained, strict=True):
                y.rows(out[strip]) if start is None else y.minus(start[strip], out[strip])
            return out

        def total(start: Tensor, weight: Tensor, last: bool) -> Tensor:
            if last and count == 1 and not by and weight.dtype == start.dtype:
                return trained[0].spent(start, weight)
            out = (self._arena or Arena()).empty(model.size, like=weight).zero_()
            for strip, y in zip(strips, trained, strict=True):
                y.total(start[strip], weight[strip], out)
            return out

        def change(start: Tensor) -> Change:
            return Change((count, model.size), lambda: whole(start), lambda weight, last: total(start, weight, last))

        return Trained(
            whole,
            floating,
            torch.from_numpy(totals).to(rows)[:, None],
            torch.from_numpy(rates).to(rows)[:, None],
            loss[:, None],
            torch.as_tensor(seen, device=rows.device)[:, None],
            change=change,
        )

    def _clipped_sums(self, rows: Tensor, purpose: str, train: Tensor | None, arena: Arena) -> Sums:
        """Clients side by side where the model's layers allow, else each by itself."""
        layout, how = self.model.layout, self._how
        wanted = None if train is None else frozenset(i for i, (_, _, a, b) in enumerate(layout) if train[a:b].any())
        if train is not None and splits(layout, train):
            raise CompositionError(
                "a mask inside a parameter cannot be clipped example by example: train whole parameters."
            )
        program, room = how.program, None
        if program is not None and program.linear and not how.random:
            room = arena.empty(*rows.shape, like=rows)

        def summed(
            clients: Sequence[int], rows: Tensor, held: Tensor, places: Sequence[Tensor], step: int, clip: float
        ) -> Iterable[Tensor]:
            if program is not None and room is not None:
                return self._side_by_side(program, clients, rows, held, places, clip, wanted, room)
            return (
                self._by_itself(client, rows[client], held[client], own, purpose, step, clip, wanted)
                for client, own in zip(clients, places, strict=True)
            )

        return summed

    def _side_by_side(
        self,
        program: Program,
        clients: Sequence[int],
        rows: Tensor,
        held: Tensor,
        places: Sequence[Tensor],
        clip: float,
        wanted: frozenset[int] | None,
        room: Tensor,
    ) -> Tensor:
        """Sums [k, P] of clients' clipped gradients, some of their examples at a time.

        Rows and buffers are everybody's; where the answer fits into the room [C, P], it is there until the next.
        """
        model, sizes = self.model, np.array([len(own) for own in places])
        pieces = range(0, int(sizes.max(initial=0)), TOGETHER)
        one = len(pieces) == 1 and int(sizes.min()) > 0  # a Poisson sample may be empty
        total = rows.new_empty(0) if one else rows.new_zeros(len(clients), rows.shape[1], dtype=torch.float64)
        for begin in pieces:
            among = np.flatnonzero(sizes > begin).tolist()
            members = torch.tensor([clients[k] for k in among])
            own = [places[k][begin : begin + TOGETHER] for k in among]
            index = pad_sequence(own, batch_first=True)  # filled up with the client's first example
            y = rows if len(members) == len(rows) else rows[members]
            parts = list(model.layout.view(y).values())
            buffers = Buffers(model, held[members]).take(slice(None))
            batch = self._gather(index + torch.from_numpy(self._begin)[members][:, None])
            sink = PerBatch(model.layout, room[: len(own)], [len(o) for o in own], wanted)
            output, run = program.forward(parts, buffers, batch, trained=wanted)
            _, slope = slopes(model.loss, output.flatten(0, 1)[:, None], batch["y"].flatten(0, 1)[:, None])
            program.backward(run, slope.view(output.shape), sink)
            squares = sink.squares()
            found = sink.totals(factors(squares, clip), squares.isfinite())
            if one:
                return found
            total[among] += found
        return total

    def _by_itself(
        self,
        client: int,
        y: Tensor,
        held: Tensor,
        places: Tensor,
        purpose: str,
        step: int,
        clip: float,
        wanted: frozenset[int] | None,
    ) -> Tensor:
        """The sum [P] of a client's clipped gradients: its examples are rows of the same model, some at a time."""
        model, how = self.model, self._how
        widest = TOGETHER if how.program is not None or how.batched else 1
        pieces = places.split(widest) if len(places) else ()  # a Poisson sample may be empty
        total = torch.zeros(0) if len(pieces) == 1 else y.new_zeros(len(y), dtype=torch.float64)
        for some in pieces:
            parts: list[Part] = [t.expand(len(some), *t.shape) for t in model.layout.view(y).values()]
            own = Buffers(model, held.expand(len(some), -1).clone()).take(slice(None))
            batch = self._gather((some + int(self._begin[client]))[:, None])
            keys, numbers = example_keys(self._keys[client], some), np.full(len(some), step)
            draw = Draw(self._seed, purpose, self.round, keys, numbers) if how.random else None
            sink = PerExample(parts, wanted)
            self._gradients(parts, own, batch, draw, sink, wanted)
            found = sink.total(factors(sink.squares(), clip))
            if len(pieces) == 1:
                return found
            total += found
        return total

    def _factored(
        self,
        plan: Plan,
        totals: NDArray[np.int64],
        rows: Tensor,
        anchor: Tensor | None,
        pull: float,
        shift: Tensor | None,
        train: Tensor | None,
    ) -> dict[int, int]:
        """Weights that stand as factors, with room for the places the tile's clients will see."""
        layout, uses = self.model.layout, self._how.uses
        if not uses or not by_factors(plan, self.round, int(totals.max()), layout, rows, anchor, pull, shift, train):
            return {}
        return factored(uses, int(plan.total_examples(self._sizes).max()))

    @property
    def _writes(self) -> bool:
        """Whether a program knows the features that a term goes through."""
        return self._how.program is not None and self._how.program.features is not None

    def _strips(self, factored: Mapping[int, int]) -> list[slice]:
        """The tile in pieces whose parameters stay in the cache from a client's first step to its last."""
        count, layout = len(self.clients), self.model.layout
        size = sum(b - a for i, (_, _, a, b) in enumerate(layout) if i not in factored)
        width = max(1, STRIP_BYTES // max(1, size * self.model.dtype.itemsize))
        bounds = np.linspace(0, count, math.ceil(count / width) + 1).round().astype(int).tolist()
        return [slice(a, b) for a, b in pairwise(bounds)]

    def _train_strip(
        self,
        strip: slice,
        y: Blocks,
        held: Buffers,
        rule: Rule,
        totals: NDArray[np.int64],
        purpose: str,
        places: Callable[[int, slice], Tensor],
        terms: "Terms | None",
        loss: Tensor,
        seen: NDArray[np.float64],
        rates: NDArray[np.float64],
    ) -> None:
        """Train some of the rows; `loss`, `seen` and `rates` of the whole tile are added to."""
        plan, how = rule.plan, self._how
        sizes, all_keys = self._sizes[strip], self._keys[strip]
        loss, seen, rates = loss[strip], seen[strip], rates[strip]
        number, index = -1, torch.empty(0, 0, dtype=torch.int64)
        for group in schedule(plan.batch_size, sizes, totals[strip]):
            if group.number != number:
                number = group.number
                index = places(number, strip)
            members, size, keys = group.members, group.size, all_keys[group.rows]
            at = members if isinstance(members, slice) else members.to(loss.device)
            parts, own = y.take(at), held.take(at)
            group_loss = loss.new_zeros(len(keys))
            step_rates = plan.rate(self.round, group.steps)
            step = rule.begin(parts, at, step_rates, group.steps)
            steps_at_once = max(1, GATHER_BYTES // (len(keys) * size * self._example_bytes))
            for first in range(0, group.count, steps_at_once):
                steps = min(steps_at_once, group.count - first)
                found = _chosen(index, members, group.begins + first * size, steps * size)
                batches = self._gather(found)
                for j in range(steps):
                    now = slice(j * size, (j + 1) * size)
                    batch = {n: t[:, now] for n, t in batches.items()} if steps > 1 else batches
                    term = None if terms is None else terms.take(strip.start + group.rows, found[:, now])
                    numbers = group.steps
                    if first + j:
                        numbers = numbers + (first + j)
                        step_rates = step_rates if plan.schedule is None else plan.rate(self.round, numbers)
                        step = step.again(step_rates, numbers)
                    draw = Draw(self._seed, purpose, self.round, keys, numbers) if how.random else None
                    losses = self._gradients(parts, own, batch, draw, step, rule.trained, term)
                    step.finish()
                    group_loss.add_(losses, alpha=size)
                    rates[group.rows] += step_rates
            if isinstance(at, Tensor):
                y.put(at, parts)
                held.put(at, own)
            loss[at] += group_loss
            seen[group.rows] += size * group.count

    def gradient(self, rows: Tensor, batch: Batch | None = None) -> Tensor:
        self.expose("gradient")
        if batch is not None:
            return self._gradient(rows, self.buffers.clone(), batch, self._still(self._keys))[0]
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        for size in np.unique(self._sizes):
            members = np.flatnonzero(self._sizes == size)
            at = torch.from_numpy(members).to(rows.device)
            inputs = self._gather(torch.from_numpy(self._begin[members][:, None] + np.arange(size)))
            out[at], _ = self._gradient(rows[at], self.buffers[at], inputs, self._still(self._keys[members]))
        return out

    def minibatch(
        self, rows: Tensor, plan: Plan, step: int, *, buffers: Tensor | None = None, purpose: str = "train"
    ) -> Minibatch:
        self.expose("minibatch")
        held = (self.buffers if buffers is None else buffers).detach().clone()
        out = rows.new_zeros(rows.shape)
        loss = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        examples = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for members, batch in self._minibatches(plan, step, purpose):
            at = torch.from_numpy(members).to(rows.device)
            draw = Draw(self._seed, purpose, self.round, self._keys[members], np.full(len(members), step))
            own = held[at]
            out[at], losses = self._gradient(rows[at], own, batch, draw)
            held[at], loss[at], examples[at] = own, losses.double(), float(batch["y"].shape[1])
        return Minibatch(out, held, loss[:, None], examples[:, None])

    def curvature(self, rows: Tensor, along: Tensor, plan: Plan, step: int, *, purpose: str = "train") -> Tensor:
        self.expose("curvature")
        out = rows.new_zeros(rows.shape)
        for members, batch in self._minibatches(plan, step, purpose):
            for i, member in enumerate(members.tolist()):  # the module itself: a program has no second backward
                one = slice(member, member + 1)
                parts = Blocks.of(self.model.layout, rows[one]).parts
                held = Buffers(self.model, self.buffers[one].detach().clone()).take(slice(None))
                draw = Draw(self._seed, purpose, self.round, self._keys[one], np.array([step]))
                inputs = {n: t[i : i + 1] for n, t in batch.items()}
                leaves = cast("list[Tensor]", parts)
                out[one] = paths.curvature(self.model, leaves, held, inputs, draw, along[one], seeded=self._how.draws)
        return out

    def _minibatches(self, plan: Plan, step: int, purpose: str) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """The examples of a local step: rows that have one, grouped by the size of their batch."""
        totals = plan.steps_of(self._sizes, self.clients, self.round)
        key = (self._seed, purpose, self.round)
        for members, places in minibatches(plan, step, key, self._keys, self._sizes, totals):
            yield members, self._gather(torch.from_numpy(places + self._begin[members, None]))

    def _still(self, keys: NDArray[np.uint64]) -> Draw:
        """What keys dropout outside of training."""
        return Draw(self._seed, "gradient", self.round, keys, np.zeros(len(keys), np.int64))

    def _gradient(self, rows: Tensor, buffers: Tensor, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Gradients [k, P] at rows [k, P], one batch each, and mean losses [k]; buffers are updated in place."""
        parts = Blocks.of(self.model.layout, rows).parts
        own = Buffers(self.model, buffers).take(slice(None))
        sink = Gradients(parts)
        losses = self._gradients(parts, own, batch, draw, sink, None)
        return torch.cat([g.reshape(len(g), -1) for g in sink.filled()], dim=1), losses

    def _gradients(
        self,
        parts: list[Part],
        held: Mapping[str, Tensor],
        batch: Batch,
        draw: Draw | None,
        sink: Sink,
        trained: frozenset[int] | None,
        term: Term | None = None,
    ) -> Tensor:
        """Mean losses [k] of each row's batch; gradients go to the sink."""
        how = self._how
        if how.program is not None and (term is None or how.program.features is not None):
            return paths.written(
                self.model, how.program, parts, held, batch, draw, sink, trained, term, mixed=how.mixed
            )
        if term is not None:
            tensors = cast("list[Tensor]", parts)
            return paths.with_term(
                self.model, tensors, held, batch, draw, sink, term, seeded=how.draws, mixed=how.mixed
            )
        return paths.by_autograd(
            self.model, cast("list[Tensor]", parts), held, batch, draw, sink, batched=how.batched, seeded=how.draws,
            mixed=how.mixed,
        )  # fmt: skip

    def _gather(self, places: Tensor) -> dict[str, Tensor]:
        """Examples [k, b, ...] at places [k, b]."""
        flat = places.reshape(-1).to(next(iter(self._train.fields.values())).device)
        return {n: t.index_select(0, flat).view(*places.shape, *t.shape[1:]) for n, t in self._train.fields.items()}

    # --- looking ------------------------------------------------------------------------------------------------------

    def loss(self, rows: Tensor) -> Tensor:
        self.expose("loss")
        outputs, target = self.predict(rows), self._train.fields["y"]
        values = [
            self.model.loss.mean(output, target[begin : begin + size])
            for output, begin, size in zip(outputs, self._begin, self._sizes, strict=True)
        ]
        return torch.stack(values)[:, None]

    def predict(self, rows: Tensor) -> list[Tensor]:
        self.expose("predict")
        return self.forward(rows, self.buffers, self._train, self._places)

    def forward(self, rows: Tensor, buffers: Tensor, split: "Split", places: NDArray[np.int64]) -> list[Tensor]:
        program = self._how.evaluating
        if program is None:
            model = self.model
            with torch.no_grad():
                return [
                    model.call(
                        model.layout.view(row), model.buffer_layout.view(held), split.client(int(place)), train=False
                    )
                    for row, held, place in zip(rows, buffers, places, strict=True)
                ]
        offsets = split.offsets.numpy()
        begins = offsets[places]
        sizes = offsets[places + 1] - begins
        order = np.argsort(-sizes, kind="stable")
        by_size = torch.from_numpy(order).to(rows.device)
        y = Blocks.of(self.model.layout, rows[by_size], self._arena)
        held = Buffers(self.model, buffers[by_size].detach().clone())
        begins, sizes = begins[order], sizes[order]
        pieces: list[list[Tensor]] = [[] for _ in order]
        for first in range(0, int(sizes.max(initial=0)), LOOK):
            # Examples do not see each other here, so that a short row's last one may stand in for what it lacks.
            active = int((sizes > first).sum())
            width = min(LOOK, int(sizes[0]) - first)
            within = np.minimum(first + np.arange(width), sizes[:active, None] - 1)
            taken = torch.from_numpy(begins[:active, None] + within)
            batch = {n: t[taken.to(t.device)] for n, t in split.fields.items()}
            members = slice(0, active)
            output, _ = program.forward(y.take(members), held.take(members), batch, backward=False)
            for i in range(active):
                pieces[i].append(output[i, : int(min(width, sizes[i] - first))])
        found: list[Tensor | None] = [None] * len(order)
        for i, place in enumerate(order):
            if pieces[i]:
                found[int(place)] = pieces[i][0] if len(pieces[i]) == 1 else torch.cat(pieces[i])
        like = next((f for f in found if f is not None), None)
        nothing = rows.new_empty(0) if like is None else like[:0]
        return [nothing if f is None else f for f in found]

    def inputs(self, rows: Tensor, layer: str) -> list[Tensor]:
        self.expose("what flows into a layer")
        model, outputs = self.model, list[Tensor]()
        for row, held, place in zip(rows, self.buffers, self._places, strict=True):
            views, own = model.layout.view(row), model.buffer_layout.view(held)
            outputs.append(model.inputs(layer, views, own, self._train.client(int(place))))
        return outputs

    def targets(self) -> list[Tensor]:
        self.expose("targets")
        return [self._train.client(int(place))["y"] for place in self._places]

    def features(self, rows: Tensor, *, buffers: Tensor | None = None) -> list[Tensor]:
        self.expose("features")
        model, outputs = self.model, list[Tensor]()
        with torch.no_grad():
            for row, held, place in zip(rows, self.buffers if buffers is None else buffers, self._places, strict=True):
                views, own = model.layout.view(row), model.buffer_layout.view(held)
                outputs.append(model.features(views, own, self._train.client(int(place))))
        return outputs


def _chosen(index: Tensor, members: Members, begins: NDArray[np.int64], count: int) -> Tensor:
    """Places [k, count] of the next examples of each row in the packed data."""
    if bool((begins == begins[0]).all()):
        return index[members, int(begins[0]) : int(begins[0]) + count]
    return index[members].gather(1, torch.from_numpy(begins)[:, None] + torch.arange(count))
