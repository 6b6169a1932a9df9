"""What travels in a round: a task to the clients, a report from them, and a report combined as far as it can be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


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
class Report:
    """A tile's answer to a training task.

    Attributes:
        clients: names, one for each row.
        wire: encoded rows; with a summing channel the sealed codes.
        parts: lengths of the averaged part, the averaged buffers and the summed part.
        weight: [C, 1]; empty under a summing channel, which carries weights inside.
        metrics: sums of loss and examples, [C, 2].
        finite: whether what the server cannot see is finite, [C]: rows under codes, memory, weights.
        memory: rows [C, M] the clients keep if the round is accepted.
        bytes: bytes each client sends.
    """

    clients: tuple[str, ...]
    wire: Tensor | Mapping[str, Tensor]
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
