"""Channels: the last element of a pipeline, which carries rows to the server.

A channel has a client half (`seal`) and a server half, a small machine that takes in what clients sealed, tile after
tile, and ends with sums (`gather`), which `unseal` reads. `plain` shows the server every row; `secure_sum` one sum;
`grouped(secure_sum, rule)` a sum of each group, which a rule then combines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import Spec, record
from atoll.transforms.base import Codes, Keys

if TYPE_CHECKING:
    from atoll.aggregators import Aggregator
    from atoll.secagg import Parameters


class Opened(NamedTuple):
    """What a summing channel tells the server after the round."""

    weighted: Tensor  # [L_mean] sum of weight times averaged part, float64
    sums: Tensor  # [L - L_mean] sum of the summed part, float64
    weight: float
    loss: float  # sum of weight times a client's mean loss
    saturated: int  # values that had to be cut to the range


class Group(NamedTuple):
    """A sum and whose it is."""

    members: tuple[str, ...]
    total: Codes


class Gathering(Protocol):
    """The server half of a summing channel in one round."""

    def add(self, clients: tuple[str, ...], codes: Codes) -> None:
        """Take in a tile: its sealed rows, or their sum where the channel adds up tiles."""
        ...

    def finish(self) -> list[Group]:
        """The sums.

        Raises:
            Void: too few clients were left.
        """
        ...


@dataclass(frozen=True, slots=True)
class Channel:
    """How rows reach the server.

    Attributes:
        spec: name and arguments.
        sums_only: whether the server sees nothing but sums.
        weight_cap: largest weight of a client it can carry; None: any.
        check: refuses a cohort of so many clients before any work, by raising CompositionError.
        seal: client half of a summing channel: (rows [C, L], L_mean, weights [C, 1], sums of loss and examples [C, 2],
            clients in the cohort, keys) -> codes.
        gather: server half: (the cohort, keys of all its clients) -> what takes in codes.
        unseal: (sum of codes, L_mean, clients in the cohort, clients in the sum) -> Opened.
        each: whether `gather` needs every client's codes, not the sum of a tile's.
        leaving: which clients drop out before their row is sent, [C] of bool, by their keys; a simulation's choice.
        rule: what combines the sums of groups; None: there is one sum.
        ring: bits of what it adds up; None: it does not add.
        whole: the same channel for rows that are integers already, which it adds up as they are; None: it takes none.
        least: fewest clients of a sum that is shown.
        parameters: of its protocol over sites, for vectors of one number; None: it has none.
        server: what that protocol must bear.
    """

    spec: Spec
    sums_only: bool = False
    weight_cap: float | None = None
    check: Callable[[int], None] = lambda count: None
    seal: Callable[[Tensor, int, Tensor, Tensor, int, Keys], Codes] | None = None
    gather: Callable[[tuple[str, ...], Keys], Gathering] | None = None
    unseal: Callable[[Codes, int, int, int], Opened] | None = None
    each: bool = False
    leaving: Callable[[Keys], Sequence[bool]] | None = None
    rule: "Aggregator | None" = None
    ring: int | None = None
    whole: "Channel | None" = None
    least: int = 1
    parameters: "Parameters | None" = None
    server: Literal["lying", "curious"] = "lying"

    @property
    def name(self) -> str:
        """The channel's name."""
        return str(self.spec["name"])


def plain() -> Channel:
    """Rows travel as they are; the server sees every client's row."""
    return Channel(record("plain"))


def add(codes: Codes) -> Codes:
    """Server half: the sum of a tile's sealed rows, modulo 2^64."""
    return {name: tensor.to(torch.int64).sum(dim=0) for name, tensor in codes.items()}


def merge(total: Codes, other: Codes) -> Codes:
    """Server half: the sum of two sums, modulo 2^64."""
    return {name: total[name] + tensor for name, tensor in other.items()}


def resolve(channel: "str | Channel") -> Channel:
    """The channel meant by `channel=`: "plain" or a channel object."""
    if isinstance(channel, Channel):
        return channel
    if channel == "plain":
        return plain()
    raise invalid("channel", channel, '"plain" or a channel such as atoll.transforms.secure_sum(clip=1.0)')
