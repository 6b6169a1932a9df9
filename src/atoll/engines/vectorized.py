"""The fast path: a tile of clients is the rows of one matrix, trained by one forward and one backward per step.

The gradient of the *sum* of the clients' mean losses with respect to the rows is the matrix of per-client gradients.

Which path a model takes follows from the model and the data alone, in this order:

1. A model made of layers that have a form on rows (`forms.py`): a program (`program.py`), whose backward takes the
   local step inside its products.
2. Without one, large models (more than `LARGE` parameters), recurrent layers and convolutions, and models that draw
   random numbers inside torch's kernels: one client at a time, by autograd.
3. All others: rows by torch's general batching transform.

Programs and batched forwards are tried first on models that differ: outputs, buffers and gradients must be those of
the module itself, or the next path is taken, with the reason.

A tile is as wide as its parameters and activations stay near the cores: `TILE_BYTES` of each at most, and `TILE_ROWS`
clients. Found by measurement: narrower tiles only pay for more calls, wider ones for memory further away. A cohort of
more than `SHARED_BYTES` of parameters has two tiles at least, for two workers.
"""

import math
from math import prod
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from atoll import random
from atoll.engines import paths
from atoll.engines.acceptance import Traits
from atoll.engines.arena import Arena
from atoll.engines.base import Chosen, Engine, Remembering, Tile
from atoll.engines.dropout import Draw
from atoll.engines.factors import Use, factored
from atoll.engines.forms import Unsupported
from atoll.engines.placing import CPU, Placed, resolve_device
from atoll.engines.program import Program
from atoll.engines.steps import Gradients
from atoll.engines.tile import Buffers, Paths, Rows
from atoll.errors import invalid
from atoll.local import Plan
from atoll.messages import Task
from atoll.model import Batch, Model
from atoll.vectors import Layout

if TYPE_CHECKING:
    from atoll.data import FederatedDataset
    from atoll.rounds import Process

LARGE = 2_000_000
TILE_BYTES = 8 * 2**20
TILE_ROWS = 128
SHARED_BYTES = 2 * 2**20

ROWS = 3
"""Rows of a trial."""


NOISE = 2**16 + 1
"""Numbers of noise that are drawn, and then repeated: of a large model it takes longer to draw as many as to train."""

Trio = tuple[Tensor, Tensor, Batch, Draw]
"""Rows and buffers of a trial that differ from each other, the same batch for all, and their draw."""

WRITTEN = "all its layers have a form on rows"


