"""Which clients of a tile take a step together: those whose batches hold the same number of examples."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Members = slice | Tensor
"""Rows of a tile: a slice where they follow each other (their blocks are views), else their numbers, int64 [k]."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that take one or more steps together, each on the same number of examples.

    Attributes:
        number: of the pass over the data.
        rows: which rows, ascending, int64 [k].
        members: the same as a slice where they follow each other (their tensors are views), else as a tensor.
        begins: where the first batch of each begins in the pass, int64 [k]; the next batches follow.
        size: examples in a batch.
        count: steps.
        steps: local step number of each at the first step, int64 [k].
    """

    number: int
    rows: NDArray[np.int64]
    members: Members
    begins: NDArray[np.int64]
    size: int
    count: int
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
        before = 0
        for end in np.unique(turns[turns > 0]):  # while the same rows have a full batch left
            rows = everyone[turns > before]
            assert batch_size is not None
            begins = np.full(len(rows), before * batch_size)
            yield _group(number, rows, begins, batch_size, int(end) - before, done[rows] + before)
            before = int(end)
        short = (rest > 0) & (left > full)
        for size in np.unique(rest[short]):
            rows = everyone[short & (rest == size)]
            begins = full[rows] * (batch_size or 0)
            yield _group(number, rows, begins, int(size), 1, done[rows] + full[rows])
        done = done + turns + short
        number += 1


def _group(
    number: int, rows: NDArray[np.int64], begins: NDArray[np.int64], size: int, count: int, steps: NDArray[np.int64]
) -> Group:
    first, last = int(rows[0]), int(rows[-1])
    members = slice(first, last + 1) if last - first + 1 == len(rows) else torch.from_numpy(rows)
    return Group(number, rows, members, begins, size, count, steps)
