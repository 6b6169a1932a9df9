"""A federated process as pure functions: open a round, work on tiles of clients, close the round.

    open(state, clients) -> Task            what the cohort is asked to do
    work(task, cohort, memory) -> Report    a tile's work: local training, packing, client halves of the transforms
    close(state, task, collected) -> State  server halves, aggregation, the algorithm's step

`next` composes them on an engine; a coordinator composes the same three over sites.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.aggregators import Aggregator, mean
from atoll.aggregators.rows import finite_rows
from atoll.algorithms.base import Algorithm
from atoll.cohort import Cohort
from atoll.collecting import PIECE, Collected, Collector, Release
from atoll.composition import check_examples, check_parts, check_precision
from atoll.engines import Engine, own_engine
from atoll.engines import resolve as resolve_engine
from atoll.errors import CompositionError, InvalidArgument, NonFiniteError, invalid
from atoll.evaluation import Evaluation, check_split, joined, output_sums, split_sums, summarise, summary
from atoll.memory import ClientMemory, Window
from atoll.messages import Clear, Partial, Report, Scaled, Task
from atoll.model import Model
from atoll.privacy.accounting import Event, check_delta, usual_delta
from atoll.privacy.client_noise import decide
from atoll.privacy.ledger import Ledger
from atoll.privacy.noise import releasing
from atoll.secret import Source
from atoll.spec import Spec, record
from atoll.transforms.base import Keys, Transform
from atoll.transforms.chain import Chain, compose, keys_of, sent
from atoll.transforms.channel import Channel, add
from atoll.transforms.channel import resolve as resolve_channel
from atoll.transforms.delta import Downlink, served
from atoll.transforms.delta import resolve as resolve_downlink
from atoll.tree import Leaf, leaves, nbytes, rebuild
from atoll.vectors import Aggregate, Change, Layout, Personal, Selection, lengths

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset, Split


SERVER = "server"
"""What the server is called where its own data take part like a client's."""


@dataclass(frozen=True, slots=True)
class State:
    """Everything a run is, between two rounds.

    Attributes:
        seed: of all keyed randomness.
        round: rounds closed so far.
        algorithm: the algorithm's state.
        buffers: global floating buffers [B].
        transforms: server state of each transform.
        aggregator: what the aggregator keeps between rounds.
        private: start values [P - D] of the private parameters, for clients at their first visit.
        memory: what clients keep; moves on with the state.
        memory_version: which commit of the memory this state belongs to.
        downlink: what clients know of the model (`transforms.delta.Told`); None: they are sent the whole.
        served: clients that may be sent deltas, and the round in which they last took part.
    """

    seed: int
    round: int
    algorithm: Any
    buffers: Tensor
    transforms: tuple[Any, ...]
    aggregator: Any
    private: Tensor
    memory: ClientMemory
    memory_version: int
    downlink: Any = None
    served: Mapping[str, int] = field(default_factory=dict[str, int])


