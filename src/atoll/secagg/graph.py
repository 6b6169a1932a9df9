"""Who keeps whose shares and shares masks with whom.

Up to `COMPLETE` clients everybody is everybody's neighbour. Above, every client draws `degree` clients for itself, by
its own nonce and the root of all clients' commitments: the keepers of its shares. Two clients share a mask where one
has drawn the other. The keepers of a client are thus uniformly random, for whatever the server and the clients that
collude with it do: they commit before the client's nonce is known, and a client that stays away changes nobody else's.
(A single graph drawn from all nonces would be theirs to choose: by saying who has dropped out, after they have seen
the nonces, they would pick among exponentially many.) Everybody checks its own neighbourhood.

With a group of g = degree + 1 (the keepers and the client itself), threshold t and c colluding keepers, a lying server
gets nothing of a client but in a sum with another honest one, while

    c <= min(2 t - g - 1, t - 2)   where everybody is a neighbour        c <= 2 t - g - 2   else

docs/security.md has the argument. Above `COMPLETE`, c is hypergeometric; `risk` is the chance that it is too large for
any client.

Source: Bell, Bonawitz, Gascon, Lepoint & Raykova 2020, "Secure single-server aggregation with (poly)logarithmic
overhead", section 4 (the malicious server; clients choose their neighbours).
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import comb

import numpy as np

from atoll.secagg.primitives import digest, stream

COMPLETE = 64
"""Clients up to which everybody is everybody's neighbour."""


def group_size(clients: int, degree: int) -> int:
    """Size g of a client's group among this many clients: keepers of its shares and itself."""
    return clients if clients <= COMPLETE else min(degree, clients - 1) + 1


def threshold_of(group: int, over: tuple[int, int]) -> int:
    """Members of a group that must be there to the end: the smallest number above this share of it."""
    above, below = over
    return above * group // below + 1


def keepers(nonce: bytes, root: bytes, own: int, present: Sequence[int], degree: int) -> tuple[int, ...]:
    """The clients that keep a client's shares.

    Args:
        nonce: the client's, 32 bytes.
        root: hash of everybody's commitments.
        own: the client's place in the cohort.
        present: places of all clients that have committed, in order.
        degree: how many to draw.

    Returns:
        Places, in order.
    """
    if len(present) <= COMPLETE:
        return tuple(p for p in present if p != own)
    skip = bisect_left(present, own)
    return tuple(sorted(present[i + (i >= skip)] for i in _drawn(nonce, root, own, len(present) - 1, degree)))


def drew(nonce: bytes, root: bytes, own: int, present: Sequence[int], degree: int, other: int) -> bool:
    """Whether another client is among a client's `keepers`."""
    if len(present) <= COMPLETE:
        return other != own and other in present
    place = bisect_left(present, other)
    if other == own or place == len(present) or present[place] != other:
        return False
    return place - (place > bisect_left(present, own)) in _drawn(nonce, root, own, len(present) - 1, degree)


def _drawn(nonce: bytes, root: bytes, own: int, others: int, degree: int) -> list[int]:
    """The numbers that a client draws among the others present."""
    count = min(degree, others)
    source = stream(digest("keepers", nonce, root, own))
    # The first so many distinct of uniform numbers are a uniform set. 64 bits modulo the others are uniform to one part
    # in 2^50.
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        words = np.frombuffer(source.update(bytes(16 * count)), dtype="<u8") % np.uint64(others)
        drawn |= dict.fromkeys(words.tolist())
    return list(drawn)[:count]


def bears(clients: int, degree: int, over: tuple[int, int]) -> int:
    """Keepers of a client that may collude with a lying server before it can be shown alone."""
    group = group_size(clients, degree)
    threshold = threshold_of(group, over)
    spare = 2 * threshold - group
    return min(spare - 1, threshold - 2) if clients <= COMPLETE else spare - 2


def risk(clients: int, degree: int, over: tuple[int, int], colluding: int) -> float:
    """Probability (union bound) that the keepers of some client hold more colluding ones than it bears.

    Args:
        clients: in the cohort.
        degree: keepers of each.
        over: the threshold's share of a group.
        colluding: clients that collude with the server.
    """
    bearable = bears(clients, degree, over)
    if clients <= COMPLETE or degree >= clients - 1:
        return float(colluding > bearable)
    others = clients - 1
    bad = sum(
        comb(colluding, i) * comb(others - colluding, degree - i)
        for i in range(max(bearable + 1, 0), min(colluding, degree) + 1)
    )
    return min(1.0, clients * (bad / comb(others, degree)))
