"""Distributed differential privacy: clients add discrete noise themselves, and the server learns nothing but the sum.

A client's row x [d], clipped to norm c and rotated by a random Hadamard matrix that everybody knows, is divided by the
granularity g, rounded at random to neighbouring integers, again and again until its norm is at most D, and noise on the
integers is added. Sums are taken modulo 2^bits: whatever wraps costs accuracy, never privacy.

    D^2 = min( (c/g + sqrt d)^2,  (c/g)^2 + d/4 + sqrt(2 ln(1/beta)) (c/g + sqrt(d)/2) ),   beta = exp(-1/2)

The noise of m clients together has the standard deviation z D: m is the smallest number of honest clients whose noise
is sure to be in a sum, and z the noise multiplier. What more clients add is more noise.

    discrete Gaussian of parameter s each (Kairouz, Liu & Steinke 2021, "The distributed discrete Gaussian mechanism for
    federated learning with secure aggregation", theorem 1): a sum of n of them is e^2/2-concentrated,
        t = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k / (k + 1))
        e = min( sqrt(D^2 / (m s^2) + t d / 2),  D / (sqrt(m) s) + t sqrt d )

    Skellam of variance v each (Agarwal, Kairouz & Liu 2021, "The Skellam mechanism for differentially private federated
    learning", theorem 3.5), whose sums are Skellam again, of variance V = m v: for integer orders a > 1
        R(a) = a D^2 / (2 V) + min( ((2 a - 1) D^2 + 6 D_1) / (4 V^2),  3 D_1 / (2 V) ),   D_1 = min(D^2, sqrt(d) D)

Neighbours differ in one client's row, which is there or is nought: that a client took part is no secret, and sums are
counted exactly. Nothing is claimed from sampling, for a server that is not trusted with updates knows whom it asked.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from atoll.errors import InvalidArgument, invalid
from atoll.secret import Source

Kind = Literal["discrete_gaussian", "skellam"]

BETA = math.exp(-0.5)
"""Of rounding again: at least 1 - beta of all roundings are short enough."""

WRAP = 2.0**-30
"""Chance that any coordinate of a round's sum wraps, at most."""

FINEST = 2.0**20
"""Largest standard deviation of a client's noise, in integers."""

