"""Distillation over a public set: clients with different architectures learn from each other's answers.

FedMD, Li & Wang 2019, "FedMD: Heterogenous federated learning via model distillation", algorithm 1. Every client has a
model of its own, which never leaves it. In a round

    z = mean over the cohort of f_k(u)                         answers on public inputs u travel up, their mean down
    digest:   f_k is trained on (u, softmax(z / T))
    revisit:  f_k is trained on the client's own examples

FedDF, Lin, Kong, Stich & Jaggi 2020, "Ensemble distillation for robust model fusion in federated learning",
algorithm 3 (clients with different architectures). Clients of a group share an architecture and a model x_g:

    y_k <- x_g, trained on the client's own examples            models travel, as in federated averaging
    x_g <- sum_k p_k y_k over the group's clients
    x_g is trained by the server on (u, softmax(z / T)),  z = mean over the clients of all groups of y_k(u)

Symbols: u public inputs, of which no labels are read, z answers before the softmax, T temperature, p_k shares by
examples. The loss is T^2 times the Kullback-Leibler divergence from the teacher's to the student's softmax at T; both
papers leave T at 1, and FedMD's program compares answers by their mean absolute difference, where this one takes the
divergence. Cost in floats for n public inputs and K outputs: FedMD n K up and down; FedDF P_g up and down.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from atoll import sampling
from atoll.algorithms import fedavg
from atoll.algorithms.checks import check_count, check_number, check_plan
from atoll.data import FederatedDataset, Split
from atoll.errors import DataError, InvalidArgument, NonFiniteError, invalid, unknown
from atoll.evaluation import Evaluation, check_split, joined, split_sums, summarise
from atoll.history import Record
from atoll.local import Plan
from atoll.model import Model
from atoll.rounds import Process
from atoll.sampling import Sampler

PUBLIC = 512
"""Public inputs that go through a model at once."""


class Held(NamedTuple):
    """A model's parameters [P] and floating buffers [B]."""

    vector: Tensor
    buffers: Tensor


@dataclass(slots=True)
class Distilled:
    """What distillation gives.

    Attributes:
        method: "fedmd" or "feddf".
        models: the architectures, by group.
        groups: the group of every client.
        groups_held: of "feddf", parameters and buffers of each group's model.
        clients_held: of "fedmd", those of each client's own.
        history: one record per round.
    """

    method: str
    models: Mapping[str, Model]
    groups: Mapping[str, str]
    groups_held: dict[str, Held]
    clients_held: dict[str, Held]
    history: list[Record]

    def held(self, client: str) -> Held:
        """The parameters and buffers a client uses: its own, or its group's."""
        if client not in self.groups:
            raise invalid("client", client, "the name of a client of the run")
        return self.clients_held[client] if self.method == "fedmd" else self.groups_held[self.groups[client]]

    def module(self, client: str) -> nn.Module:
        """The module a client uses, in eval mode."""
        held = self.held(client)
        return self.models[self.groups[client]].module(held.vector, held.buffers)

    def predict(self, x: Tensor, client: str) -> Tensor:
        """Outputs [n, ...] of a client's model for inputs [n, ...]."""
        return answers(self.models[self.groups[client]], self.held(client), {"x": x})

    def evaluate(self, data: FederatedDataset, *, split: str = "test") -> Evaluation:
        """Metrics of every client's model on its own examples."""
        check_split(data, split)
        part: Split = getattr(data, split)
        pieces: list[Tensor] = []
        metrics: tuple[Any, ...] = ()
        for place, client in enumerate(data.clients):
            held = self.held(client)
            sums, used = split_sums(
                self.models[self.groups[client]], held.vector, held.buffers, part.part(place, place + 1)
            )
            metrics = metrics or used
            pieces.append(sums)
        return summarise(metrics, joined(pieces), data.clients)


