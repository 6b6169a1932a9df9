"""The secret source: a ChaCha20 stream keyed by the operating system, and exact samples of what privacy needs.

Floating-point noise betrays what it hides: not every number near x + z can be reached from every x (Mironov 2012, "On
significance of the least significant bits for differential privacy"; for Gaussian noise Jin et al. 2022, "Are we there
yet?"). Here noise is an exactly drawn integer times the spacing of a public grid, and what it is added to is rounded to
the same grid first: every sum is a point of the grid whatever the data. The spacing is a power of two that depends on
the standard deviation alone,

    g = 2^(floor(log2 std) - 32),

so that points are exact numbers in double precision, and there are 2^32 to 2^33 of them in a standard deviation. On
this grid the noise is the discrete Gaussian, for which the Gaussian mechanism's RDP bound alpha D^2 / (2 std^2) holds
as it stands (Canonne, Kamath & Steinke 2020, "The discrete Gaussian for differential privacy", theorem 4). Rounding d
numbers lets neighbours come apart by at most g sqrt(d) more than their distance D: for d = 50 million 2^-19 std.
"""

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

from atoll.errors import InvalidArgument, invalid
from atoll.secret import laws
from atoll.secret.rejection import CHUNK, STRETCH, Table, table

FINE = 32
"""Binary digits between a standard deviation and the grid of double precision."""

COARSE = 19
"""The same for single precision, whose 24 digits must hold 13.4 standard deviations."""

MIDDLE = 1.5 * 2.0**52
MAGIC = 0x4338 << 48
"""The bits of `MIDDLE`, around which doubles are the integers: those of MIDDLE + x are MAGIC + x for |x| < 2^51."""

BUFFER = 1 << 14
ZEROS = memoryview(bytes(8 * CHUNK))
"""What is encrypted to see the stream."""

LARGEST = 2.0**40