ORDERS = (*range(2, 65), 72, 80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
"""Of Renyi divergences; integers, as the theorem on Skellam noise wants them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Everything clients and server must agree on for rows of one length.

    Attributes:
        kind: "discrete_gaussian" or "skellam".
        clip: c.
        length: d, of the rotated row.
        survivors: m.
        clients: of a cohort, at most.
        granularity: g, in units of the update.
        norm: D, L2 norm of a client's integers before noise, at most.
        noise: of one client: parameter s of the discrete Gaussian, or variance v of Skellam noise, in integers.
    """

    kind: Kind
    clip: float
    length: int
    survivors: int
    clients: int
    granularity: float
    norm: float
    noise: float

    @property
    def std(self) -> float:
        """Standard deviation of the noise of `survivors` clients on a coordinate of the sum, in units of the update."""
        variance = self.noise**2 if self.kind == "discrete_gaussian" else self.noise
        return math.sqrt(self.survivors * variance) * self.granularity

    def rdp(self, order: int) -> float:
        """Renyi divergence of one round's sum, at an integer order above 1."""
        if self.kind == "discrete_gaussian":
            return order * gaussian_concentration(self) ** 2 / 2
        return skellam_divergence(order, self.norm, self.length, self.survivors * self.noise)

    def encode(self, row: Tensor, source: Source) -> Tensor:
        """Integers [d] of a rotated row [d] float64 of norm at most `clip`, with this client's noise: int64."""
        position = row / self.granularity
        while True:
            rounded = torch.floor(position + source.uniform(len(row)))
            if float(torch.linalg.vector_norm(rounded)) <= self.norm:
                break
        draw = source.discrete_gaussian if self.kind == "discrete_gaussian" else source.skellam
        return rounded.to(torch.int64) + draw(self.noise, len(row))


@lru_cache(maxsize=64)
def scheme(
    kind: Kind,
    *,
    clip: float,
    noise_multiplier: float,
    survivors: int,
    clients: int,
    bits: int,
    length: int,
    block: int,
) -> Scheme:
    """The finest granularity with which no coordinate wraps, but for a chance of 2^-30 in a round; and no finer than
    2^-20 of a client's noise, beyond which nothing is gained.

    A coordinate of a rotated row of norm c is sub-Gaussian with parameter c / sqrt(block), and never above c. So with
    k = sqrt(2 ln(4 d / WRAP)) all coordinates of a sum of n clients stay below

        min(n c, k n c / sqrt(block)) + n g + k z D g sqrt(n / m).

    Args:
        kind: of the noise.
        clip: c, above 0.
        noise_multiplier: z: standard deviation of the noise on the sum, divided by the norm D of what a client adds.
        survivors: m.
        clients: n, largest number of clients in a sum.
        bits: of the ring.
        length: d.
        block: numbers in a block of the rotation.

    Raises:
        InvalidArgument: a ring that is too small.
    """
    reach = math.sqrt(2 * math.log(4 * length / WRAP))
    signal = clients * clip * min(1.0, reach / math.sqrt(block))
    half = 2.0 ** (bits - 1) - 1 - clients  # rounding adds less than 1 for each client

    def room(granularity: float) -> bool:
        norm = rounded_norm(clip / granularity, length)
        noise = reach * noise_multiplier * norm * math.sqrt(clients / survivors)
        return signal / granularity + noise <= half and noise_multiplier * norm <= FINEST * math.sqrt(survivors)

    coarsest = signal + clip * (1 + noise_multiplier)  # beyond it rounding drowns everything
    if half <= 0 or not room(coarsest):
        raise InvalidArgument(
            f"bits={bits} is too small for {clients} clients with noise_multiplier={noise_multiplier:g}, "
            f"survivors={survivors} and rows of {length} numbers: use bits={min(48, bits + 16)}."
        )
    low, high = math.log(clip) - 50.0, math.log(coarsest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if room(math.exp(middle)) else (middle, high)
    granularity = 2.0 ** math.ceil(high / math.log(2))
    norm = rounded_norm(clip / granularity, length)
    each = noise_multiplier * norm / math.sqrt(survivors)
    return Scheme(
        kind, clip, length, survivors, clients, granularity, norm, each if kind == "discrete_gaussian" else each**2
    )


def rounded_norm(clip: float, length: int) -> float:
    """D: a bound on the norm of a row [d] of norm `clip` after randomised rounding to integers that is met at least
    1 - beta of the time (Kairouz, Liu & Steinke 2021, proposition 22, with granularity 1)."""
    always = clip + math.sqrt(length)
    mostly = clip**2 + length / 4 + math.sqrt(2 * math.log(1 / BETA)) * (clip + math.sqrt(length) / 2)
    return min(always, math.sqrt(mostly))


def gaussian_concentration(own: Scheme) -> float:
    """e, for every number of clients from `survivors` to `clients`: the fewest noise, and the most rounding of sums."""
    square = own.noise**2
    k = np.arange(1, own.clients, dtype=np.float64)
    t = 10 * float(np.exp(-2 * math.pi**2 * square * k / (k + 1)).sum())
    share = own.norm / (math.sqrt(own.survivors) * own.noise)
    return min(math.sqrt(share**2 + t * own.length / 2), share + t * math.sqrt(own.length))


def skellam_divergence(order: int, norm: float, length: int, variance: float) -> float:
    """R(a) of Skellam noise of this variance on integers that one client moves by at most `norm`."""
    first = min(norm**2, math.sqrt(length) * norm)
    exact = ((2 * order - 1) * norm**2 + 6 * first) / (4 * variance**2)
    return order * norm**2 / (2 * variance) + min(exact, 3 * first / (2 * variance))


def epsilon(own: Scheme, *, rounds: int, delta: float) -> float:
    """Epsilon of some rounds of sums, at delta.

    By composition of Renyi divergences, converted by Canonne, Kamath & Steinke 2020, proposition 12:
        epsilon = min_a  rounds R(a) + ln((a - 1) / a) - (ln delta + ln a) / (a - 1)

    Args:
        own: the scheme.
        rounds: how many sums are released.
        delta: in (0, 1).
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise invalid("rounds", rounds, "an integer of at least 0")
    if isinstance(delta, bool) or not 0 < delta < 1:
        raise invalid("delta", delta, "a number in (0, 1)", "Choose it below 1 / number of clients.")
    if not rounds:
        return 0.0
    found = [
        rounds * own.rdp(a) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in ORDERS
    ]  # fmt: skip
    return max(0.0, min(found))
