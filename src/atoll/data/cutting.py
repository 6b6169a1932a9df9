"""Which of a client's examples are for training, validation and test.

The cut of a client is keyed by the seed and the client's name alone: a site that holds only its own rows cuts them
exactly as a simulation over everybody's rows does.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.errors import invalid
from atoll.random import client_keys, key, words

TRAIN, VALIDATION, TEST = 0, 1, 2

_TILE = 1 << 20


def check_fractions(test: float, validation: float) -> None:
    """Refuse fractions that are negative or leave nothing to train on."""
    for argument, value in (("test", test), ("validation", validation)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise invalid(argument, value, "a fraction in [0, 1)", f"For example {argument}=0.2; 0 cuts nothing.")
    if test + validation >= 1.0:
        raise invalid("test + validation", test + validation, "below 1", "Leave a part of the examples for training.")


def cut(
    clients: Sequence[str],
    offsets: NDArray[np.int64],
    *,
    test: float,
    validation: float,
    seed: int,
    labels: NDArray[np.int64] | None = None,
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.int8]:
    """Assign every packed example to training, validation or test.

    Each client gives round(n * test) examples to test and round(n * validation) to validation, and keeps at least
    one for training. With labels, the examples of a client are ordered by label (and at random within a label) and
    drawn at even steps, so that each label's share differs from the fraction by less than one example.

    With groups, all this is said of a client's groups instead of its examples: n counts them, and the label of a group
    is that of its first example.

    Args:
        clients: names, one per client.
        offsets: int64 [clients + 1], where each client's examples start.
        test: fraction in [0, 1).
        validation: fraction in [0, 1), test + validation < 1.
        seed: the experiment's seed.
        labels: int64 [N] to stratify by, or None.
        groups: int64 [N]; examples of a client with the same number go the same way. None: each goes by itself.

    Returns:
        int8 [N], one of TRAIN, VALIDATION, TEST.

    Raises:
        InvalidArgument: when a fraction is out of range.
    """
    check_fractions(test, validation)
    total = int(offsets[-1])
    codes = np.zeros(total, dtype=np.int8)
    if total == 0 or (test == 0 and validation == 0):
        return codes
    sizes = np.diff(offsets)
    if groups is not None:
        owned = np.stack([np.repeat(np.arange(len(sizes)), sizes), groups], axis=1)
        known, first, place = np.unique(owned, axis=0, return_index=True, return_inverse=True)
        bounds = np.searchsorted(known[:, 0], np.arange(len(offsets)))
        first_label = None if labels is None else labels[first]
        whole = cut(clients, bounds, test=test, validation=validation, seed=seed, labels=first_label)
        return whole[place.reshape(-1)]
    for_test = np.minimum(np.floor(sizes * test + 0.5).astype(np.int64), np.maximum(sizes - 1, 0))
    for_validation = np.minimum(
        np.floor(sizes * validation + 0.5).astype(np.int64), np.maximum(sizes - 1, 0) - for_test
    )
    keys = client_keys(clients)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    drawn = _keyed(key(seed, "cut", "order"), keys, offsets)
    order = np.lexsort((drawn, owner) if labels is None else (drawn, labels, owner))

    starts = words(key(seed, "cut", "start"), 0, keys, 2)
    held = for_test + for_validation
    position = np.arange(total, dtype=np.int64) - offsets[:-1][owner]
    out = _evenly(position, owner, sizes, held, starts[:, 0])
    taken = order[out]
    owner_out = owner[out]
    rank = np.arange(len(taken), dtype=np.int64) - (np.cumsum(held) - held)[owner_out]
    tested = _evenly(rank, owner_out, held, for_test, starts[:, 1])
    codes[taken] = np.where(tested, TEST, VALIDATION)
    return codes


def _evenly(
    position: NDArray[np.int64],
    owner: NDArray[np.int64],
    sizes: NDArray[np.int64],
    wanted: NDArray[np.int64],
    start: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Choose `wanted` of each owner's `sizes` positions at even steps from a random start (systematic sampling)."""
    count = np.maximum(sizes, 1)
    first = (start % count.astype(np.uint64)).astype(np.int64)[owner]
    n, k = count[owner], wanted[owner]
    return ((position + 1) * k + first) // n > (position * k + first) // n


def _keyed(purpose: int, keys: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One random word per packed example, a function of the client's key and the example's place alone."""
    sizes = np.diff(offsets)
    out = np.empty(int(offsets[-1]), dtype=np.uint64)
    by_size = np.argsort(sizes, kind="stable")
    ascending = sizes[by_size].tolist()
    done = 0
    while done < len(by_size):
        # Neighbours in size share a tile, so that the padding to the tile's longest client stays small. The padded
        # size grows with the tile: the largest that fits is found by bisection.
        first = done
        stop = bisect_right(
            range(len(by_size)), _TILE, lo=done + 1, key=lambda last: (last + 1 - first) * ascending[last]
        )
        tile = by_size[done:stop]
        longest = int(sizes[tile[-1]])
        drawn = words(purpose, 0, keys[tile], longest)
        column = np.arange(longest)
        inside = column < sizes[tile][:, None]
        out[(offsets[tile][:, None] + column)[inside]] = drawn[inside]
        done = stop
    return out