class Source:
    """A stream of secret random numbers.

    Without a seed every stretch of the stream is ChaCha20 under a fresh key of the operating system: what was drawn
    tells nothing of what will be, and a forked process begins with keys of its own. With a seed the stream is a
    function of the seed and of what was asked for before, for tests; `private` is False then. A source may be shared by
    threads; it cannot be copied or pickled, which would repeat its stream.

    Args:
        seed: None, or an integer for a stream that can be repeated and protects nobody.
    """

    __slots__ = ("__weakref__", "_at", "_buffer", "_key", "_lock", "_stretches")

    def __init__(self, *, seed: int | None = None) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise invalid("seed", seed, "an integer, or None for the operating system's randomness")
        self._key = None if seed is None else _hash(b"seed", str(seed).encode())
        self._begin()
        _SOURCES.add(self)

    @property
    def private(self) -> bool:
        """Whether nobody can repeat the stream."""
        return self._key is None

    def derive(self, *parts: str | int) -> "Source":
        """A source for one purpose, e.g. ("noise", round, client).

        A seeded one is a function of the seed and the parts alone, not of what was drawn before: asked for twice it
        repeats itself. One that is private is as good for every purpose: itself.
        """
        if self._key is None:
            return self
        derived = Source(seed=0)
        derived._key = _hash(self._key, repr(parts).encode())
        return derived

    def __repr__(self) -> str:
        return "Source()" if self.private else "Source(seed=..., not private)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Source cannot be copied or pickled: its stream would repeat. Make another one.")

    # --- bits ---------------------------------------------------------------------------------------------------------

    def bytes(self, count: int) -> bytes:
        """Random bytes."""
        return self._take(_count("count", count)).tobytes()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Uniform words of 64 bits: [count]."""
        return self._take(8 * count).view(np.uint64)

    def _take(self, count: int) -> NDArray[np.uint8]:
        with self._lock:
            if count > BUFFER // 4:
                return self._stretch(count)
            if self._at + count > BUFFER:
                self._buffer, self._at = self._stretch(BUFFER), 0
            taken = self._buffer[self._at : self._at + count].copy()
            self._buffer[self._at : self._at + count] = 0
            self._at += count
            return taken

    def _stretch(self, count: int) -> NDArray[np.uint8]:
        self._stretches += 1
        if self._key is None:
            return keystream(os.urandom(32), bytes(12), 0, count)
        return keystream(self._key, self._stretches.to_bytes(12, "little"), 0, count)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._buffer = np.empty(0, dtype=np.uint8)
        self._at = BUFFER
        self._stretches = 0

    def _forked(self) -> None:
        """In a forked process: a stream of its own, which for a seeded source cannot be repeated."""
        if self._key is not None:
            self._key = _hash(self._key, os.urandom(32))
        self._begin()

    # --- uniform ------------------------------------------------------------------------------------------------------

    def integers(self, bound: int, size: int | Sequence[int]) -> Tensor:
        """Integers of 0..bound - 1, all equally likely: int64.

        Args:
            bound: 1 to 2^63.
            size: length or shape.
        """
        if isinstance(bound, bool) or not isinstance(bound, int) or not 1 <= bound <= 2**63:
            raise invalid("bound", bound, "an integer from 1 to 2^63")
        shape = _shape(size)
        count = math.prod(shape)
        found = np.empty(count, dtype=np.uint64)
        # Words from the last multiple of the bound on would favour small numbers.
        largest = np.uint64((1 << 64) // bound * bound - 1)
        places: slice | NDArray[np.intp] = slice(0, count)
        missing = count
        while missing:
            word = self.words(missing)
            found[places] = word % np.uint64(bound)
            (over,) = np.nonzero(word > largest)
            places = over if isinstance(places, slice) else places[over]
            missing = len(over)
        return torch.from_numpy(found.view(np.int64)).reshape(shape)

    def uniform(self, size: int | Sequence[int]) -> Tensor:
        """Multiples of 2^-53 in [0, 1), all equally likely: float64."""
        shape = _shape(size)
        found = (self.words(math.prod(shape)) >> np.uint64(11)).astype(np.float64)
        return torch.from_numpy(found).mul_(2.0**-53).reshape(shape)

    def bernoulli(self, probability: float | Fraction, size: int | Sequence[int]) -> Tensor:
        """True with exactly this probability, independently: bool.

        Args:
            probability: in [0, 1]; a float stands for the dyadic number it is.
            size: length or shape.
        """
        if isinstance(probability, bool) or not 0 <= probability <= 1:
            raise invalid("probability", probability, "a number in [0, 1]")
        exact = Fraction(probability)
        shape = _shape(size)
        if exact == 1:
            return torch.ones(shape, dtype=torch.bool)
        # U < p is decided by the first 64 bits of U, unless they are the first 64 of p.
        first, rest = divmod(exact.numerator << 64, exact.denominator)
        word = self.words(math.prod(shape))
        found = word < np.uint64(first)
        if rest:
            ties = np.flatnonzero(word == np.uint64(first))
            if len(ties):
                found[ties] = self.bernoulli(Fraction(rest, exact.denominator), len(ties)).numpy()
        return torch.from_numpy(found).reshape(shape)

    def permutation(self, count: int) -> Tensor:
        """An order of 0..count - 1, all equally likely: int64 [count]."""
        _count("count", count)
        while True:
            words = self.words(count)
            order = np.argsort(words, kind="stable")
            ranked = words[order]
            if not (ranked[1:] == ranked[:-1]).any():
                return torch.from_numpy(order.astype(np.int64))

    def sample(self, population: int, count: int) -> Tensor:
        """`count` different numbers of 0..population - 1 in random order, all such lists equally likely: int64."""
        _count("population", population)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= population:
            raise invalid("count", count, f"an integer from 0 to the population of {population}")
        if count > population // 4:
            return self.permutation(population)[:count]
        # Draws with repetitions left out are draws without replacement.
        drawn = np.empty(0, dtype=np.int64)
        while len(drawn) < count:
            more = self.integers(population, 2 * (count - len(drawn)) + 8).numpy()
            drawn = np.concatenate((drawn, more))
            first = np.unique(drawn, return_index=True)[1]
            drawn = drawn[np.sort(first)]
        return torch.from_numpy(drawn[:count].copy())

    # --- noise on the integers ----------------------------------------------------------------------------------------

    def discrete_gaussian(self, scale: float, size: int | Sequence[int]) -> Tensor:
        """Integers with P(x) proportional to exp(-x^2 / (2 scale^2)): int64.

        Exact but for the tail beyond 13.4 scale, whose mass is below 2^-128.

        Args:
            scale: above 0, up to 2^40; from 2 on it is the standard deviation to 30 digits.
            size: length or shape.
        """
        return self._integers(_gaussian(_scale("scale", scale)), size)

    def discrete_laplace(self, scale: float, size: int | Sequence[int]) -> Tensor:
        """Integers with P(x) proportional to exp(-|x| / scale): int64.

        Exact but for the tail beyond 90 scale, whose mass is below 2^-128. The variance is
        2 q / (1 - q)^2 with q = exp(-1 / scale).

        Args:
            scale: above 0, up to 2^40.
            size: length or shape.
        """
        return self._integers(_laplace(_scale("scale", scale)), size)

    def poisson(self, mean: float, size: int | Sequence[int]) -> Tensor:
        """Integers with P(x) = exp(-mean) mean^x / x!: int64.

        Exact but for tails whose mass is below 2^-128.

        Args:
            mean: above 0, up to 2^40.
            size: length or shape.
        """
        return self._integers(_poisson(_scale("mean", mean)), size)

    def skellam(self, variance: float, size: int | Sequence[int]) -> Tensor:
        """The difference of two Poisson numbers of mean variance / 2: int64, exact as they are.

        Args:
            variance: above 0, up to 2^40.
            size: length or shape.
        """
        law = _poisson(_scale("variance", variance) / 2)
        return self._integers(law, size) - self._integers(law, size)

    def _integers(self, law: Table, size: int | Sequence[int]) -> Tensor:
        shape = _shape(size)
        out = np.empty(math.prod(shape), dtype=np.int64)
        law.fill(out, self.words)
        return torch.from_numpy(out).reshape(shape)

    # --- noise on a grid ----------------------------------------------------------------------------------------------

    def normal(self, std: float, size: int | Sequence[int], *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Gaussian noise on the public grid: `grid(std, dtype)` times discrete Gaussian integers.

        To protect numbers, add it with `add_normal`, which rounds them to the grid.

        Args:
            std: standard deviation, 1e-30 to 1e30.
            size: length or shape.
            dtype: float64 or float32, in which points of the grid are exact.
        """
        spacing = grid(std, dtype)
        return self._on_grid(_gaussian(std / spacing), spacing, size, dtype)

    def laplace(self, scale: float, size: int | Sequence[int]) -> Tensor:
        """Laplace noise on the public grid: `grid(scale)` times discrete Laplace integers, float64.

        Args:
            scale: mean absolute value, 1e-30 to 1e30; the standard deviation is sqrt(2) scale.
            size: length or shape.
        """
        spacing = grid(scale)
        return self._on_grid(_laplace(scale / spacing), spacing, size, torch.float64)

    def add_normal(self, values: Tensor, std: float, *, within: float | None = None) -> Tensor:
        """The Gaussian mechanism: values rounded to the public grid `grid(std)`, plus Gaussian noise on it.

        Args:
            values: float64 or float32 of any shape, finite, of absolute values up to 2^18 std.
            std: standard deviation of the noise, 1e-30 to 1e30.
            within: cut values to this absolute value first, at most 2^17 std; only NaN is refused then.

        Returns:
            A new tensor like `values`. In single precision it is the sum in double precision, rounded.

        Raises:
            InvalidArgument: values that the grid cannot hold; the text does not tell them.
        """
        return self._add(values, _gaussian(std / grid(std)), grid(std), "std", within)

    def add_laplace(self, values: Tensor, scale: float) -> Tensor:
        """The Laplace mechanism: values rounded to the public grid `grid(scale)`, plus Laplace noise on it.

        Args:
            values: float64 or float32 of any shape, finite, of absolute values up to 2^18 scale.
            scale: mean absolute value of the noise, 1e-30 to 1e30.

        Returns:
            A new tensor like `values`.

        Raises:
            InvalidArgument: values that the grid cannot hold; the text does not tell them.
        """
        return self._add(values, _laplace(scale / grid(scale)), grid(scale), "scale")

    def _on_grid(self, law: Table, spacing: float, size: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        shape = _shape(size)
        out = torch.empty(math.prod(shape), dtype=dtype)
        integers = np.empty(min(len(out), STRETCH), dtype=np.int64)
        for piece in out.split(STRETCH):
            law.fill(integers[: len(piece)], self.words)
            piece.copy_(torch.from_numpy(integers[: len(piece)])).mul_(spacing)
        return out.reshape(shape)

    def _add(self, values: Tensor, law: Table, spacing: float, unit: str, within: float | None = None) -> Tensor:
        if values.dtype not in (torch.float64, torch.float32):
            raise invalid("values", values.dtype, "float64 or float32")
        out = values.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        bound = 2.0**50 * spacing
        if out.numel() and not _holds(out, bound if within is None else within):
            if within is not None:
                out.clamp_(-within, within)
            if within is None or not _holds(out, bound):
                raise InvalidArgument(
                    f"values hold NaN, infinities or numbers above 2^18 {unit}, which noise cannot protect: "
                    "clip what is summed, and refuse what is not finite, before noise is added."
                )
        flat = out.view(-1).numpy()
        integers, room = np.empty(min(len(flat), STRETCH), dtype=np.int64), np.empty(min(len(flat), CHUNK))
        for begin in range(0, len(flat), STRETCH):
            stretch = flat[begin : begin + STRETCH]
            law.fill(integers[: len(stretch)], self.words)
            for at in range(0, len(stretch), CHUNK):
                piece, noise = stretch[at : at + CHUNK], integers[at : min(at + CHUNK, len(stretch))]
                points = np.multiply(piece, 1 / spacing, out=room[: len(piece)], dtype=np.float64)
                np.rint(points, out=points)
                # All are integers below 2^53: the noise becomes one of double precision without a conversion.
                noise += MAGIC
                points += np.subtract(noise.view(np.float64), MIDDLE, out=noise.view(np.float64))
                np.multiply(points, spacing, out=piece, casting="same_kind")
        return out.to(values.device)


def keystream(key: bytes, nonce: bytes, counter: int, count: int) -> NDArray[np.uint8]:
    """The ChaCha20 stream of RFC 8439, section 2.4.

    Args:
        key: 32 bytes.
        nonce: 12 bytes.
        counter: of the first block of 64 bytes.
        count: bytes wanted; the counter must stay below 2^32, which is checked.

    Returns:
        uint8 [count].
    """
    if counter + -(-count // 64) > 1 << 32:
        raise invalid("count", count, "at most 2^32 - counter blocks of 64 bytes")
    out = np.empty(count, dtype=np.uint8)
    cipher = Cipher(algorithms.ChaCha20(key, counter.to_bytes(4, "little") + nonce), mode=None).encryptor()
    for begin in range(0, count, len(ZEROS)):
        piece = out.data[begin : begin + len(ZEROS)]
        cipher.update_into(ZEROS[: len(piece)], piece)
    return out


def grid(std: float, dtype: torch.dtype = torch.float64) -> float:
    """Spacing of the public grid for noise of this size: the power of two 2^(floor(log2 std) - 32).

    Args:
        std: 1e-30 to 1e30.
        dtype: float64; float32, which holds fewer digits, has 2^(floor(log2 std) - 19).
    """
    if isinstance(std, bool) or not isinstance(std, int | float) or not 1e-30 <= std <= 1e30:
        raise invalid("std", std, "a number from 1e-30 to 1e30")
    if dtype not in (torch.float64, torch.float32):
        raise invalid("dtype", dtype, "torch.float64 or torch.float32", "Round after the noise was added.")
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - (FINE if dtype == torch.float64 else COARSE))


def _holds(values: Tensor, bound: float) -> bool:
    """Whether no absolute value is above the bound; false of NaN."""
    least, most = torch.aminmax(values)
    return -bound <= float(least) and float(most) <= bound


@lru_cache(maxsize=16)
def _gaussian(scale: float) -> Table:
    return table(laws.gaussian(scale))


@lru_cache(maxsize=16)
def _laplace(scale: float) -> Table:
    return table(laws.laplace(scale))


@lru_cache(maxsize=16)
def _poisson(mean: float) -> Table:
    return table(laws.poisson(mean))


def _scale(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 <= value <= LARGEST:
        raise invalid(name, value, "a number from 1e-9 to 2^40")
    return float(value)


def _shape(size: int | Sequence[int]) -> tuple[int, ...]:
    shape = (size,) if isinstance(size, int) else tuple(size)
    for length in shape:
        _count("size", length)
    return shape


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise invalid(name, value, "an integer of at least 0")
    return value


def _hash(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=key, digest_size=32, person=b"atoll.secret").digest()


_SOURCES: "weakref.WeakSet[Source]" = weakref.WeakSet()


def _after_fork() -> None:
    for source in list(_SOURCES):
        source._forked()  # pyright: ignore[reportPrivateUsage]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
