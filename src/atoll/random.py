"""Keyed randomness for experiments: every draw is a function of (seed, purpose, round, client), never of history.

A draw does not depend on which engine, worker or tile asks for it, nor on what was drawn before. Three forms:

* `generator` / `numpy_generator`: an ordinary generator for one purpose, where few are needed.
* `words`: counter-based bits for many clients at once (Philox4x32-10; Salmon, Moraes, Dror & Shaw 2011, "Parallel
  random numbers: as easy as 1, 2, 3"). The counter is (block, client, round), the key a hash of seed and purpose,
  so a tile of clients costs a handful of array operations whatever its width.
* `stretch`: the same of a wider kind (Philox4x64-10), for one client at a time and many numbers, as codecs draw them.

Nothing here is fit for privacy: noise, masks and secret samples come from the operating system's source.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@lru_cache(maxsize=4096)
def key(seed: int, *parts: str | int) -> int:
    """Hash a seed and the name of a purpose to 64 bits (BLAKE2b).

    Args:
        seed: the experiment's seed, any integer.
        parts: what the randomness is for, e.g. ("shuffle", "train", 3); strings and integers never collide.

    Returns:
        An integer in [0, 2**64).
    """
    named = tuple(p if isinstance(p, str) else int(p) for p in parts)
    digest = hashlib.blake2b(repr((int(seed), named)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@lru_cache(maxsize=1 << 16)
def client_key(client: str) -> int:
    """Hash a client's name to 64 bits: its identity in every keyed draw, whatever its place in the population."""
    return int.from_bytes(hashlib.blake2b(client.encode(), digest_size=8).digest(), "little")


def client_keys(clients: Sequence[str]) -> NDArray[np.uint64]:
    """`client_key` of several clients: uint64 [C]."""
    return np.fromiter((client_key(c) for c in clients), dtype=np.uint64, count=len(clients))


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """A torch generator (CPU) keyed by seed and purpose."""
    return torch.Generator().manual_seed(key(seed, *parts) & 0x7FFFFFFFFFFFFFFF)


def numpy_generator(seed: int, *parts: str | int) -> np.random.Generator:
    """A numpy generator keyed by seed and purpose."""
    return np.random.Generator(np.random.Philox(key=key(seed, *parts)))


def philox(counter: NDArray[np.uint64], key0: int, key1: int) -> NDArray[np.uint64]:
    """Philox4x32-10 of many counters under one key.

    Args:
        counter: uint64 [4, n], each entry a 32-bit word.
        key0: low 32 bits of the key.
        key1: high 32 bits of the key.

    Returns:
        uint64 [4, n], each entry a 32-bit word.

    Source: Salmon et al. 2011, section 3.3; checked against the published known answers.
    """
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(key0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(key1),
            p0 & _LOW,
        )
        key0 = (key0 + _WEYL[0]) & 0xFFFFFFFF
        key1 = (key1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def words(purpose: int, index: int | NDArray[np.uint64], clients: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """Independent 64-bit words for each client.

    Args:
        purpose: a key from `key(seed, ...)`.
        index: the round, or another number in [0, 2**32) such as a local step, one for all or one for each client.
        clients: keys from `client_keys`, uint64 [C].
        count: words wanted for each client, at most 2**33.

    Returns:
        uint64 [C, count]; word j of a client does not depend on `count` or on the other clients.
    """
    blocks = (count + 1) // 2
    counter = np.empty((4, len(clients), blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = (clients & _LOW)[:, None]
    counter[2] = (clients >> _SHIFT)[:, None]
    counter[3] = np.asarray(index, dtype=np.uint64).reshape(-1, 1)
    out = philox(counter.reshape(4, -1), purpose & 0xFFFFFFFF, purpose >> 32).reshape(4, len(clients), blocks)
    paired = np.empty((len(clients), blocks, 2), dtype=np.uint64)
    paired[:, :, 0] = out[0] | (out[1] << _SHIFT)
    paired[:, :, 1] = out[2] | (out[3] << _SHIFT)
    return paired.reshape(len(clients), 2 * blocks)[:, :count]


def stretch(purpose: int, index: int, clients: NDArray[np.uint64], count: int, begin: int = 0) -> NDArray[np.uint64]:
    """Independent 64-bit words for each client, many times faster than `words` where each client needs many.

    Args:
        purpose: a key from `key(seed, ...)`.
        index: the round, in [0, 2**64).
        clients: keys from `client_keys`, uint64 [C].
        count: words wanted for each client.
        begin: the place of the first one, a multiple of 4.

    Returns:
        uint64 [C, count]; word `begin + j` of a client does not depend on `begin`, `count` or the other clients.

    Source: Salmon et al. 2011, Philox4x64-10, as numpy's bit generator has it: counter (block, client, index, 0).
    """
    out = np.empty((len(clients), count), dtype=np.uint64)
    source = np.random.Philox(key=purpose)
    state: Any = source.state
    for row, client in zip(out, clients.tolist(), strict=True):
        state["state"]["counter"] = np.array([begin // 4, client, index, 0], dtype=np.uint64)
        source.state = state
        row[:] = source.random_raw(count)
    return out


def permutations(purpose: int, round: int, clients: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random order of 0..n-1 for each client, by sorting keyed 64-bit words.

    Args:
        purpose: a key from `key(seed, ...)`.
        round: the round.
        clients: keys from `client_keys`, uint64 [C].
        sizes: n of each client, int64 [C].

    Returns:
        int64 [C, max n]; the first n entries of a row are that client's permutation, the rest is unspecified.
    """
    longest = int(sizes.max(initial=0))
    drawn = words(purpose, round, clients, longest)
    # The place stands in the low bits: sorting numbers is many times faster than asking for the order of numbers.
    low = np.uint64((1 << max(1, (longest - 1).bit_length())) - 1)
    drawn &= ~low
    drawn |= np.arange(longest, dtype=np.uint64)
    if len(sizes) and int(sizes.min()) != longest:
        drawn[np.arange(longest) >= sizes[:, None]] |= ~low
    drawn.sort(axis=1)
    drawn &= low
    return drawn.view(np.int64)


def uniforms(purpose: int, index: int | NDArray[np.uint64], clients: NDArray[np.uint64], count: int) -> torch.Tensor:
    """Uniform float32 numbers in [0, 1), 24 bits each: [C, count]."""
    half = (count + 1) // 2
    bits = words(purpose, index, clients, half)
    pairs = np.stack((bits & _LOW, bits >> _SHIFT), axis=2).reshape(len(clients), 2 * half)[:, :count]
    return torch.from_numpy(((pairs >> np.uint64(8)).astype(np.float32)) * np.float32(2.0**-24))
