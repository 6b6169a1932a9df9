"""What travels in a round: a task to the clients, a report from them, and a report combined as far as it can be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from atoll.vectors import Change


@dataclass(frozen=True, slots=True)
class Task:
    """What a cohort is asked to do.

    Attributes:
        kind: "train" or "evaluate". (A statistics task is an `analytics.Statistic`: it needs no model.)
        seed: of keyed randomness.
        round: the round, from 0.
        clients: the cohort, in order.
        population: clients there are.
        message: the algorithm's broadcast.
        buffers: global floating buffers [B].
        private: start values [P - D] of the private parameters, for clients at their first visit.
        shared: what each transform tells the clients.
    """

    kind: Literal["train", "evaluate"]
    seed: int
    round: int
    clients: tuple[str, ...]
    population: int
    message: Any
    buffers: Tensor
    private: Tensor
    shared: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Clear:
    """Rows as clients computed them, which need not be written out to be added up.

    Attributes:
        change: the averaged part, [C, D].
        rest: averaged buffers and summed part, [C, L - D].
    """

    change: Change
    rest: Tensor

    @property
    def rows(self) -> Tensor:
        """All of it, [C, L]."""
        return torch.cat((self.change.rows, self.rest), dim=1) if self.rest.shape[1] else self.change.rows

    def total(self, weight: Tensor, split: int, *, last: bool = False) -> Tensor:
        """The weighted sum of the first `split` columns and the plain sum of the others, [L], by weight [C, 1]."""
        width, rest = self.change.shape[1], self.rest.to(weight.dtype)
        total = self.change.total(weight, last=last)
        if not rest.shape[1]:
            return total
        return torch.cat((total, (weight.T @ rest[:, : split - width])[0], rest[:, split - width :].sum(dim=0)))


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows that the pipeline multiplies by a factor each, which need not be written out to be added up.

    Attributes:
        plain: [C, L].
        factor: [C, 1] float64.
    """

    plain: Tensor
    factor: Tensor

    @property
    def rows(self) -> Tensor:
        """The rows that are sent, no longer than in double precision."""
        kept = self.factor * torch.where(self.factor < 1, 1 - 2 * torch.finfo(self.plain.dtype).eps, 1.0)
        return self.plain * kept.to(self.plain.dtype)


@dataclass(frozen=True, slots=True)
class Report:
    """A tile's answer to a training task.

    Attributes:
        clients: names, one for each row.
        wire: encoded rows; the sealed codes of a summing channel; in the clear where the server adds up the very rows;
            with factors where it adds up rows that were scaled, and noise.
        parts: lengths of the averaged part, the averaged buffers and the summed part.
        weight: [C, 1]; empty under a summing channel, which carries weights inside.
        metrics: sums of loss and examples, [C, 2].
        finite: whether what the server cannot see is finite, [C]: rows under codes, memory, weights.
        memory: rows [C, M] the clients keep if the round is accepted.
        bytes: bytes all the tile's clients send.
    """

    clients: tuple[str, ...]
    wire: "Tensor | Mapping[str, Tensor] | Clear | Scaled"
    parts: tuple[int, int, int]
    weight: Tensor
    metrics: Tensor
    finite: Tensor
    memory: Tensor
    bytes: int


@dataclass(frozen=True, slots=True)
class Partial:
    """A tile's report as far as it can be combined without the other tiles: what a worker sends to the driver.

    Attributes:
        clients: names.
        broken: those whose update, loss or weight is not finite; nothing else may be used then.
        parts: lengths of the averaged part, the averaged buffers and the summed part.
        total: weighted sum of the averaged parts and sum of the summed parts, [L]; None where rows or codes stand.
        rows: decoded rows [C, L] for a rule that needs them.
        codes: sum of the sealed codes of a summing channel.
        weight: of each client, [C, 1]; empty under a summing channel.
        metrics: sums of loss and examples, [2].
        bytes: bytes all clients send.
        refused: clients that a stage leaves out of the round: "reason", and "norm" where it is finite. They count for
            nothing: rows of nought, weights of nought.
    """

    clients: tuple[str, ...]
    broken: tuple[str, ...]
    parts: tuple[int, int, int]
    total: Tensor | None
    rows: Tensor | None
    codes: Mapping[str, Tensor] | None
    weight: Tensor
    metrics: Tensor
    bytes: int
    refused: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