def distill(
    models: Mapping[str, Model],
    data: FederatedDataset,
    *,
    groups: Mapping[str, str],
    public: Any,
    plan: Plan,
    digest: Plan,
    rounds: int,
    method: Literal["fedmd", "feddf"] = "feddf",
    cohort: int | float | Sampler | None = None,
    temperature: float = 1.0,
    initial: Mapping[str, Tensor] | None = None,
    evaluate_every: int = 1,
    seed: int = 0,
    engine: str = "auto",
    callbacks: Sequence[Callable[[Record], Any]] = (),
) -> Distilled:
    """Train clients with different architectures by distillation over a public set.

    Args:
        models: an architecture for each group; all give the same number of outputs and have the same metrics.
        data: clients and their examples.
        groups: client -> name of its group.
        public: public inputs "x" [n, ...], a tensor, or a mapping of all fields the models read but "y".
        plan: training of a client's model on its own examples in a round.
        digest: training on the public inputs: by every client ("fedmd"), or by the server for each group ("feddf").
        rounds: how many.
        method: "fedmd": every client keeps a model of its own, answers travel; "feddf": groups share models.
        cohort: who takes part, as for `atoll.simulate`; default everyone.
        temperature: T, above 0.
        initial: start vectors [P] of groups; default the modules' own values.
        evaluate_every: evaluate clients' models after every so many rounds, and after the last; 0: never.
        seed: of all keyed randomness.
        engine: "auto", "vectorized" or "loop".
        callbacks: called with the record of every round.

    Returns:
        The models, their history, and ways to look at both.

    Raises:
        InvalidArgument, DataError: refused before any work: a client without a group, a group without clients or a
            model, models that do not answer alike, public inputs the models cannot read.
        NonFiniteError: training diverged.
    """
    if method not in ("fedmd", "feddf"):
        raise invalid("method", method, '"fedmd" or "feddf"')
    for name, own in (("plan", plan), ("digest", digest)):
        check_plan(own, name)
        if own.privacy is not None:
            raise invalid(
                name, "a plan with privacy=", "a plan without it",
                "No ledger counts what distillation tells of examples: use atoll.simulate.",
            )  # fmt: skip
    temperature = check_number("temperature", temperature, strict=True)
    check_count("rounds", rounds)
    check_count("evaluate_every", evaluate_every, least=0)
    members = _members(models, data, groups)
    fields = _public(public)
    start = _start(models, initial)
    _check_outputs(models, start, fields)
    sampler = sampling.resolve(cohort)
    sampler.check(data.clients)
    run = _Run(models, data, members, fields, plan, digest, temperature, seed, engine)
    result = Distilled(
        method,
        dict(models),
        dict(groups),
        dict(start) if method == "feddf" else {},
        {c: start[groups[c]] for c in data.clients} if method == "fedmd" else {},
        [],
    )
    for number in range(rounds):
        began = time.perf_counter()
        chosen = set(sampler.cohort(seed, number, data.clients))
        present = {g: [c for c in own if c in chosen] for g, own in members.items()}
        loss, sent = (run.fedmd if method == "fedmd" else run.feddf)(result, present, number)
        trained = time.perf_counter()
        found: dict[str, Any] = {}
        if evaluate_every and data.has("test") and ((number + 1) % evaluate_every == 0 or number + 1 == rounds):
            evaluation = result.evaluate(data)
            found = {"test": evaluation.metrics, "spread": evaluation.spread, "notes": evaluation.notes}
        record = Record(
            round=number + 1,
            clients=len(chosen),
            train={"loss": loss},
            **found,
            bytes_up=sent,
            bytes_down=sent,
            seconds={"train": trained - began, "evaluate": time.perf_counter() - trained},
        )
        result.history.append(record)
        for callback in callbacks:
            callback(record)
    return result