class Process:
    """A model, an algorithm and a pipeline, composed and checked; holds no state of a run.

    Args:
        model: what is trained.
        algorithm: how.
        transforms: stages between a client's work and the server, in client order.
        channel: "plain" or a channel from `atoll.transforms`.
        downlink: stages between the server and the clients, or `atoll.transforms.delta(...)`; (): whole models.
        aggregator: default `atoll.aggregators.mean()`, weights by examples.
        engine: what executes cohorts: "auto", "vectorized", "ray", "loop" or an engine.
        workers: processes that share the work; "auto": the machine's cores, where rounds are long enough to gain. The
            result has the same bits for any number.
        device: where clients train: "cpu", which "auto" means, or "cuda".
        precision: "full": everything in the model's own; "bfloat16": mixed, with local training's products in bfloat16
            and parameters, steps, losses and sums in float32 (`engines/precision.py`).
        server_data: (x, y) or named fields [n, ...] of examples the server holds, for a rule
            (`aggregators.fltrust(root="server")`) or a method that looks at what training on them gives. They take part
            like those of a client called "server", which is in no cohort and no mean.

    Raises:
        CompositionError: parts that do not fit, with both names and the way out.
        InvalidArgument: an unknown engine, aggregator or channel; private parameters that match nothing.
        DataError: the server's examples cannot be packed.
    """

    def __init__(
        self,
        model: Model,
        algorithm: Algorithm,
        *,
        transforms: Sequence[Transform] = (),
        channel: str | Channel = "plain",
        downlink: "Downlink | Sequence[Transform]" = (),
        aggregator: Aggregator | None = None,
        engine: str | Engine = "auto",
        workers: int | Literal["auto"] = "auto",
        device: str = "auto",
        precision: str = "full",
        server_data: Any = None,
    ) -> None:
        if not isinstance(model, Model):
            raise invalid("model", model, "an atoll.Model", 'Wrap a module: atoll.Model(module, loss="cross_entropy").')
        if not isinstance(algorithm, Algorithm):
            raise invalid("algorithm", algorithm, "an algorithm such as atoll.fedavg(atoll.local_sgd(lr=0.1))")
        if model.needs is not None and algorithm.name != model.needs:
            raise CompositionError(
                f"{algorithm.name} would train parts of the vector of this model that are no parameters to train: use "
                f"model.algorithm(plan), which is {model.needs}."
            )
        algorithm = algorithm if algorithm.bind is None else algorithm.bind(model)
        self.model = model
        self.algorithm = algorithm
        self.aggregator = aggregator if aggregator is not None else mean()
        if not isinstance(self.aggregator, Aggregator):
            raise invalid("aggregator", aggregator, "an aggregator such as atoll.aggregators.mean()")
        self.chain: Chain = compose(transforms, resolve_channel(channel))
        self.downlink = resolve_downlink(downlink)
        check_parts(algorithm, self.chain, self.aggregator, self.downlink)
        self.private_names = algorithm.private(model) if algorithm.private is not None else frozenset[str]()
        self.selection: Selection = model.layout.without(self.private_names)
        self.chain = self.chain.bind(self.selection.layout)
        self.kept = Selection(model.layout, tuple(n for n in model.layout.names if n in self.private_names))
        self.buffer_rule = algorithm.buffers or model.buffer_rule
        if self.chain.protects_clients and self.averaged_buffers:
            raise CompositionError(
                "the model's floating buffers (running statistics of BatchNorm) are averaged, but noise may make a "
                "variance negative, and a batch's statistics mix its examples: replace BatchNorm by GroupNorm or "
                'LayerNorm, or keep the statistics where they are by atoll.Model(..., buffers="local") or "frozen".'
            )
        self.example_multiplier: float | None = None  # of example-level privacy, where a driver has calibrated it
        if self.protects_examples:
            check_examples(algorithm, model)
        check_precision(precision, algorithm, model)
        self.precision = precision
        self.engine: Engine = resolve_engine(engine, workers, device)
        self._home: tuple[Engine, FederatedDataset] | None = None
        if server_data is not None:
            if self.chain.channel.sums_only:
                raise CompositionError(
                    f"server_data cannot stand beside the channel {self.chain.channel.name}, which shows no row to be "
                    'judged by it: leave server_data out, or use channel="plain".'
                )
            if not self.rooted:
                raise CompositionError(
                    f"nobody looks at server_data: neither the aggregator {self.aggregator.name} nor {algorithm.name} "
                    'does. Use aggregators.fltrust(root="server"), or leave server_data out.'
                )
            self._home = own_engine(self.engine), _server_data(server_data)

    @property
    def protects_examples(self) -> bool:
        """Whether local training protects every single example."""
        return any(plan.privacy is not None for plan in self.algorithm.plans)

    # --- pure parts ---------------------------------------------------------------------------------------------------

    @property
    def judge(self) -> Aggregator:
        """What combines what the server sees: the channel's rule over groups, or the aggregator."""
        return self.chain.channel.rule or self.aggregator

    @property
    def averaged_buffers(self) -> int:
        """Number of buffer values that travel with an update."""
        return self.model.buffer_layout.size if self.buffer_rule == "mean" else 0

    @property
    def personalised(self) -> bool:
        """Whether clients end with models, or buffers, of their own."""
        local_buffers = self.buffer_rule == "local" and self.model.buffer_layout.size > 0
        return self.algorithm.personal is not None or bool(self.private_names) or local_buffers

    @property
    def rooted(self) -> bool:
        """Whether the rule or the server's step looks at what training on the server's own data gives."""
        return self.aggregator.rooted or self.algorithm.rooted

    @property
    def server_data(self) -> "FederatedDataset | None":
        """The server's own examples, as those of a single client."""
        return None if self._home is None else self._home[1]

    def check_server(self, clients: Sequence[str] = ()) -> None:
        """Refuse a server that lacks the data it needs, or shares its name with a client.

        Raises:
            CompositionError: it does.
        """
        if self.rooted and self._home is None:
            who = f"the aggregator {self.aggregator.name}" if self.aggregator.rooted else self.algorithm.name
            raise CompositionError(
                f"{who} looks at what training on the server's own data gives, but there are none: give them as "
                "server_data=(x, y)."
            )
        if self._home is not None and SERVER in clients:
            raise CompositionError(
                f"a client is called {SERVER!r}, as the server is where its own data take part: rename the client."
            )

    def stay_home(self) -> None:
        """Forget the server's own data: this copy goes where only clients' work is done."""
        self._home = None

    def serve(self, task: Task, memory: ClientMemory) -> Tensor:
        """The row [L] of the server's own data: trained, encoded and decoded like a client's. Its memory is staged.

        Raises:
            NonFiniteError: it is not finite.
        """
        assert self._home is not None
        engine, data = self._home
        engine.prepare(self, data)
        task = replace(task, clients=(SERVER,))
        (chosen,) = engine.split(task, data)
        cohort, remembered = engine.tile(self, task, data, memory, chosen)
        report = self.work(task, cohort, remembered)
        if isinstance(report.wire, Clear | Scaled):
            row = report.wire.rows[0].clone()
        else:
            keys = keys_of(task.seed, task.round, random.client_keys(report.clients), sum(report.parts[:2]))
            wire, length = report.wire, sum(report.parts)
            row = self.chain.decode_each(wire, task.shared, length, keys, self.model.dtype)[0].clone()
        if not bool(report.finite.all() and torch.isfinite(row).all() and torch.isfinite(report.metrics).all()):
            raise NonFiniteError(
                f"round {task.round + 1}: training on server_data became non-finite. Likely causes: a learning rate "
                "that is too high (halve lr), or features that are not standardised. The model of the round before is "
                "kept."
            )
        memory.stage(report.clients, report.memory)
        return row

    @property
    def split(self) -> int:
        """Where the summed part of a client's row begins."""
        return self.selection.size + self.averaged_buffers

    @property
    def length(self) -> int:
        """Length L of the row a client sends: averaged part, averaged buffers, summed part."""
        return self.split + self.algorithm.sums(self.selection.size)

    @property
    def spec(self) -> Spec:
        """Everything that decides a round's result, but the data and the seed."""
        return record(
            "process",
            model=self.model,
            algorithm=self.algorithm,
            transforms=list(self.chain.stages),
            channel=self.chain.channel,
            aggregator=self.aggregator,
            **({} if self.downlink is None else {"downlink": self.downlink}),
            **({} if self.precision == "full" else {"precision": self.precision}),
        )

    def memory_layout(self, vector: Tensor) -> Layout:
        """Fields of a client's memory: the algorithm's, the transforms', private parameters, local buffers."""
        return Layout.of(self._first_visit(vector, vector.new_empty(self.kept.size), self.model.init_buffers()))

    def init(self, seed: int = 0, initial: Tensor | None = None) -> State:
        """The state before round one.

        Args:
            seed: of all keyed randomness: cohorts, orders, dropout, stochastic rounding.
            initial: start vector [P]; default the module's own values.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise invalid("seed", seed, "an integer")
        vector = self.model.init() if initial is None else initial.detach().clone()
        if vector.shape != (self.model.size,) or vector.dtype != self.model.dtype:
            raise invalid(
                "initial",
                f"{tuple(vector.shape)} {vector.dtype}",
                f"a vector of {self.model.size} values of {self.model.dtype}",
                "Take it from model.init(seed) or result.vector.",
            )
        if not bool(finite_rows(vector[None])):
            raise invalid("initial", "a vector with NaN or infinite values", "finite")
        shared = self.selection.take(vector)
        memory = ClientMemory(self.memory_layout(shared), self.model.dtype)
        begun = self.algorithm.init(shared)
        return State(
            seed,
            0,
            begun,
            self.model.init_buffers(),
            self.chain.init(self.length, self.split),
            self.judge.init(vector.new_zeros(0 if self.judge.rule is None else self.length)),
            self.kept.take(vector).clone(),
            memory,
            memory.version,
            None if self.downlink is None else self.downlink.init(self._announced(begun)),
        )

    def vector(self, state: State) -> Tensor:
        """A copy of the global model [P]; private parameters at their start values."""
        return self.whole(self.algorithm.model(state.algorithm), state.private).clone()

    def open(
        self,
        state: State,
        clients: Sequence[str],
        population: int,
        *,
        kind: Literal["train", "evaluate"] = "train",
    ) -> Task:
        """What this cohort is asked to do in the state's round.

        Raises:
            CompositionError: a cohort that the channel cannot carry.
        """
        if kind == "train":
            self._check_carried(len(clients))
        message = self.algorithm.broadcast(state.algorithm)
        if state.downlink is not None:
            message = rebuild(message, dict(leaves(message)) | {"vector": state.downlink.reference})
        return Task(
            kind,
            state.seed,
            state.round,
            tuple(clients),
            population,
            message,
            state.buffers,
            state.private,
            self.chain.share(state.transforms),
        )

    def open_global(self, state: State, clients: Sequence[str], population: int) -> Task:
        """The task to evaluate the global model, which need not be what clients train from: it stands as `vector`."""
        task = self.open(state, clients, population, kind="evaluate")
        own = dict(leaves(task.message)) | {"vector": self.algorithm.model(state.algorithm)}
        return replace(task, message=rebuild(task.message, own))

    def remembered(self, task: Task, clients: Sequence[str], memory: ClientMemory | Window) -> dict[str, Tensor]:
        """Memory fields [C, ...] of clients, with first-visit values for those never seen."""
        if not memory.layout.size:
            return {}
        first = self._first_visit(task.message.vector, task.private, task.buffers)
        return memory.layout.view(memory.rows(clients, memory.layout.flatten(first).to(task.private.device)))

    def start(self, task: Task, memory: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """Buffers [C, B] clients start from, and rows [C, P] with their private parameters (None: nothing private)."""
        buffers = memory["buffers"] if self.buffer_rule == "local" and "buffers" in memory else None
        if buffers is None:
            buffers = task.buffers.expand(count, -1)
        own = None
        if self.private_names:
            own = self.kept.put(memory["private"], task.private.new_zeros(count, self.model.size))
        return buffers, own

    def work(self, task: Task, cohort: Cohort, remembered: Mapping[str, Tensor]) -> Report:
        """A tile's answer: local work, what leaves and what stays."""
        own = {n.removeprefix("algorithm/"): t for n, t in remembered.items() if n.startswith("algorithm/")}
        cohort.protected = self.protects_examples
        cohort.counted = list(self.algorithm.plans)
        update, renewed = self.algorithm.local(task.message, own, cohort)
        count, width = len(cohort.clients), self.selection.size
        if update.change.shape != (count, width) or not self.private_names.isdisjoint(update.layout.names):
            raise CompositionError(
                f"{self.algorithm.name} returned updates of shape {update.change.shape} for a shared part of "
                f"{width} values: build them with cohort.update(trained, start), which leaves private parameters out."
            )
        if update.sums.shape != (count, self.algorithm.sums(width)):
            raise CompositionError(
                f"{self.algorithm.name} returned sums of shape {tuple(update.sums.shape)}, but declares "
                f"{self.algorithm.sums(width)} for each client: make Algorithm(sums=...) say what local returns."
            )
        if update.trained is None and (self.private_names or self.model.buffer_layout.size):
            raise CompositionError(
                f"{self.algorithm.name} returned updates without `trained`, but the model has buffers or private "
                "parameters to take from it: pass Update(trained=...)."
            )
        rest, split = update.sums, width
        if self.averaged_buffers and update.trained is not None:
            rest = torch.cat((update.trained.buffers - cohort.buffers, update.sums), dim=1)
            split += self.averaged_buffers
        clear = Clear(update.change, rest)
        keys = random.client_keys(cohort.clients)
        mine = {n.removeprefix("transforms/"): t for n, t in remembered.items() if n.startswith("transforms/")}
        wire: Tensor | Mapping[str, Tensor] | Clear | Scaled = clear
        finite, stages = torch.ones(count, dtype=torch.bool, device=update.weight.device), dict[str, Tensor]()
        if not self.adds_rows:
            rows = clear.rows
            sizes = lengths(rows) if self.chain.noise is not None else None
            finite = finite_rows(rows) if sizes is None else torch.isfinite(sizes[:, 0])
            # A client cannot stop a private round, nor be told of: one that breaks adds nothing.
            if self.chain.protects_clients and not bool(finite.all()):
                finite |= finite_rows(rows)
                rows = torch.where(finite[:, None], rows, 0.0)
            factor = None if sizes is None else self.chain.scaled(sizes)
            if factor is None:
                wire, stages = self.chain.encode(rows, mine, task.shared, keys_of(task.seed, task.round, keys, split))
            else:
                wire, stages = Scaled(rows, factor), mine
        kept = {f"algorithm/{n}": t for n, t in renewed.items()} | {f"transforms/{n}": t for n, t in stages.items()}
        if update.trained is not None:
            if self.private_names:
                kept["private"] = self.kept.take(update.trained.rows)
            if "buffers" in remembered:
                kept["buffers"] = update.trained.buffers
        if kept.keys() != remembered.keys():
            odd = ", ".join(sorted(kept.keys() ^ remembered.keys()))
            raise CompositionError(
                f"{self.algorithm.name} returned other memory than it keeps ({odd}): local must return the fields that "
                "client_init makes."
            )
        weight, metrics = update.weight, update.metrics
        at_home = self._home is not None and tuple(cohort.clients) == (SERVER,)  # else a client is called so
        hidden = self.chain.client_noise is not None and not at_home
        if hidden:  # a client's noise protects its row, and nothing that goes beside it
            weight, metrics = torch.ones_like(weight), torch.zeros_like(metrics)
        channel = self.chain.channel
        if channel.seal is not None:
            assert isinstance(wire, Tensor)
            sealing = Keys(task.seed, "channel", task.round, keys)
            finite &= torch.isfinite(metrics).all(dim=1)
            wire = channel.seal(
                wire, self.chain.sizes(self.length, split)[-1][1], weight, metrics, len(task.clients), sealing
            )
            weight, metrics = update.weight.new_empty(count, 0), torch.zeros_like(metrics)
        memory = (
            torch.cat([kept[n].reshape(count, -1) for n in remembered], dim=1)
            if remembered
            else update.weight.new_empty(count, 0)
        )
        # What stays with a client counts too: a private head may overflow while the shared part is still finite. Rows
        # that the server sees as they are it checks itself, by their sum.
        finite &= finite_rows(memory)
        finite &= torch.isfinite(update.weight[:, 0]) & (update.weight[:, 0] >= 0)
        if hidden and not bool(finite.all()):
            # That training broke is told to nobody: such a client sends noise alone, and keeps what it had.
            if remembered:
                before = torch.cat([remembered[n].reshape(count, -1) for n in remembered], dim=1)
                memory = torch.where(finite[:, None], memory, before)
            finite = torch.ones_like(finite)
        parts = (width, split - width, update.sums.shape[1])
        plain = isinstance(wire, Clear | Scaled)
        size = sum(parts) * self.row_dtype.itemsize * count if plain else sent(wire)
        size += count * (24 if channel.seal is None else 0)
        return Report(cohort.clients, wire, parts, weight, metrics, finite, memory, size)

    def blank(self, task: Task) -> Report:
        """A single client's report with nothing in it: the shapes and types that a site may send."""
        keys, channel = random.client_keys(("",)), self.chain.channel
        row = torch.zeros(1, 1, dtype=self.row_dtype).expand(1, self.length)
        weight = torch.ones(1, 1, dtype=torch.float64)
        if self.chain.stages or channel.seal is not None:  # whoever reads it may want to write to it
            row = row.contiguous()
        memory = {n: t[None].to(row.dtype) for n, t in self.chain.memory(self.length, self.split).items()}
        wire, _ = self.chain.encode(row, memory, task.shared, keys_of(task.seed, task.round, keys, self.split))
        sums, finite = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
        if channel.seal is not None:
            assert isinstance(wire, Tensor)
            sealing = Keys(task.seed, "channel", task.round, keys)
            sealed = self.chain.sizes(self.length, self.split)[-1][1]
            wire = channel.seal(wire, sealed, 0 * weight, sums, len(task.clients), sealing)
            weight = weight.new_empty(1, 0)
        return Report(("",), wire, self.parts, weight, sums, finite, row.new_empty(1, 0), 0)

    @property
    def row_dtype(self) -> torch.dtype:
        """Type of the numbers of a client's row."""
        return torch.float64 if self.algorithm.statistics else self.model.dtype

    @property
    def parts(self) -> tuple[int, int, int]:
        """Lengths of a row's averaged part, averaged buffers and summed part."""
        return self.selection.size, self.averaged_buffers, self.algorithm.sums(self.selection.size)

    @property
    def adds_rows(self) -> bool:
        """Whether the server adds up the very rows that clients computed."""
        return not self.chain.stages and not self.chain.channel.sums_only and self.aggregator.rule is None

    def combine(self, task: Task, report: Report) -> Partial:
        """A tile's report, decoded and summed as far as the aggregator and the channel allow."""
        good = report.finite & torch.isfinite(report.metrics).all(dim=1)
        total = rows = codes = None
        refused = dict[str, Mapping[str, Any]]()
        length, split = sum(report.parts), report.parts[0] + report.parts[1]
        # Where nobody is weighed, no claim is heard.
        weight = torch.ones_like(report.weight) if self.aggregator.weights == "uniform" else report.weight
        private = self.chain.noise is not None
        if private:
            weight = torch.nan_to_num(weight, nan=0.0, posinf=0.0).clamp(0.0, 1.0)  # whatever an algorithm says
        elif weight.numel() and bool((weight > self.aggregator.cap).any()):
            i = int(weight[:, 0].argmax())
            raise CompositionError(self._too_heavy(report.clients[i], float(weight[i])))
        channel = self.chain.channel
        if channel.sums_only:
            assert isinstance(report.wire, Mapping)
            gone = self.gone(task, report.clients)
            here = torch.tensor([c not in gone for c in report.clients])
            good |= ~here.to(good.device)  # of a client that has dropped out nothing is heard
            codes = {n: t[here] for n, t in report.wire.items()}
            if not channel.each:
                codes = add(codes)
        elif isinstance(report.wire, Clear):
            total = self._added(report.wire, weight, split, good)
        elif isinstance(report.wire, Scaled):
            factor = report.wire.factor * good.to(report.wire.factor)[:, None]
            total = self._widely_added(report.wire.plain, weight.double(), split, factor)
        else:
            keys = keys_of(task.seed, task.round, random.client_keys(report.clients), split)
            rows = self.chain.decode_each(report.wire, task.shared, length, keys, self.model.dtype)
            rows = rows.to(weight.device)  # bytes are expanded on the CPU
            if self.chain.judges:
                good, refused, rows, weight = self._judged(report, rows, weight, good)
            if private and not bool(good.all()):
                rows = torch.where(good[:, None], rows, 0.0)
            if self.aggregator.rule is not None:
                good &= finite_rows(rows)
                rows = rows.clone()  # a tile's own memory is used again by the next
            else:
                split = self.chain.seen_size(length, split)[1]
                clear = Clear(Change((len(rows), split), rows[:, :split]), rows[:, split:])
                total = self._added(clear, weight, split, good)
                rows = None
        broken = tuple(c for c, fine in zip(report.clients, good.tolist(), strict=True) if not fine)
        for i, client in enumerate(report.clients):
            good[i] &= client not in refused
        return Partial(
            report.clients,
            broken,
            report.parts,
            total,
            rows,
            codes,
            weight,
            # A rule does without broken clients; else they end the round.
            report.metrics[good].sum(dim=0) if rows is not None or refused else report.metrics.sum(dim=0),
            report.bytes,
            refused,
        )

    def _judged(
        self, report: Report, rows: Tensor, weight: Tensor, good: Tensor
    ) -> tuple[Tensor, dict[str, Mapping[str, Any]], Tensor, Tensor]:
        """Who is fine, whom a stage leaves out and why, and rows and weights in which those are nought."""
        whole = good & torch.isfinite(rows).all(dim=1)
        refused, out = dict[str, Mapping[str, Any]](), torch.zeros_like(good)
        for i, reason in enumerate(self.chain.judge(rows, whole)):
            if reason:
                norm, out[i] = float(rows[i].double().norm()), True
                refused[report.clients[i]] = {"reason": reason} | ({"norm": norm} if math.isfinite(norm) else {})
        if not refused:
            return good, refused, rows, weight
        return good | out, refused, torch.where(out[:, None], 0.0, rows), torch.where(out[:, None], 0.0, weight)

    def gone(self, task: Task, clients: Sequence[str]) -> frozenset[str]:
        """Which clients a simulated channel lets drop out before their row is sent."""
        leaving = self.chain.channel.leaving
        if leaving is None:
            return frozenset()
        keys = Keys(task.seed, "channel", task.round, random.client_keys(clients))
        return frozenset(c for c, gone in zip(clients, leaving(keys), strict=True) if gone)

    def _added(self, clear: Clear, weight: Tensor, split: int, good: Tensor) -> Tensor:
        """The sum [L] of a tile's rows; rows that are not finite are marked in `good`.

        A tile's few rows are added up in single precision at least, tiles in double: thousands of clients do not drown
        each other, and no wide copy of the rows is made.
        """
        exact = torch.promote_types(self.row_dtype, torch.float32)
        if self.chain.noise is not None:  # what rounding adds must not tell of who is in the sum
            return self._widely_added(clear.rows, weight.double(), split, torch.ones_like(weight, dtype=torch.float64))
        alone = len(weight) == 1
        total = clear.total(weight.to(exact), split, last=alone)
        if bool(torch.isfinite(total.sum())):
            return total
        if alone:
            good &= torch.isfinite(total).all()
            return total
        good &= finite_rows(clear.rows)
        # Each may be finite, but not their sum: it needs a wider one.
        return clear.total(weight.double(), split) if bool(good.all()) else total

    @staticmethod
    def _widely_added(rows: Tensor, weight: Tensor, split: int, factor: Tensor) -> Tensor:
        """The sum [L] of rows by factor in double precision, in pieces: a wide copy of all would not stay in the cache.

        Args:
            rows: [C, L].
            weight: of the first `split` columns, [C, 1].
            split: where columns begin that are not weighted.
            factor: of all columns, [C, 1].
        """
        total = rows.new_empty(rows.shape[1], dtype=torch.float64)
        width = max(1, PIECE // max(1, len(rows)))
        room = rows.new_empty(len(rows), min(width, rows.shape[1]), dtype=torch.float64)
        for begin, end, own in ((0, split, weight * factor), (split, rows.shape[1], factor)):
            for at in range(begin, end, width):
                upto = min(at + width, end)
                piece = room[:, : upto - at].copy_(rows[:, at:upto])
                torch.mm(own.T, piece, out=total[None, at:upto])
        return total

    def collector(self, state: State, task: Task) -> Collector:
        """What takes in a task's partials, in order."""
        return Collector(self, task, state)

    def released(self, task: Task, total: Tensor, expected: float, release: Release | None) -> Collected:
        """The aggregate of a sum of clipped rows to which noise is added.

        It tells nothing of who took part: losses are left out, and weight and count are those of the expected cohort.

        Args:
            task: of the round.
            total: sum of the clients' rows [L'], float64, as far as the server undoes them one by one.
            expected: expected cohort size, by which the sum is divided.
            release: adds the noise.
        """
        bound = self.chain.facts.bound
        assert bound is not None
        seen: dict[int, Tensor] = {}
        keys = keys_of(task.seed, task.round, random.client_keys(()), self.split)
        add = None if release is None else lambda summed: release(summed, bound)
        total = self.chain.decode_sum(total, task.shared, self.length, keys, release=add, seen=seen)
        average, sums = total[: self.split] / expected, total[self.split :]
        dtype, nan = self.model.dtype, float("nan")
        return Collected(
            average.to(dtype),
            sums.to(dtype),
            expected,
            max(1, round(expected)),
            nan,
            nan,
            0,
            0,
            expected,
            seen=seen,
            cohort=expected,
        )

    def close(self, state: State, task: Task, collected: Collected, *, spare: bool = False) -> State:
        """The state after the round. Without any update the model stays as it is; the round counts.

        Args:
            state: before the round.
            task: of the round.
            collected: what came of it.
            spare: whether the mean's memory may be written over, since nobody needs it afterwards; it is not where the
                aggregator's or a transform's state lies in it.
        """
        if not collected.count:
            return self._announce(replace(state, round=state.round + 1), task)
        if self.algorithm.statistics and collected.saturated:
            raise CompositionError(
                f"round {task.round + 1}: {collected.saturated} of the numbers that {self.algorithm.name} adds up were "
                f"cut to the range of the channel {self.chain.channel.name}, and their sum is wrong: raise its clip, "
                "or scale the features down. The model of the round before is kept."
            )
        width = self.selection.size
        mean, sums, transforms = collected.mean, collected.sums, state.transforms
        if any(stage.settle is not None for stage in self.chain.stages):
            row, transforms = self.chain.settle(
                transforms, torch.cat((mean, sums)), collected.count / max(task.population, collected.count)
            )
            mean, sums = row[: len(mean)], row[len(mean) :]
        root = collected.root
        if root is None and self.algorithm.rooted:
            root = self.serve(task, state.memory)
        aggregate = Aggregate(
            mean[:width],
            sums,
            collected.weight,
            collected.count,
            task.population,
            task.round,
            collected.divisor,
            None if root is None else torch.cat((root[:width], root[len(mean) :])),
        )
        transforms = self.chain.update(transforms, aggregate, collected.seen, collected.cohort)
        if spare:  # a rule or a stage may keep the mean itself, as centred clipping does
            kept = leaves({"aggregator": collected.aggregator, "transforms": transforms})
            aggregate = replace(aggregate, spare=not any(_overlap(t, mean) for _, t in kept))
        buffers = state.buffers
        if self.averaged_buffers:
            buffers = state.buffers + mean[width:]
        after = replace(
            state,
            round=state.round + 1,
            algorithm=self.algorithm.step(state.algorithm, aggregate),
            buffers=buffers,
            transforms=transforms,
            aggregator=collected.aggregator,
        )
        return self._announce(after, task)

    def _announce(self, state: State, task: Task) -> State:
        """The state of a round that was closed, with what clients will know of its model."""
        if self.downlink is None:
            return state
        told, _ = self.downlink.advance(state.downlink, self._announced(state.algorithm), state.seed, state.round)
        return replace(state, downlink=told, served=served(state.served, task.clients, task.round))

    def _announced(self, state: Any) -> Tensor:
        """The vector clients are sent."""
        message = self.algorithm.broadcast(state)
        several = [n for n, t in leaves(message) if isinstance(t, Tensor) and t.ndim > 1]
        if several:
            raise CompositionError(
                f"the downlink compresses one model, but {self.algorithm.name} sends several ({', '.join(several)}): "
                "leave out downlink, or use fedavg."
            )
        return message.vector

    def check(self, data: "FederatedDataset") -> None:
        """Refuse what this data makes impossible, before any work.

        Raises:
            CompositionError: a client weighs more than the channel can carry.
            InvalidArgument, DataError: the algorithm is not made for this model or these data.
        """
        if self.algorithm.accepts is not None:
            self.algorithm.accepts(self.model, data)
        cap, own = self.chain.channel.weight_cap, self.aggregator.cap
        # Weights by a callable are made one by one, and checked as they come.
        if (
            self.aggregator.weights == "examples"
            and self.aggregator.clip is None
            and float(data.train.sizes.max()) > own
        ):
            place = int(data.train.sizes.argmax())
            raise CompositionError(self._too_heavy(data.clients[place], float(data.train.sizes[place])))
        if cap is None:
            return
        heaviest = float(self.aggregator.weigh(data.train.sizes.double()[:, None], list(data.clients)).max())
        if heaviest > cap:
            raise CompositionError(
                f"{self.chain.channel.name}(weight_cap={cap:g}) cannot carry a weight of {heaviest:g}: raise "
                'weight_cap to the largest weight a client may have, or use aggregators.mean(weights="uniform").'
            )

    def _too_heavy(self, client: str, weight: float) -> str:
        return (
            f"{client} has a weight of {weight:g}, above the cap of {self.aggregator.cap:g} of the aggregator "
            f"{self.aggregator.name}: raise it, with aggregators.mean(cap=...), to the largest weight a client may "
            'have, or use aggregators.mean(weights="uniform").'
        )

    # --- composed -----------------------------------------------------------------------------------------------------

    def next(
        self,
        state: State,
        data: "FederatedDataset | LazyDataset",
        cohort: Sequence[str] | None = None,
        *,
        expected: float | None = None,
        release: Release | None = None,
        entered: Callable[[], None] | None = None,
    ) -> tuple[State, dict[str, Any]]:
        """One round: the state after it, its sums (loss, examples, clients, bytes up and down), who was "refused"
        (at most 100 of them are named), and how many that are ("refusals"). Refused clients keep the memory they had.
        Under a summing channel the loss is weighted as updates are, "examples" is the sum of weights, "summed" the
        clients of each sum, and "notes" say what went wrong with it.

        Args:
            state: from `init` or an earlier `next`.
            data: clients and their examples.
            cohort: names of the clients that take part; default everyone.
            expected: expected cohort size, for `mean(denominator="expected")`; default the cohort's own size. With
                noise it must be given unless everyone takes part: it may not depend on who was drawn.
            release: adds the noise in the place of the stage that asks for it, for whoever keeps a ledger.
            entered: called when a summing channel has shown a sum and before it is used, for whoever keeps a ledger of
                noise that clients add; with noise alone, of `local_noise`, it is enough that it is given.

        With noise nothing is told that it does not protect: losses, and how many clients there were, are those of the
        expected cohort. Nobody knows here how cohorts were drawn: "epsilon" counts every round for everybody.

        Raises:
            InvalidArgument: a stranger in the cohort; a state whose client memory has moved on.
            CompositionError: too few clients for the aggregator.
            NonFiniteError: an update is not finite; nothing was changed.
        """
        data.check_unchanged()
        clients = tuple(data.clients) if cohort is None else tuple(cohort)
        self._check_cohort(clients, data)
        self._check_fresh(state)
        self.check_server(data.clients)
        self.check_count(len(clients), state.round)
        told: dict[str, float] = {}
        if self.chain.noise is not None:
            expected = float(len(data)) if expected is None and cohort is None else expected
            if release is None:
                release, told = self._unkept(state, len(data))
        if self.chain.client_noise is not None and entered is None:
            told = self._uncounted(state, len(data))
        self.engine.prepare(self, data)
        drawn = data.draw(clients)
        if drawn is not data:
            self.engine.inspect(self, drawn)
        task = self.open(state, clients, len(data))
        collector = self.collector(state, task)
        try:
            with self.engine.threads():
                for partial in self.engine.run(self, task, drawn, state.memory):
                    collector.add(partial)
                    del partial  # large models: nothing is held that the next step does not need
            return self.finish(state, task, collector, expected, release, told, entered)
        except BaseException:
            state.memory.discard()
            raise

    def finish(
        self,
        state: State,
        task: Task,
        collector: Collector,
        expected: float | None = None,
        release: Release | None = None,
        told: Mapping[str, float] | None = None,
        entered: Callable[[], None] | None = None,
    ) -> tuple[State, dict[str, Any]]:
        """The end of a round whose updates are in: the state after it and its sums, as of `next`.

        Args:
            state: before the round.
            task: of the round.
            collector: has taken in its partials.
            expected: expected cohort size.
            release: adds the noise.
            told: what more is told of a round with noise.
            entered: called when a channel has shown a sum.

        Raises:
            NonFiniteError: the server's step left the finite numbers; nothing was committed.
        """
        collected = collector.finish(expected, release, entered)
        refusals = len(collector.left_out)
        closed = self.close(state, task, collected)
        if collected.count:
            self._check_finite(closed)
        state.memory.withdraw([*collector.left_out, *collector.dropped])
        state.memory.commit()
        closed = replace(closed, memory_version=state.memory.version)
        if self.chain.noise is not None:
            return closed, self._told(task, expected or 0.0) | dict(told or {})
        metrics = {
            "loss": collected.loss / collected.examples if collected.examples else float("nan"),
            "examples": collected.examples,
            "clients": float(collected.count),
            "bytes_up": float(collected.bytes_up),
            "bytes_down": float(self.bytes_down(state, task)),
            "saturated": float(collected.saturated),
            "refused": collected.refused,
            "refusals": float(refusals),
            "summed": collected.summed,
            "notes": collected.notes,
        }
        if self.chain.client_noise is not None:
            metrics |= {"loss": float("nan"), "examples": float("nan"), **(told or {})}
        return closed, metrics

    def replay(self, state: State, population: int, released: Tensor, expected: float) -> tuple[State, dict[str, Any]]:
        """The state after a round whose noised sum was kept, and what `next` would tell of it.

        Args:
            state: before the round.
            population: clients there are.
            released: the noised sum as `release` gave it.
            expected: expected cohort size.

        Raises:
            NonFiniteError: the server's step left the finite numbers.
        """
        task = self.open(state, (), population)
        total = torch.zeros_like(released)
        collected = self.released(task, total, expected, lambda summed, bound: released)
        closed = self.close(state, task, replace(collected, aggregator=state.aggregator))
        self._check_finite(closed)
        return closed, self._told(task, expected)

    def _check_finite(self, closed: State) -> None:
        """Refuse the state after a round whose model is not finite."""
        if not bool(finite_rows(self.algorithm.model(closed.algorithm)[None])):
            raise NonFiniteError(
                f"round {closed.round}: the server's step made the model non-finite although every update was "
                "finite. Lower the server's lr, or raise its tau."
            )

    def _told(self, task: Task, expected: float) -> dict[str, Any]:
        """What may be told of a round with noise."""
        row = self.chain.bytes(self.length, self.split, self.model.dtype) + 8 + 16
        return {
            "loss": float("nan"),
            "examples": float("nan"),
            "clients": float(round(expected)),
            "bytes_up": float(round(expected * row)),
            "bytes_down": float(round(expected * self._whole_down(task))),
            "saturated": 0.0,
            "refused": {},
            "refusals": 0.0,
            "notes": (),
            "summed": (),
        }

    def _unkept(self, state: State, population: int) -> tuple[Release, dict[str, float]]:
        """Noise for a caller who keeps no ledger, and epsilon after this round if everybody takes part in every one."""
        noise = self.chain.noise
        assert noise is not None
        if noise.strategy is not None:
            raise CompositionError(
                "correlated_noise takes back noise of earlier rounds, which nobody remembers here: use atoll.simulate, "
                "or gaussian_noise."
            )
        if noise.noise_multiplier is None:
            raise CompositionError(
                f"gaussian_noise(epsilon={noise.epsilon:g}) cannot calibrate itself here, where nobody knows how many "
                "rounds there will be: give noise_multiplier=atoll.privacy.calibrate(epsilon=..., steps=..., "
                'delta=..., sampling="none"), or use atoll.simulate.'
            )
        delta = check_delta(usual_delta(population) if noise.delta is None else noise.delta, population)
        ledger = Ledger("client", delta, budget=noise.budget)
        event = Event(noise.noise_multiplier, "none", count=state.round)
        ledger.events = [event] if state.round else []
        ledger.spend(replace(event, count=1))
        source = Source(seed=noise.seed) if noise.seed is not None else Source()
        release = releasing(noise.noise_multiplier, source.derive("noise", state.round))
        return release, {"epsilon": ledger.epsilon, "delta": delta}

    def _uncounted(self, state: State, population: int) -> dict[str, float]:
        """Epsilon after this round for a caller who keeps no ledger, if every round counts for every client."""
        noise = self.chain.client_noise
        assert noise is not None
        noise.told.calibrated(next(s.name for s in self.chain.stages if s.client_noise is not None))
        rounds, size = state.round + 1, self.chain.noised_size(self.length, self.split)
        terms = decide(noise, *size, population=population, rounds=rounds, releases=rounds)
        terms.check(rounds)
        return {"epsilon": terms.spent(rounds), "delta": terms.delta}

    def bytes_down(self, state: State, task: Task) -> int:
        """Bytes all clients of a training task receive."""
        each = self._whole_down(task)
        if self.downlink is None:
            return len(task.clients) * each
        each -= nbytes(task.message.vector)
        last = [state.served.get(client) for client in task.clients]
        return sum(each + self.downlink.bytes(state.downlink, task.round, known) for known in last)

    def _whole_down(self, task: Task) -> int:
        """Bytes one client receives that is sent the whole model."""
        buffers = nbytes(task.buffers) if self.buffer_rule == "mean" else 0
        return nbytes(task.message) + buffers + nbytes(task.shared)

    def evaluate(
        self, state: State, data: "FederatedDataset | LazyDataset", *, split: str = "test", personal: bool = False
    ) -> Evaluation:
        """Metrics on a split of every client's examples: of the global model, or of the clients' personal ones.

        Args:
            state: whose model.
            data: clients and their examples; clients never seen in training start from the model they receive.
            split: "train", "validation" or "test".
            personal: evaluate the model each client would use.
        """
        data.check_unchanged()
        self.engine.prepare(self, data)
        if not personal:
            return self.evaluate_global(state, data, split)
        self._check_fresh(state)
        check_split(data, split)
        pieces: list[Tensor] = []
        metrics: tuple[Any, ...] = ()
        with self.engine.threads():
            for clients, _ in data.chunks(split):
                drawn = data.draw(clients)
                task = self.open(state, tuple(clients), len(data), kind="evaluate")
                own: list[tuple[Tensor, Tensor]] = []
                for places, sums, used in self.engine.examine(self, task, drawn, state.memory, split):
                    metrics = metrics or used
                    own.append((torch.from_numpy(places), sums))
                total = torch.zeros(len(clients), max(sums.shape[1] for _, sums in own), dtype=torch.float64)
                for places, sums in own:
                    total[places, : sums.shape[1]] = sums
                pieces.append(total)
        return summarise(metrics, joined(pieces), data.clients)

    def evaluate_global(self, state: State, data: "FederatedDataset | LazyDataset", split: str) -> Evaluation:
        """Metrics of the global model on a split of every client's examples, of whatever data."""
        check_split(data, split)
        with self.engine.threads():
            return summary(self.engine.stream(self, state, data, split), data.clients)

    def survey(self, task: Task, part: "Split") -> tuple[Tensor, tuple[Any, ...]]:
        """Sums [clients, 2 + ...] of the global model over clients' examples, and the metrics."""
        return split_sums(self.model, self.whole(task.message.vector, task.private), task.buffers, part)

    def examine(
        self,
        task: Task,
        cohort: Cohort,
        remembered: Mapping[str, Tensor],
        split: "Split",
        places: NDArray[np.int64],
        *,
        personal: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """A tile's answer to an evaluation task: sums [C, 2 + ...] of loss, examples and metrics, and the metrics.

        Args:
            task: from `open(kind="evaluate")`, or `open_global` for the global model.
            cohort: the tile.
            remembered: what its clients remember.
            split: the examples to look at; a client without any gives zeros.
            places: of the tile's clients in the split.
            personal: evaluate each client's own model instead of the global one.
        """
        model, count = self.model, len(cohort.clients)
        if personal:
            rows, buffers = self.personal_rows(task, cohort, remembered)
        else:
            vector = self.whole(task.message.vector, task.private)
            rows, buffers = vector.expand(count, -1), task.buffers.expand(count, -1)
        assert buffers is not None
        sizes = split.sizes[torch.from_numpy(places)]
        if not int(sizes.sum()):
            return torch.zeros(count, 2, dtype=torch.float64), ()
        outputs = [o for o in cohort.forward(rows, buffers, split, places) if len(o)]
        target = torch.cat([split.client(int(p))["y"] for p in places])
        owner = torch.repeat_interleave(torch.arange(count), sizes)
        return output_sums(model, torch.cat(outputs), target, owner, count)

    def personal(self, state: State, data: "FederatedDataset | LazyDataset", clients: Sequence[str]) -> Personal:
        """The models clients would use: rows [C, P] and buffers [C, B]."""
        self._check_cohort(tuple(clients), data)
        self._check_fresh(state)
        self.engine.prepare(self, data)
        drawn = data.draw(clients)
        task = self.open(state, clients, len(data), kind="evaluate")
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for cohort, remembered in self.engine.tiles(self, task, drawn, state.memory):
            found = self.personal_rows(task, cohort, remembered)
            for i, client in enumerate(cohort.clients):
                assert found.buffers is not None
                rows[client] = (found.rows[i].clone(), found.buffers[i].clone())
        return Personal(torch.stack([rows[c][0] for c in clients]), torch.stack([rows[c][1] for c in clients]))

    def personal_rows(self, task: Task, cohort: Cohort, remembered: Mapping[str, Tensor]) -> Personal:
        """A tile's personal models; buffers are always given."""
        if self.algorithm.personal is None:
            found = Personal(cohort.rows(task.message.vector), None)
        else:
            own = {n.removeprefix("algorithm/"): t for n, t in remembered.items() if n.startswith("algorithm/")}
            found = self.algorithm.personal(task.message, own, cohort)
        return Personal(found.rows, cohort.buffers if found.buffers is None else found.buffers)

    def whole(self, shared: Tensor, private: Tensor) -> Tensor:
        """A model [P] of its shared [D] and private [P - D] part; the shared part itself where nothing is private."""
        if self.selection.everything:
            return shared
        return self.kept.put(private, self.selection.put(shared, shared.new_empty(self.model.size)))

    def _first_visit(self, vector: Tensor, private: Tensor, buffers: Tensor) -> dict[str, Tensor]:
        fields: dict[str, Tensor] = {}
        if self.algorithm.client_init is not None:
            fields |= {f"algorithm/{n}": t for n, t in self.algorithm.client_init(vector, buffers).items()}
        fields |= {f"transforms/{n}": t.to(vector.dtype) for n, t in self.chain.memory(self.length, self.split).items()}
        if self.private_names:
            fields["private"] = private
        if self.buffer_rule == "local" and buffers.numel():
            fields["buffers"] = buffers
        return fields

    def _check_fresh(self, state: State) -> None:
        if state.memory.version != state.memory_version:
            raise InvalidArgument(
                f"this state is from round {state.round}, but its clients' memory has moved on: continue from the "
                "latest state, or begin a new one with init()."
            )

    def check_count(self, count: int, round: int) -> None:
        """Refuse a cohort of `count` clients that the rule, the channel or a stage cannot do with; none at all is fine.

        Raises:
            CompositionError: which of them, and what it needs.
        """
        if not self.chain.channel.sums_only:
            self.aggregator.check(count, round)
        self._check_carried(count)

    def _check_carried(self, count: int) -> None:
        if count:
            self.chain.channel.check(count)
            for stage in self.chain.stages:
                stage.check(count)

    def _check_cohort(self, clients: tuple[str, ...], data: "FederatedDataset | LazyDataset") -> None:
        try:
            data.places(clients)
        except InvalidArgument:
            strangers = [c for c in clients if c not in data]
            if strangers:
                raise invalid("cohort", strangers[:5], "names of clients in the data") from None
            twice = sorted({c for c in clients if clients.count(c) > 1})
            raise invalid("cohort", twice[:5], "distinct clients") from None


def _overlap(leaf: Leaf, mean: Tensor) -> bool:
    """Whether a leaf of a state lies in the mean's memory."""
    return isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == mean.untyped_storage().data_ptr()


def _server_data(given: Any) -> "FederatedDataset":
    from atoll.data import FederatedDataset

    if isinstance(given, FederatedDataset):
        raise invalid(
            "server_data",
            f"a FederatedDataset of {len(given)} clients",
            "(x, y) or a mapping of named fields [n, ...], examples of the server alone",
            'Take a client\'s with data["a"].train.',
        )
    return FederatedDataset.from_arrays({SERVER: given})


process = Process
"""The name users call: `atoll.process(model, algorithm)` begins the round-by-round loop."""
