"""Evaluation: sums of losses and metrics for every client, and what is made of them.

Only sums are computed per client (loss, examples, and each metric's own); values, their spread over clients and the
values over all examples follow from the sums, the same in simulation and deployment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from atoll import metrics as metric_functions
from atoll.errors import DataError, invalid
from atoll.model import Batch, Model

if TYPE_CHECKING:
    from atoll.data import FederatedDataset, LazyDataset, Split

CHUNK = 8192
"""Examples that go through a model at once, at most."""

CHUNK_BYTES = 4 * 2**20
"""Activations of examples that go through a model at once: more of them leave the cache."""

LEAST = 1024
"""Examples that are worth a message to a worker."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of a model, or of one model per client, on the clients' examples.

    Attributes:
        names: "loss" and the model's metrics.
        clients: whose examples; a single "" for examples that are nobody's.
        examples: of each client, [C].
        values: of each client and metric, [C, M], nan where undefined.
        overall: over all examples together, [M].
        better: +1 where higher is better, -1 where lower is, for each metric.
        notes: why a value is undefined, one line each.
    """

    names: tuple[str, ...]
    clients: tuple[str, ...]
    examples: Tensor
    values: Tensor
    overall: Tensor
    better: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Each metric over all examples together."""
        return dict(zip(self.names, self.overall.tolist(), strict=True))

    @property
    def spread(self) -> dict[str, dict[str, float]]:
        """Each metric over clients: mean, weighted mean, worst decile, standard deviation."""
        return {
            name: metric_functions.spread(self.values[:, i], self.examples, higher_is_better=self.better[i] > 0)
            for i, name in enumerate(self.names)
        }

    def client(self, name: str) -> dict[str, float]:
        """One client's metrics."""
        return dict(zip(self.names, self.values[self.clients.index(name)].tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Metrics over all examples, per client, and their spread."""
        return {
            "metrics": self.metrics,
            "clients": {c: self.client(c) for c in self.clients},
            "spread": self.spread,
            "notes": list(self.notes),
        }


def evaluate(
    model: Model,
    vector: Tensor,
    data: "FederatedDataset | LazyDataset",
    *,
    split: str = "test",
    buffers: Tensor | None = None,
) -> Evaluation:
    """Evaluate a model on every client's examples.

    Args:
        model: the model.
        vector: its parameters, [P], for instance `result.vector`.
        data: clients and their examples.
        split: "train", "validation" or "test".
        buffers: floating buffers [B]; default the module's own.

    Raises:
        DataError: the data has no such examples.
    """
    if vector.shape != (model.size,):
        raise invalid("vector", tuple(vector.shape), f"the {model.size} parameters of the model")
    check_split(data, split)
    held = model.init_buffers() if buffers is None else buffers
    parts = (part for _, whole in data.chunks(split) for part in stretches(whole))
    return summary([split_sums(model, vector, held, part) for part in parts], data.clients)


def evaluate_holdout(model: Model, vector: Tensor, buffers: Tensor, holdout: Batch) -> Evaluation:
    """Evaluate one model on examples that are no client's."""
    from atoll.data import Split

    split = Split(dict(holdout), torch.tensor([0, len(holdout["y"])]))
    return summary([split_sums(model, vector, buffers, split)], ("",))


def split_sums(model: Model, vector: Tensor, buffers: Tensor, split: "Split") -> tuple[Tensor, tuple[Any, ...]]:
    """Sums [clients, 2 + ...] of one model over clients' examples, in one stream of batches, and the metrics."""
    views, held = model.layout.view(vector), model.buffer_layout.view(buffers)
    clients, count = len(split.sizes), len(split)
    total, metrics = torch.zeros(clients, 2, dtype=torch.float64), ()
    if not count:
        return total, metrics
    owner = torch.repeat_interleave(torch.arange(clients), split.sizes)
    if model.loss.returns is None:
        first_few = {n: t[:4] for n, t in split.fields.items()}
        with torch.no_grad():
            model.settle(model.call(views, held, first_few, train=False), first_few["y"])
    per_example = model.loss.returns == "per_example"
    # A loss that gives a mean can only be asked client by client.
    if per_example:
        each = model.activations(views, held, split.fields)
        bounds = [*range(0, count, max(1, min(CHUNK, CHUNK_BYTES // each))), count]
    else:
        bounds = split.offsets.tolist()
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        batch = {n: t[begin:end] for n, t in split.fields.items()}
        first = int(owner[begin])
        sums, metrics = batch_sums(model, views, held, batch, owner[begin:end] - first, int(owner[end - 1]) - first + 1)
        if total.shape[1] < sums.shape[1]:
            total = torch.zeros(clients, sums.shape[1], dtype=torch.float64)
        total[first : first + len(sums)] += sums
    return total, metrics


def stretches(split: "Split") -> "Iterator[Split]":
    """Clients that follow each other, as many as a model is evaluated on at once; the same whoever works on them.

    There are some for every worker: a sixteenth of all examples each, but at least `LEAST` and at most about `CHUNK`.
    """
    ends = split.offsets[1:].numpy()
    size = max(LEAST, min(CHUNK, len(split) // 16))
    begin = 0
    while begin < len(ends):
        enough = int(ends.searchsorted((ends[begin - 1] if begin else 0) + size)) + 1
        yield split.part(begin, min(enough, len(ends)))
        begin = enough


def summary(pieces: Sequence[tuple[Tensor, tuple[Any, ...]]], clients: Sequence[str]) -> Evaluation:
    """What follows from sums of several groups of clients, in order."""
    return summarise(next((m for _, m in pieces if m), ()), joined([sums for sums, _ in pieces]), clients)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Sums of groups of clients, one after the other; of groups without examples only their two zeros are known.

    Raises:
        DataError: no client of any group has an example.
    """
    width = max((p.shape[1] for p in pieces), default=2)
    total = torch.cat([functional.pad(p, (0, width - p.shape[1])) for p in pieces])
    if not bool(total[:, 1].any()):
        raise DataError("there is nothing to evaluate: no client has an example in this split.")
    return total


def check_split(data: "FederatedDataset | LazyDataset", split: str) -> None:
    """Refuse a split that the data does not have.

    Raises:
        DataError: the dataset has no such split.
    """
    if split not in ("train", "validation", "test"):
        raise invalid("split", split, '"train", "validation" or "test"')
    if split != "train" and getattr(data, split) is None and not data.has(split):
        raise DataError(
            f"the data has no {split} examples: cut some with data.split({split}=0.2), or name another split."
        )


def batch_sums(
    model: Model, views: Batch, held: Batch, batch: Batch, owner: Tensor, clients: int
) -> tuple[Tensor, tuple[Any, ...]]:
    """Sums [clients, 2 + ...] of loss, examples and metrics over a batch whose examples belong to `owner [n]`."""
    with torch.no_grad():
        output = model.call(views, held, batch, train=False)
    return output_sums(model, output, batch["y"], owner, clients)


def output_sums(
    model: Model, output: Tensor, target: Tensor, owner: Tensor, clients: int
) -> tuple[Tensor, tuple[Any, ...]]:
    """The same from outputs [n, ...]. A loss that gives a mean is asked client by client."""
    with torch.no_grad():
        sums = torch.zeros(clients, 2, dtype=torch.float64, device=output.device)
        sums[:, 1] = torch.bincount(owner, minlength=clients).double()
        if model.loss.returns == "per_example":
            sums[:, 0].index_add_(0, owner, model.loss.per_example(output, target).double())
        else:
            for client in torch.nonzero(sums[:, 1])[:, 0].tolist():
                own = owner == client
                sums[client, 0] = model.loss.mean(output[own], target[own]).double() * sums[client, 1]
        metrics = model.metrics(output)
        if metrics:
            sums = torch.cat((sums, metric_functions.evaluate_sums(metrics, output, target, owner, clients)), dim=1)
    return sums, metrics


def summarise(metrics: tuple[Any, ...], total: Tensor, clients: Sequence[str]) -> Evaluation:
    """What follows from the sums `total [clients, 2 + ...]` of all clients."""
    names = ("loss", *(m.name for m in metrics))
    both = torch.cat((total, total.sum(dim=0, keepdim=True)))
    columns = [both[:, 0] / both[:, 1]]
    parts = metric_functions.split_sums(metrics, both[:, 2:])
    columns += [m.finish(part) for m, part in zip(metrics, parts, strict=True)]
    values = torch.stack(columns, dim=1)
    notes: list[str] = []
    for metric, part, column in zip(metrics, parts, columns[1:], strict=True):
        missing = [i for i in torch.nonzero(column[:-1].isnan())[:, 0].tolist() if total[i, 1] > 0]
        if missing:
            where = ", ".join(str(clients[i]) for i in missing[:3]) + (" ..." if len(missing) > 3 else "")
            reason = metric.undefined(part[missing[0]])
            notes.append(f"{metric.name} is undefined at {len(missing)} client(s) ({where}): {reason}")
    better = (-1, *(1 if m.higher_is_better else -1 for m in metrics))
    return Evaluation(names, tuple(clients), total[:, 1], values[:-1], values[-1], better, tuple(notes))