class _Run:
    """What both methods do: train many models at once, ask them, and teach them."""

    def __init__(
        self,
        models: Mapping[str, Model],
        data: FederatedDataset,
        members: Mapping[str, list[str]],
        public: Mapping[str, Tensor],
        plan: Plan,
        digest: Plan,
        temperature: float,
        seed: int,
        engine: str,
    ) -> None:
        self._public, self._temperature, self._seed = dict(public), temperature, seed
        self._plan, self._digest, self._models = plan, digest, models
        self._lessons: dict[tuple[str, ...], FederatedDataset] = {}
        self._data = {g: data.select(own) for g, own in members.items()}
        self._own = {g: Process(m, fedavg(plan), engine=engine, workers=1) for g, m in models.items()}
        loss = divergence(temperature)
        taught = {
            g: Model(
                m.caller(train=True).get_submodule("module"), loss, buffers=m.buffer_rule, forward=m.forward_function
            )
            for g, m in models.items()
        }
        self._taught = {g: Process(m, fedavg(digest), engine=engine, workers=1) for g, m in taught.items()}

    def fedmd(self, result: Distilled, present: Mapping[str, list[str]], number: int) -> tuple[float, int]:
        """A round of FedMD: mean loss on own examples, and bytes that travel each way."""
        everybody = [c for own in present.values() for c in own]
        if not everybody:
            return float("nan"), 0
        held = result.clients_held
        teacher = self._mean([self._ask(result.groups[c], held[c]) for c in everybody])
        losses = torch.zeros(2, dtype=torch.float64)
        for group, own in present.items():
            if own:
                lesson = self._lesson(own, teacher)
                begun = self._train(self._taught[group], lesson, own, held, self._digest, number, "digest")[0]
                done, loss = self._train(self._own[group], self._data[group], own, begun, self._plan, number, "train")
                held.update(done)
                losses += loss
        size = teacher.numel() * next(iter(self._models.values())).dtype.itemsize
        return float(losses[0] / losses[1]), len(everybody) * size

    def feddf(self, result: Distilled, present: Mapping[str, list[str]], number: int) -> tuple[float, int]:
        """A round of FedDF: mean loss on own examples, and bytes that travel each way."""
        losses, said, sent = torch.zeros(2, dtype=torch.float64), list[Tensor](), 0
        for group, own in present.items():
            if not own:
                continue
            start, data = result.groups_held[group], self._data[group]
            done, loss = self._train(
                self._own[group], data, own, dict.fromkeys(own, start), self._plan, number, "train"
            )
            losses += loss
            said += [self._ask(group, done[c]) for c in own]
            shares = torch.tensor([float(data.train.sizes[data.index(c)]) for c in own], dtype=torch.float64)
            shares /= shares.sum()
            result.groups_held[group] = Held(
                *(
                    sum((p * t.double() for p, t in zip(shares, parts, strict=True)), start=0 * first).to(first.dtype)
                    for first, parts in zip(start, zip(*(done[c] for c in own), strict=True), strict=True)
                )
            )
            sent += len(own) * (start.vector.nbytes + start.buffers.nbytes)
        if not said:
            return float("nan"), 0
        lesson = self._lesson(["public"], self._mean(said))
        for group, held in result.groups_held.items():
            taught = self._train(
                self._taught[group], lesson, ["public"], {"public": held}, self._digest, number, f"digest {group}"
            )
            result.groups_held[group] = taught[0]["public"]
        return float(losses[0] / losses[1]), sent

    def _ask(self, group: str, held: Held) -> Tensor:
        return answers(self._models[group], held, self._public)

    def _mean(self, said: Sequence[Tensor]) -> Tensor:
        """Mean answers [n, K] of several models."""
        return sum((t.double() for t in said), start=torch.zeros(1, dtype=torch.float64)) / len(said)

    def _lesson(self, clients: Sequence[str], teacher: Tensor) -> FederatedDataset:
        """The public inputs under the teacher's softmax, as every pupil's examples."""
        dtype = next(iter(self._models.values())).dtype
        target = torch.softmax(teacher / self._temperature, 1).to(dtype)
        count, n = len(clients), len(target)
        known = self._lessons.get(tuple(clients))
        if known is not None:  # the same object again: models are checked against it once
            known.train.fields["y"].copy_(target.repeat(count, 1))
            return known
        fields = {**self._public, "y": target}
        packed = {name: t.repeat(count, *(1,) * (t.ndim - 1)) for name, t in fields.items()}
        made = FederatedDataset.from_packed(packed, torch.arange(count + 1) * n, list(clients))
        self._lessons[tuple(clients)] = made
        return made

    def _train(
        self,
        process: Process,
        data: FederatedDataset,
        clients: Sequence[str],
        held: Mapping[str, Held],
        plan: Plan,
        number: int,
        purpose: str,
    ) -> tuple[dict[str, Held], Tensor]:
        """Models after training on the data of those who hold them, and sums (loss, examples) [2]."""
        engine = process.engine
        engine.prepare(process, data)
        state = replace(process.init(self._seed), round=number)
        task = process.open(state, clients, len(data))
        found: dict[str, Held] = {}
        losses = torch.zeros(2, dtype=torch.float64)
        with engine.threads():
            for tile, _ in engine.tiles(process, task, data, state.memory):
                rows = torch.stack([held[c].vector for c in tile.clients])
                buffers = torch.stack([held[c].buffers for c in tile.clients])
                trained = tile.sgd(rows, plan, buffers=buffers, purpose=purpose)
                losses += torch.stack((trained.loss.sum(), trained.examples.sum())).cpu()
                for i, client in enumerate(tile.clients):
                    own = Held(trained.rows[i].clone(), trained.buffers[i].clone())
                    if not bool(torch.isfinite(own.vector.sum())):
                        raise NonFiniteError(
                            f"round {number + 1}: training became non-finite at {client} ({purpose}). Halve the lr of "
                            f"{'plan' if purpose == 'train' else 'digest'}."
                        )
                    found[client] = own
        return found, losses