class Vectorized(Engine):
    """Runs tiles of clients as rows.

    Args:
        strategy: "rows", "single" (one client at a time, by autograd), or "auto" to choose by the model.
        tile: clients in a tile; default by the model's size.
        threads: torch's threads while the engine works. Small operations only wait for more than one, and the bits of a
            result may depend on how many there are.
        device: where rows are trained: "cpu" (which "auto" means), or "cuda", on which weights never stand as factors.
    """

    name = "vectorized"

    def __init__(
        self,
        strategy: Literal["auto", "rows", "single"] = "auto",
        *,
        tile: int | None = None,
        threads: int = 1,
        device: str | torch.device = "auto",
    ) -> None:
        super().__init__(threads)
        self._device = resolve_device(device)
        self._placed = None if self._device == CPU else Placed(self._device)
        if strategy not in ("auto", "rows", "single"):
            raise invalid("strategy", strategy, '"auto", "rows" or "single"')
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise invalid("tile", tile, "a number of clients of at least 1")
        self._asked: Literal["auto", "rows", "single"] = strategy
        self._tile = tile
        self._reason = ""
        self._width = 1
        self._rows, self._row, self._activations = False, 1, 0
        self._plans: tuple[Plan, ...] = ()
        self._layout, self._item = Layout((), ()), 1
        self._paths: Paths | None = None
        self._arena = Arena()

    def describe(self) -> dict[str, Any]:
        """Which path ran, and why; `factors`: up to how many examples a client's weights stand as factors."""
        one = self._width == 1 and self._tile is None
        how = "one client at a time" if one else "rows of one matrix"
        said = {"engine": self.name, "strategy": how, "tile": self._width, "reason": self._reason}
        uses = {} if self._paths is None else self._paths.uses
        factors = {self._layout.names[n]: use.most // use.places for n, use in uses.items() if use.most >= use.places}
        return said | ({"factors": factors} if factors else {}) | self.told

    def fresh(self) -> "Vectorized":
        return Vectorized(self._asked, tile=self._tile, threads=self._threads, device=self._device)

    def split(self, task: Task, data: "FederatedDataset") -> list[Chosen]:
        """Tiles of the cohort's clients, the largest first: clients that are done leave a tile from its end."""
        sizes = data.train.sizes.numpy()[data.places(task.clients)]
        order = np.argsort(-sizes, kind="stable")
        if not len(order):
            return []
        widest, narrowest = self._fits(int(sizes.min())), self._fits(int(sizes.max()))
        self._width = narrowest
        if widest == narrowest:
            count = tile_count(len(order), widest)
            if count == 1 < len(order) and self._tile is None and len(order) * self._row > SHARED_BYTES:
                count = 2  # there is enough to do for two workers
            return np.array_split(order, count)
        tiles: list[Chosen] = []
        while len(order):  # large clients, with many activations, stand in narrower tiles
            width = self._fits(int(sizes[order[0]]))
            tiles.append(order[:width])
            order = order[width:]
        return tiles

    def tile(
        self, process: "Process", task: Task, data: "FederatedDataset", memory: Remembering, chosen: Chosen
    ) -> Tile:
        """A tile, whose work is valid until the next is made."""
        assert self._paths is not None, "prepare() comes first"
        self._arena.reset()
        clients = [task.clients[i] for i in chosen]
        places = data.places(clients)
        remembered = process.remembered(task, clients, memory)
        buffers, own = process.start(task, remembered, len(clients))
        examples = data.train.sizes[torch.from_numpy(places)].double()[:, None]
        weights, there = process.aggregator.weigh(examples, clients), buffers.device
        cohort = Rows(
            process.model,
            process.selection,
            clients=clients,
            round=task.round,
            population=task.population,
            examples=examples.to(there),
            weights=weights.to(there),
            buffers=buffers,
            own=own,
        )
        cohort.attach(data.train, places, task.seed, self._paths, self._arena)
        cohort.noise_multiplier = process.example_multiplier
        return cohort, remembered

    def rest(self) -> None:
        self._arena.trim()
        if self._placed is not None:
            self._placed.rest()

    def _choose(self, process: "Process", data: "FederatedDataset") -> None:
        model, traits = process.model, self.traits
        program: Program | None = None
        evaluating: Program | None = None
        batched, activations, self._reason = False, 0, ""
        uses: dict[int, Use] = {}
        if self._asked == "single":
            self._reason = "chosen by hand"
        else:
            three = _trio(model, traits.sample)
            program, activations, uses, why = _program(model, traits, three, mixed=self._mixed)
            evaluating = None if traits.stateful else _evaluating(model, traits.sample, three)
            single = None if program is not None else _single(model, traits)
            if program is not None:
                self._reason = WRITTEN
            elif single is not None and (self._asked == "auto" or traits.draws or traits.stateful):
                self._reason = single if single == why else f"{single}; {why}"
            else:
                refused = _tables(model) or _trial(model, three, None)
                batched = refused is None
                self._reason = f"batching transform: {why}" if refused is None else f"{refused}; {why}"
            if self._asked == "rows":
                if program is None and not batched:
                    raise invalid("strategy", "rows", '"single" or "auto" for this model', f"Reason: {self._reason}.")
                self._reason = f"chosen by hand; {self._reason}"
        if self._placed is not None:
            uses = {}  # factors count their places on the CPU
        self._paths = Paths(program, uses, evaluating, batched, traits.dropout, traits.draws, self._mixed)
        self._rows = program is not None or batched
        self._row, self._activations = model.size * model.dtype.itemsize, activations
        if process.algorithm.statistics:  # which may be much longer than the model
            self._row = process.length * process.row_dtype.itemsize
        self._plans = process.algorithm.plans
        self._layout, self._item = model.layout, model.dtype.itemsize
        self._width = self._fits(int(data.train.sizes.max()))
        if self._rows and self._width == 1 and self._tile is None:
            self._reason += f", and the {model.size:,} parameters and activations of one client fill a tile"

    def _fits(self, examples: int) -> int:
        """Clients of so many examples whose parameters and activations stay near the cores."""
        if not self._rows:
            return 1
        if self._tile is not None:
            return self._tile
        batches = [p.batch_size for p in self._plans]
        batch = max((examples if b is None else min(b, examples) for b in batches), default=1)
        row = self._footprint(examples)
        return max(1, min(TILE_ROWS, TILE_BYTES // row, TILE_BYTES // max(1, batch * self._activations)))

    def _footprint(self, examples: int) -> int:
        """Bytes of a client's parameters while it trains on so many examples; weights may stand as factors."""
        assert self._paths is not None
        sizes = np.array([examples])
        seen = max((int(p.total_examples(sizes)[0]) for p in self._plans), default=0)
        private = any(p.privacy is not None for p in self._plans)  # noise has no factors
        by = {} if private else factored(self._paths.uses, seen)
        saved = sum(prod(self._layout.shapes[n]) - room * sum(self._layout.shapes[n]) for n, room in by.items())
        return self._row - saved * self._item


def tile_count(clients: int, width: int) -> int:
    """Tiles of a cohort: as equal as can be, and an even number of several, so that two workers have the same to do."""
    count = max(1, math.ceil(clients / width))
    return min(clients, count + count % 2) if count > 1 else 1


def _program(
    model: Model, traits: Traits, three: Trio, *, mixed: bool = False
) -> tuple[Program | None, int, dict[int, Use], str]:
    """The model's program, bytes of activations for an example, uses of its weights, and why there is no program."""
    sample = traits.sample
    if traits.draws or traits.stateful:
        return None, 0, {}, _unseen(traits)
    try:
        program = Program(model)
    except Unsupported as error:
        return None, 0, {}, str(error)
    reason = _trial(model, three, program)
    if reason is not None:
        return None, 0, {}, reason
    parts = [t[None] for t in model.layout.view(model.init()).values()]
    held = Buffers(model, model.init_buffers()[None]).take(slice(None))
    draw = Draw(0, "trial", 0, np.zeros(1, np.uint64), np.zeros(1, np.int64))
    batch = {n: t[None] for n, t in sample.items()}
    if mixed and (reason := _rounded(model, program, parts, held, batch, draw)) is not None:
        return None, 0, {}, reason
    _, run = program.forward(parts, held, batch, draw=draw)
    values = {t.data_ptr(): t.nbytes for t in run.values if isinstance(t, Tensor)}
    count = len(sample["y"])
    uses = {} if mixed else program.uses(run, count)  # what stands as factors would be rounded twice
    return program, sum(values.values()) // count, uses, ""


def _rounded(
    model: Model, program: Program, parts: list[Tensor], held: dict[str, Tensor], batch: Batch, draw: Draw
) -> str | None:
    """Why a program cannot run with rounded products, or None."""
    own = Draw(draw.seed, draw.purpose, draw.round, draw.clients, draw.steps)
    copies = {n: t.clone() for n, t in held.items()}
    try:
        paths.written(model, program, parts, copies, batch, own, Gradients(parts), None, mixed=True)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"its program fails in bfloat16 ({type(error).__name__}: {lines[0] if lines else 'without a text'})"
    return None


def _evaluating(model: Model, sample: Batch, three: Trio) -> Program | None:
    """The program of the evaluating forward, or None where its outputs are not the module's, example by example."""
    try:
        program = Program(model, train=False)
        rows, buffers, batch, _ = three
        parts = list(model.layout.view(rows).values())
        held = Buffers(model, buffers.clone())
        output, _ = program.forward(parts, held.take(slice(None)), batch, backward=False)
        for i in range(ROWS):
            own = model.layout.view(rows[i]), model.buffer_layout.view(buffers[i])
            # One by one: evaluation cuts a client's examples into pieces, which must not change what comes out.
            with torch.no_grad():
                alone = [
                    model.call(*own, {n: t[k : k + 1] for n, t in sample.items()}, train=False)
                    for k in range(len(sample["y"]))
                ]
            expected = torch.cat(alone)
            if output[i].shape != expected.shape or not _near(output[i], expected, _peak(expected)):
                return None
    except Exception:
        # Whatever fails here runs client by client, through the module itself.
        return None
    return program


def _tables(model: Model) -> str | None:
    """Why a model without a form on rows must not be batched, or None: its tables would be read across clients."""
    for name, part in model.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            return f"the batching transform does not keep the indices of {name or 'the embedding'!r} to its own table"
    return None


def _unseen(traits: Traits) -> str:
    """What the model does that neither a trace nor a batching transform sees."""
    if traits.stateful:
        return "its forward changes attributes of its own, which clients then share"
    return "the model draws random numbers unasked (dropout in attention or recurrent layers, Python's or numpy's own)"


def _single(model: Model, traits: Traits) -> str | None:
    """Why a model without a program runs one client at a time, or None."""
    if traits.draws or traits.stateful:
        return _unseen(traits)
    if model.size > LARGE:
        return f"{model.size:,} parameters are more than {LARGE:,}"
    for name, part in model.modules():
        if isinstance(part, nn.RNNBase | nn.RNNCellBase):
            return f"the recurrent layer {name or type(part).__name__!r} has no batched kernel"
        if isinstance(part, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
            return f"the convolution {name or type(part).__name__!r} is faster one client at a time on a CPU"
    return None


def _trio(model: Model, sample: Batch) -> Trio:
    draw = random.generator(0, "trial")
    drawn = torch.randn(ROWS, min(NOISE, model.size), generator=draw, dtype=model.dtype)
    noise = drawn.repeat(1, -(-model.size // NOISE))[:, : model.size]
    more = torch.rand(ROWS, model.buffer_layout.size, generator=draw, dtype=model.dtype)  # variances stay positive
    noise[0], more[0] = 0.0, 0.0
    batch = {n: t.expand(ROWS, *t.shape).clone() for n, t in sample.items()}
    keys = Draw(0, "trial", 0, np.arange(ROWS, dtype=np.uint64), np.zeros(ROWS, np.int64))
    return model.init() + 0.1 * noise, model.init_buffers() + 0.1 * more, batch, keys


def _trial(model: Model, three: Trio, program: Program | None) -> str | None:
    """Why a program, or without one the batching transform, cannot be used; None: it gives what the module gives."""
    rows, buffers, batch, draw = three

    def outcome(chosen: slice, *, batched: bool) -> list[Tensor]:
        """Output, buffers and gradients [k, ...] of some of the rows."""
        parts = [t[chosen] for t in model.layout.view(rows).values()]
        held = Buffers(model, buffers[chosen].clone())
        inputs = {n: t[chosen] for n, t in batch.items()}
        own = Draw(draw.seed, draw.purpose, draw.round, draw.clients[chosen], draw.steps[chosen])
        if batched and program is not None:
            output, run = program.forward(parts, held.take(slice(None)), inputs, draw=own)
            sink = Gradients(parts)
            program.backward(run, _slope(output), sink)
            return [output, held.floating, *sink.filled()]
        leaves = {n: t.detach().clone().requires_grad_() for n, t in paths.named(model, parts).items()}
        with torch.enable_grad():
            own_buffers = held.take(slice(None))
            output = paths.forward(model, leaves, own_buffers, inputs, own, batched=batched, seeded=False)
            found = torch.autograd.grad((output * _slope(output)).sum(), list(leaves.values()), allow_unused=True)
        some = cast("tuple[Tensor | None, ...]", found)
        gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), some, strict=True)]
        return [output.detach(), held.floating, *gradients]

    try:
        together = outcome(slice(0, ROWS), batched=True)
        for i in range(ROWS):
            alone = outcome(slice(i, i + 1), batched=False)
            # Gradients that are nought but for rounding (a bias before BatchNorm) are judged by the largest of all.
            largest = max(_peak(t) for t in alone[2:])
            for place, (found, expected) in enumerate(zip(together, alone, strict=True)):
                scale = largest if place >= 2 else _peak(expected)
                if found[i].shape != expected[0].shape or not _near(found[i], expected[0], scale):
                    return "its batched forward or backward differs from the plain one"
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"its batched forward fails ({type(error).__name__}: {lines[0] if lines else 'without a text'})"
    return None


def _slope(output: Tensor) -> Tensor:
    """A different weight for every number of a row's output."""
    own = torch.arange(1, 1 + output[0].numel(), device=output.device, dtype=output.dtype)
    return own.view(output[0].shape).expand(output.shape)


def _near(found: Tensor, expected: Tensor, scale: float) -> bool:
    """Whether two tensors are equal but for rounding, of their own size or of things of size `scale`."""
    near = max(1e-3, 8 * torch.finfo(expected.dtype).eps) * _peak(expected) + 1e-5 * scale
    return bool(((found - expected).abs() <= near).all())


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
