"""The fast path: a tile of clients is the rows of one matrix, trained by one forward and one backward per step.

The gradient of the *sum* of the clients' mean losses with respect to the rows is the matrix of per-client gradients.
Leaves of the graph are views of the rows' storage, one for each parameter. A batch is never padded: at every step, rows
are grouped by their true batch size, and clients that are done leave the group.

Models for which rows do not pay run one client at a time through the same code, without the batching transform. The
rule, in this order:

1. large models (more than `LARGE` parameters), recurrent layers and, on a CPU, convolutions: one client at a time;
2. models that draw random numbers inside torch's kernels: one client at a time;
3. models made of layers that have a form on rows (`layers.py`): rows, layer by layer;
4. all others: rows by the general batching transform (vmap), unless their batched forward fails or differs from the
   plain one on a trial: then one client at a time, with the reason.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll import random
from atoll.cohort import Cohort
from atoll.engines.base import Engine, Tile, orders
from atoll.engines.dropout import KeyedDropout, SeededDraws
from atoll.engines.layers import Layers, Unsupported
from atoll.errors import invalid
from atoll.local import Plan
from atoll.memory import ClientMemory
from atoll.model import Batch, Model
from atoll.vectors import Layout, Trained

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, Split
    from atoll.rounds import Process, Task

LARGE = 2_000_000
TILE_BYTES = 4 * 2**20
TILE_ROWS = 128

Strategy = Literal["rows", "single"]


class Vectorized(Engine):
    """Runs tiles of clients as rows.

    Args:
        strategy: "rows", "single" (one client at a time), or "auto" to choose by the model.
        tile: clients in a tile; default by the model's size.
        threads: torch's threads while the engine works. Small operations only wait for more than one, and the bits of a
            result may depend on how many there are.
    """

    name = "vectorized"

    def __init__(
        self, strategy: Literal["auto", "rows", "single"] = "auto", *, tile: int | None = None, threads: int = 1
    ) -> None:
        super().__init__(threads)
        if strategy not in ("auto", "rows", "single"):
            raise invalid("strategy", strategy, '"auto", "rows" or "single"')
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise invalid("tile", tile, "a number of clients of at least 1")
        self._asked: Literal["auto", "rows", "single"] = strategy
        self._tile = tile
        self._strategy: Strategy = "rows"
        self._reason = ""
        self._width = 1
        self.layers: Layers | None = None

    def describe(self) -> dict[str, Any]:
        """Which path ran, and why."""
        how = "rows of one matrix" if self._strategy == "rows" else "one client at a time"
        return {"engine": self.name, "strategy": how, "tile": self._width, "reason": self._reason}

    @property
    def strategy(self) -> Strategy:
        """Which path runs."""
        return self._strategy

    def tiles(self, process: "Process", task: "Task", data: "FederatedDataset", memory: ClientMemory) -> Iterator[Tile]:
        """Tiles of the cohort\'s clients, the largest first."""
        sizes, places = data.train.sizes, torch.tensor([data.index(c) for c in task.clients], dtype=torch.int64)
        # Largest first: clients that are done leave a tile from its end.
        order = torch.argsort(sizes[places], descending=True, stable=True)
        for begin in range(0, len(order), self._width):
            chosen = order[begin : begin + self._width]
            clients = [task.clients[i] for i in chosen.tolist()]
            remembered = process.remembered(task, clients, memory)
            buffers, own = process.start(task, remembered, len(clients))
            examples = sizes[places[chosen]].double()[:, None]
            cohort = _Rows(
                process.model,
                process.selection,
                clients=clients,
                round=task.round,
                population=task.population,
                examples=examples,
                weights=process.aggregator.weigh(examples, clients),
                buffers=buffers,
                own=own,
            )
            cohort.attach(data.train, places[chosen].numpy(), task.seed, self)
            yield cohort, remembered

    def _choose(self, process: "Process", data: "FederatedDataset") -> None:
        model, sample = process.model, self.traits.sample
        self.layers = None
        reason = _single(model, self.traits.draws)
        if self._asked == "rows" and self.traits.draws:
            raise invalid("strategy", "rows", '"single" or "auto" for this model', f"Reason: {reason}.")
        self._strategy = "rows" if self._asked == "auto" else self._asked
        self._reason = "chosen by hand"
        if self._asked == "auto" and reason is not None:
            self._strategy, self._reason = "single", reason
        if self._strategy == "rows":
            self.layers, why = _layers(model, sample)
            if self._asked == "auto":
                self._reason = "all its layers have a form on rows" if why is None else f"batching transform: {why}"
            if self.layers is None:
                reason = _tables(model) or _trial(model, sample, None)
                if reason is not None and self._asked == "rows":
                    raise invalid("strategy", "rows", '"single" or "auto" for this model', f"Reason: {reason}.")
                if reason is not None:
                    self._strategy, self._reason = "single", reason
        row_bytes = model.size * model.init(None).element_size()
        self._width = max(1, min(TILE_ROWS, TILE_BYTES // row_bytes)) if self._tile is None else self._tile
        if self._strategy == "single":
            self._width = 1


def _tables(model: Model) -> str | None:
    """Why a model without a form on rows must not be batched, or None: its tables would be read across clients."""
    for name, part in model.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            return f"the batching transform does not keep the indices of {name or 'the embedding'!r} to its own table"
    return None


def _layers(model: Model, sample: Batch) -> tuple[Layers | None, str | None]:
    """The model's form on rows, or why it has none: traced, and tried on two rows that differ."""
    try:
        layers = Layers(model)
    except Unsupported as error:
        return None, str(error)
    reason = _trial(model, sample, layers)
    return (layers, None) if reason is None else (None, reason)


def _single(model: Model, draws: bool) -> str | None:
    """Why this model runs one client at a time, or None."""
    if model.size > LARGE:
        return f"{model.size:,} parameters are more than {LARGE:,}"
    for name, part in model.modules():
        if isinstance(part, nn.RNNBase | nn.RNNCellBase):
            return f"the recurrent layer {name or type(part).__name__!r} has no batched kernel"
        if isinstance(part, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
            return f"the convolution {name or type(part).__name__!r} is faster one client at a time on a CPU"
    if draws:
        return "the model draws random numbers inside torch's kernels (dropout in attention or recurrent layers)"
    return None


def _trial(model: Model, sample: Batch, layers: Layers | None) -> str | None:
    """Why a batched forward cannot be used for this model, or None: tried on two rows that differ."""
    noise = torch.randn(model.size, generator=random.generator(0, "trial"), dtype=model.dtype)
    rows = torch.stack((model.init(), model.init() + 0.1 * noise))
    batch = {n: torch.stack((t, t)) for n, t in sample.items()}
    clients, steps = np.arange(2, dtype=np.uint64), np.zeros(2, np.int64)

    def outcome(chosen: slice, count: int, *, batched: bool) -> list[Tensor]:
        """Output, buffers and gradients [k, ...] of some of the rows."""
        views = model.layout.view(rows[chosen])
        leaves = {n: t.detach().clone().requires_grad_() for n, t in views.items()}
        held = _Buffers(model, model.init_buffers().expand(count, -1).clone())
        inputs = {n: t[chosen] for n, t in batch.items()}
        draw = _Draw(0, "trial", 0, clients[chosen], steps[chosen])
        with torch.enable_grad():
            if batched:
                output = _forward_rows(model, leaves, held, inputs, draw, layers)
            else:
                output = _forward_single(model, leaves, held, inputs, draw, seeded=False)
            score = (output * torch.arange(1, 1 + output[0].numel(), device=output.device).view(output[0].shape)).sum()
            grads = torch.autograd.grad(score, list(leaves.values()), allow_unused=True)
            found = cast("tuple[Tensor | None, ...]", grads)
        gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]
        return [output.detach(), held.floating, *gradients]

    try:
        together = outcome(slice(0, 2), 2, batched=True)
        for i in range(2):
            alone = outcome(slice(i, i + 1), 1, batched=False)
            # Gradients that are nought but for rounding (a bias before BatchNorm) are judged by the largest of all.
            largest = max(_peak(t) for t in alone[2:])
            for place, (found, expected) in enumerate(zip(together, alone, strict=True)):
                near = max(1e-3, 8 * torch.finfo(expected.dtype).eps) * _peak(expected) + 1e-5 * (
                    largest if place >= 2 else _peak(expected)
                )
                if found[i].shape != expected[0].shape or not bool(((found[i] - expected[0]).abs() <= near).all()):
                    return "its batched forward or backward differs from the plain one"
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"its batched forward fails ({type(error).__name__}: {lines[0] if lines else ''})"
    return None


def _peak(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which keyed randomness the rows of one step use."""

    seed: int
    purpose: str
    round: int
    clients: NDArray[np.uint64]
    steps: NDArray[np.int64]


class _Buffers:
    """Floating and integer buffers of a tile's rows, updated in place by forwards."""

    def __init__(self, model: Model, floating: Tensor) -> None:
        self.floating = floating
        self._views = model.buffer_layout.view(floating)
        counts = len(floating)
        self._counters = {n: t.expand(counts, *t.shape).clone() for n, t in model.counters().items()}

    def take(self, rows: "slice | Tensor") -> dict[str, Tensor]:
        """Buffers of some rows: views for a slice, copies for a list."""
        return {n: t[rows] for source in (self._views, self._counters) for n, t in source.items()}

    def put(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Write copies back."""
        for source in (self._views, self._counters):
            for name, tensor in source.items():
                tensor[rows] = values[name]


def _forward_rows(
    model: Model,
    leaves: Mapping[str, Tensor],
    held: "_Buffers | Mapping[str, Tensor]",
    batch: Batch,
    draw: "_Draw | None",
    layers: Layers | None,
) -> Tensor:
    """Outputs [k, b, ...] of k rows on their own batches [k, b, ...], as one batched forward; `draw` keys dropout."""
    buffers = held.take(slice(None)) if isinstance(held, _Buffers) else held
    if layers is not None:
        with _keyed(draw, "all"):
            return layers(leaves, buffers, batch, len(next(iter(leaves.values()))))
    mode = _keyed(draw)

    def one(p: Mapping[str, Tensor], b: Mapping[str, Tensor], x: Batch, row: Tensor) -> Tensor:
        if isinstance(mode, KeyedDropout):
            mode.row = row
        with mode:
            return model.call(p, b, x, train=True)

    # The batching rules flatten statistics before they update them, and would update a copy of anything that is not
    # contiguous: they get contiguous copies, which are copied back.
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in buffers.items()}
    number = torch.arange(len(next(iter(leaves.values()))))
    output = torch.vmap(one, randomness="error")(dict(leaves), copies, dict(batch), number)
    for name, tensor in buffers.items():
        tensor.copy_(copies[name])
    return output


def _forward_single(
    model: Model,
    leaves: Mapping[str, Tensor],
    held: "_Buffers | Mapping[str, Tensor]",
    batch: Batch,
    draw: "_Draw | None",
    *,
    seeded: bool,
) -> Tensor:
    """Output [1, b, ...] of a single row, without the batching transform."""
    buffers = held.take(slice(None)) if isinstance(held, _Buffers) else held
    parameters = {n: t[0] for n, t in leaves.items()}
    own, inputs = {n: t[0] for n, t in buffers.items()}, {n: t[0] for n, t in batch.items()}
    if draw is None:
        return model.call(parameters, own, inputs, train=True)[None]
    with _keyed(draw):
        if not seeded:
            return model.call(parameters, own, inputs, train=True)[None]
        with SeededDraws(draw.seed, draw.purpose, draw.round, int(draw.clients[0]), int(draw.steps[0])):
            return model.call(parameters, own, inputs, train=True)[None]


def _keyed(draw: "_Draw | None", row: Literal["all"] | None = None) -> "KeyedDropout | nullcontext[None]":
    """What keys dropout in a forward."""
    if draw is None:
        return nullcontext()
    return KeyedDropout(draw.seed, draw.purpose, draw.round, draw.clients, draw.steps, row)


class _Rows(Cohort):
    """A tile of clients whose models are rows of one matrix."""

    def attach(self, train: "Split", places: NDArray[np.int64], seed: int, engine: Vectorized) -> None:
        self._train, self._seed, self._engine = train, seed, engine
        self._keys = random.client_keys(self.clients)
        offsets = train.offsets.numpy()
        self._begin = offsets[places]
        self._sizes = offsets[places + 1] - self._begin

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
        purpose: str = "train",
    ) -> Trained:
        model, count = self.model, len(self.clients)
        y = rows.detach().clone(memory_format=torch.contiguous_format)
        held = _Buffers(model, (self.buffers if buffers is None else buffers).detach().clone())
        rule = _Rule(plan, model.layout, y, anchor, pull, shift, train)
        trained = None if train is None else frozenset(n for n, _, a, b in model.layout if bool(train[a:b].any()))
        totals = plan.total_steps(self._sizes)
        loss_sum, seen = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        rates = np.zeros(count)
        number, index = -1, torch.empty(0, 0, dtype=torch.int64)
        for group in schedule(plan.batch_size, self._sizes, totals):
            if group.number != number:
                number = group.number
                order = orders(plan, self._seed, purpose, self.round, number, self._keys, self._sizes)
                index = torch.from_numpy(np.ascontiguousarray(order + self._begin[:, None]))
            members = group.members
            if group.begin is not None:
                taken = index[members, group.begin : group.begin + group.size]
            else:
                taken = index[members].gather(1, torch.from_numpy(group.begins)[:, None] + torch.arange(group.size))
            batch = {n: t[taken] for n, t in self._train.fields.items()}
            part, own = y[members], held.take(members)
            draw = _Draw(self._seed, purpose, self.round, self._keys[group.rows], group.steps)
            losses, gradients = self._gradients(part, own, batch, draw, trained)
            step_rates = plan.rate(self.round, group.steps)
            rule.step(part, members, gradients, step_rates, group.steps)
            if isinstance(members, Tensor):
                y[members] = part
                held.put(members, own)
            loss_sum[members] += losses.double() * group.size
            seen[members] += group.size
            rates[group.rows] += step_rates
        return Trained(
            y,
            held.floating,
            torch.from_numpy(totals).to(y)[:, None],
            torch.from_numpy(rates).to(y)[:, None],
            loss_sum[:, None],
            seen[:, None],
        )

    def gradient(self, rows: Tensor, batch: Batch | None = None) -> Tensor:
        model, steps = self.model, np.zeros(len(self.clients), np.int64)
        if batch is not None:
            held = _Buffers(model, self.buffers.detach().clone()).take(slice(None))
            draw = _Draw(self._seed, "gradient", self.round, self._keys, steps)
            parts = self._gradients(rows.detach(), held, batch, draw, None)[1]
            return torch.cat([g.reshape(len(g), -1) for g in parts.values()], dim=1)
        out = torch.empty(rows.shape, dtype=rows.dtype)
        for size in np.unique(self._sizes):
            members = np.flatnonzero(self._sizes == size)
            taken = torch.from_numpy(self._begin[members][:, None] + np.arange(size))
            own = _Buffers(model, self.buffers[torch.from_numpy(members)].detach().clone()).take(slice(None))
            draw = _Draw(self._seed, "gradient", self.round, self._keys[members], steps[members])
            inputs = {n: t[taken] for n, t in self._train.fields.items()}
            parts = self._gradients(rows[torch.from_numpy(members)].detach(), own, inputs, draw, None)[1]
            out[torch.from_numpy(members)] = torch.cat([g.reshape(len(g), -1) for g in parts.values()], dim=1)
        return out

    def _gradients(
        self, part: Tensor, buffers: Mapping[str, Tensor], batch: Batch, draw: _Draw, trained: frozenset[str] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss [k] of each row's batch and the gradient of each parameter [k, ...]; one per layout entry."""
        model, loss = self.model, self.model.loss
        with torch.enable_grad():
            views = model.layout.view(part)
            leaves = {n: t.detach().requires_grad_(trained is None or n in trained) for n, t in views.items()}
            traits = self._engine.traits
            keyed = draw if traits.dropout or traits.draws else None
            if self._engine.strategy == "rows":
                output = _forward_rows(model, leaves, buffers, batch, keyed, self._engine.layers)
            else:
                output = _forward_single(model, leaves, buffers, batch, keyed, seeded=traits.draws)
            if loss.returns == "per_example":
                flat = loss.per_example(output.flatten(0, 1), batch["y"].flatten(0, 1))
                losses = flat.view(len(part), -1).mean(dim=1)
            elif self._engine.strategy == "rows":
                losses = torch.vmap(loss.mean)(output, batch["y"])
            else:
                losses = loss.mean(output[0], batch["y"][0])[None]
            wanted = {n: t for n, t in leaves.items() if t.requires_grad}
            found = torch.autograd.grad(losses.sum(), list(wanted.values()), allow_unused=True)
        gradients = dict(zip(wanted, found, strict=True))
        return losses.detach(), {
            n: torch.zeros_like(t) if gradients.get(n) is None else gradients[n] for n, t in leaves.items()
        }  # pyright: ignore[reportReturnType]

    # --- looking ------------------------------------------------------------------------------------------------------

    def loss(self, rows: Tensor) -> Tensor:
        outputs = self.predict(rows)
        values = [
            self.model.loss.mean(output, self._train.fields["y"][begin : begin + size])
            for output, begin, size in zip(outputs, self._begin, self._sizes, strict=True)
        ]
        return torch.stack(values)[:, None]

    def predict(self, rows: Tensor) -> list[Tensor]:
        return self._look(rows, features=False)

    def features(self, rows: Tensor) -> list[Tensor]:
        return self._look(rows, features=True)

    def _look(self, rows: Tensor, *, features: bool) -> list[Tensor]:
        model, outputs = self.model, list[Tensor]()
        with torch.no_grad():
            for row, held, begin, size in zip(rows, self.buffers, self._begin, self._sizes, strict=True):
                batch = {n: t[begin : begin + size] for n, t in self._train.fields.items()}
                views, own = model.layout.view(row), model.buffer_layout.view(held)
                outputs.append(
                    model.features(views, own, batch) if features else model.call(views, own, batch, train=False)
                )
        return outputs


class _Rule:
    """The local step on rows: `y <- y - rate * (gradient + pull * (y - anchor) + shift)` under the plan's optimiser."""

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        y: Tensor,
        anchor: Tensor | None,
        pull: float,
        shift: Tensor | None,
        train: Tensor | None,
    ) -> None:
        if pull and anchor is None:
            raise invalid("anchor", None, "given when pull is not 0")
        self._plan, self._layout, self._pull = plan, layout, pull
        self._anchor = None if anchor is None else anchor.expand(y.shape)
        self._shift = None if shift is None else shift.expand(y.shape)
        self._mask = train
        state = plan.optimizer != "sgd"
        self._first = torch.zeros_like(y) if state or plan.momentum else None
        self._second = torch.zeros_like(y) if state else None
        self._direct = plan.plain and not pull and shift is None and train is None

    def step(
        self,
        part: Tensor,
        members: "slice | Tensor",
        gradients: Mapping[str, Tensor],
        rates: NDArray[np.float64],
        steps: NDArray[np.int64],
    ) -> None:
        """Move the rows `part` of a group in place."""
        plan, count = self._plan, len(part)
        constant = bool((rates == rates[0]).all())
        rate = float(rates[0]) if constant else torch.from_numpy(rates).to(part)[:, None]
        if self._direct and constant:
            # Each parameter in place: the gradient of a whole row is never put together.
            for name, view in self._layout.view(part).items():
                view.sub_(gradients[name], alpha=float(rates[0]))
            return
        gradient = torch.cat([g.reshape(count, -1) for g in gradients.values()], dim=1)
        if self._pull:
            assert self._anchor is not None
            gradient = gradient + self._pull * (part - self._anchor[members])
        if self._shift is not None:
            gradient = gradient + self._shift[members]
        change = -rate * gradient if plan.plain else self._adapted(part, members, gradient, rate, steps)
        if self._mask is not None:
            change = torch.where(self._mask, change, 0.0)
        part += change

    def _adapted(
        self,
        part: Tensor,
        members: "slice | Tensor",
        gradient: Tensor,
        rate: "float | Tensor",
        steps: NDArray[np.int64],
    ) -> Tensor:
        plan = self._plan
        if plan.optimizer in ("sgd", "adam") and plan.weight_decay:
            gradient = gradient + plan.weight_decay * part
        if plan.optimizer == "sgd":
            if self._first is not None:
                gradient = plan.momentum * self._first[members] + gradient
                self._first[members] = gradient
            return -rate * gradient
        assert self._first is not None and self._second is not None
        beta1, beta2 = plan.betas
        first = beta1 * self._first[members] + (1 - beta1) * gradient
        second = beta2 * self._second[members] + (1 - beta2) * gradient * gradient
        self._first[members], self._second[members] = first, second
        # In float64: 1 - beta2**t loses half of float32's digits in the first steps.
        scale1, scale2 = (torch.from_numpy(1 - beta ** (steps + 1.0)).to(part)[:, None] for beta in plan.betas)
        change = -rate * (first / scale1) / ((second / scale2).sqrt() + plan.eps)
        if plan.optimizer == "adamw" and plan.weight_decay:
            change = change - rate * plan.weight_decay * part
        return change


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that take a step together: the same number of examples each.

    Attributes:
        number: of the pass over the data.
        rows: which rows, ascending, int64 [k].
        members: the same as a slice where they follow each other (their tensors are views), else as a tensor.
        begin: where their batch begins in the pass, when it is the same for all.
        begins: where it begins for each, int64 [k].
        size: examples in the batch.
        steps: local step number of each, int64 [k].
    """

    number: int
    rows: NDArray[np.int64]
    members: "slice | Tensor"
    begin: int | None
    begins: NDArray[np.int64]
    size: int
    steps: NDArray[np.int64]


def schedule(batch_size: int | None, sizes: NDArray[np.int64], totals: NDArray[np.int64]) -> Iterator[Group]:
    """Every client's batches in its own order, grouped over clients by true batch size.

    Clients do not depend on each other, so in each pass all full batches come first, while the rows that have one
    left shrink, and the short last batches follow, grouped by length.

    Args:
        batch_size: of the plan; None: all examples.
        sizes: examples of each client, [C].
        totals: local steps of each client, [C].
    """
    everyone, done, number = np.arange(len(sizes)), np.zeros_like(sizes), 0
    full = np.zeros_like(sizes) if batch_size is None else sizes // batch_size
    rest = sizes if batch_size is None else sizes % batch_size
    while bool((done < totals).any()):
        left = totals - done
        turns = np.minimum(full, left)
        for j in range(int(turns.max(initial=0))):
            rows = everyone[turns > j]
            assert batch_size is not None
            yield _group(number, rows, np.full(len(rows), j * batch_size), batch_size, done[rows] + j)
        short = (rest > 0) & (left > full)
        for size in np.unique(rest[short]):
            rows = everyone[short & (rest == size)]
            begins = full[rows] * (batch_size or 0)
            yield _group(number, rows, begins, int(size), done[rows] + full[rows])
        done = done + turns + short
        number += 1


def _group(
    number: int, rows: NDArray[np.int64], begins: NDArray[np.int64], size: int, steps: NDArray[np.int64]
) -> Group:
    first, last = int(rows[0]), int(rows[-1])
    members = slice(first, last + 1) if last - first + 1 == len(rows) else torch.from_numpy(rows)
    begin = int(begins[0]) if bool((begins == begins[0]).all()) else None
    return Group(number, rows, members, begin, begins, size, steps)