def divergence(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss T^2 KL(p || softmax(z / T)) [n] of answers z [n, K] and a teacher's probabilities p [n, K]."""

    def distillation(output: Tensor, target: Tensor) -> Tensor:
        student = torch.log_softmax(output / temperature, -1)
        return temperature**2 * functional.kl_div(student, target, reduction="none").sum(-1)

    return distillation


def answers(model: Model, held: Held, fields: Mapping[str, Tensor]) -> Tensor:
    """Outputs [n, ...] of a model in eval mode, a piece of the inputs at a time."""
    views, buffers = model.layout.view(held.vector), model.buffer_layout.view(held.buffers)
    count = len(next(iter(fields.values())))
    with torch.no_grad():
        pieces = [
            model.call(views, buffers, {n: t[i : i + PUBLIC] for n, t in fields.items()}, train=False)
            for i in range(0, count, PUBLIC)
        ]
    return torch.cat(pieces)


def _members(models: Mapping[str, Model], data: FederatedDataset, groups: Mapping[str, str]) -> dict[str, list[str]]:
    """The clients of each group, in the data's order."""
    if not isinstance(models, Mapping) or not models or not all(type(m) is Model for m in models.values()):
        raise invalid("models", models, 'a mapping of group names to plain models, {"small": model, ...}')
    if not isinstance(data, FederatedDataset):
        raise invalid("data", type(data).__name__, "a packed FederatedDataset")
    if not isinstance(groups, Mapping):
        raise invalid("groups", groups, 'a mapping of clients to group names, {"a": "small", ...}')
    members: dict[str, list[str]] = {name: [] for name in models}
    for client in data.clients:
        if client not in groups:
            raise invalid("groups", groups, "a mapping that names a group for every client", f"{client!r} has none.")
        if groups[client] not in models:
            raise unknown("groups", groups[client], list(models), f"It is the group of client {client!r}.")
        members[groups[client]].append(client)
    empty = [name for name, own in members.items() if not own]
    if empty:
        raise invalid("models", empty[0], "groups that have clients", "Leave out architectures that nobody has.")
    first = next(iter(models.values()))
    for name, model in models.items():
        if model.names != first.names:
            raise invalid("models", f"{name}: metrics {model.names}", f"models with the same metrics {first.names}")
        if model.dtype != first.dtype:
            raise invalid("models", f"{name}: {model.dtype}", f"models of one dtype, {first.dtype}")
    return members


def _public(public: Any) -> dict[str, Tensor]:
    fields: dict[str, Any] = dict(public) if isinstance(public, Mapping) else {"x": public}
    if "y" in fields:
        raise invalid("public", "fields with y", "inputs without targets", "No public label is read: leave y out.")
    if not fields or not all(isinstance(t, Tensor) and t.ndim and len(t) for t in fields.values()):
        raise invalid("public", type(public).__name__, "a tensor x [n, ...] of inputs, or a mapping of named tensors")
    if len({len(t) for t in fields.values()}) > 1:
        raise invalid("public", {n: len(t) for n, t in fields.items()}, "fields of one length")
    for name, tensor in fields.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"public {name!r} holds NaN or infinite values: remove or impute them.")
    return fields


def _start(models: Mapping[str, Model], initial: Mapping[str, Tensor] | None) -> dict[str, Held]:
    start: dict[str, Held] = {}
    for name in initial or {}:
        if name not in models:
            raise unknown("initial", name, list(models))
    for name, model in models.items():
        vector = (initial or {}).get(name, model.init())
        if vector.shape != (model.size,) or vector.dtype != model.dtype or not bool(torch.isfinite(vector).all()):
            raise invalid(
                "initial", f"{name}: {tuple(vector.shape)} {vector.dtype}",
                f"a finite vector of {model.size} values of {model.dtype}",
            )  # fmt: skip
        start[name] = Held(vector.clone(), model.init_buffers())
    return start


def _check_outputs(models: Mapping[str, Model], start: Mapping[str, Held], fields: Mapping[str, Tensor]) -> None:
    """Refuse models that do not all give K outputs for an example, K at least 2."""
    found: dict[str, tuple[int, ...]] = {}
    for name, model in models.items():
        few = {n: t[:4] for n, t in fields.items()}
        try:
            output = answers(model, start[name], few)
        except Exception as error:
            told = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in fields.items())
            raise InvalidArgument(
                f"the model of group {name!r} fails on the public inputs ({told}): {error}"
            ) from error
        found[name] = tuple(output.shape[1:])
    shapes = set(found.values())
    if len(shapes) > 1 or len(first := next(iter(shapes))) != 1 or first[0] < 2:
        raise invalid(
            "models", found, "models that give one number for each of the same classes, at least 2",
            "Answers are compared class by class.",
        )  # fmt: skip
