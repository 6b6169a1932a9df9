"""The statistics task: a question to every client whose answers are merged, never the rows behind them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Statistic(Generic[T, S, R]):
    """A federated statistic over clients' tables T, with sums S and a result R.

    Attributes:
        local: one client's table to its sums: all that leaves the client.
        merge: the sums of two groups of clients to those of both.
        finish: the sums of all clients to the result.
    """

    local: Callable[[T], S]
    merge: Callable[[S, S], S]
    finish: Callable[[S], R]

    def over(self, clients: Iterable[T]) -> R:
        """The result over clients, merged in their order."""
        return self.finish(reduce(self.merge, map(self.local, clients)))
