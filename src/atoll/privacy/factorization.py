"""Correlated noise for sums that are released round after round: differential privacy without sampling assumptions.

A run of n rounds releases prefix sums of what clients send, A X with A [n, n] the lower triangle of ones: a model is
the sum of its steps. Write A = B C. Then

    release  A X + B Z,   Z normal with standard deviation  noise_multiplier * sens(C) * clip norm,

is one Gaussian mechanism (applied to C X, then B) with this noise multiplier, however the clients of each round were
chosen, if only nobody takes part more than k times, nor twice within b rounds ("minimum separation"). Round by round
the noise on the round's own sum is row t of A^-1 B Z: fresh noise, minus part of what was added before.

    sens(C) = max over allowed patterns p of the norm of sum_{t in p} C e_t        (C^T C >= 0 element-wise)

which is what one client with contributions of norm 1 in any directions can change C X by (Choquette-Choo, McMahan, Rush
& Thakurta 2023, "Multi-epoch matrix factorization mechanisms for private machine learning", theorem 2). A strategy
chooses C:

    independent   C = I: fresh noise in every round (DP-SGD without amplification)
    tree          C sums over the nodes of a binary tree: Kairouz, McMahan, Song, Thakkar, Thakurta & Xu 2021,
                  "Practical and private (deep) learning without sampling or shuffling"; with Honaker's estimate
    banded        C a band of a Toeplitz matrix: Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization"
    buffered      C Toeplitz, c_j = sum_i w_i a_i^(j - 1): Dvijotham, McMahan, Pillutla, Steinke & Thakurta 2024,
                  "Efficient and near-optimal noise generation for streaming differential privacy"; McMahan, Xu & Zhang
                  2024, "A hassle-free algorithm for strong differential privacy in federated learning"

Noise is made in a stream. Memory in vectors: none, log2 n, bands - 1, buffers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.errors import invalid, unknown
from atoll.spec import Spec, record

Draw = Callable[[], Tensor]
"""() -> a vector [L] of independent normal numbers with the standard deviation of Z."""

MOST_ROUNDS = 1 << 14

MOST_GROWTH = 2.0**15
"""Largest bands |c|_2 |C^-1|_1 of coefficients that may grow: numbers that are taken back are then so small, nothing of
the noise being above 13.4 standard deviations, that `bands` roundings in double precision stay below half a spacing of
the public grid."""


class Next(Protocol):
    """A strategy's stream."""

    def __call__(self, t: int, state: Tensor, draw: Draw, spacing: float = 0.0) -> Tensor:
        """The noise of round t."""
        ...


@dataclass(frozen=True, slots=True)
class Strategy:
    """A factorisation for n rounds.

    Attributes:
        spec: name and arguments.
        rounds: n.
        separation: b: a client takes part at most once in any b rounds that follow each other.
        participations: k: how often a client takes part at most.
        prefix: (r from 1 to n) -> sens of C for the first r rounds alone, or an upper bound on it.
        vectors: vectors of the sum's length that the stream keeps.
        next: (t from 0, state [vectors, L], draw, spacing) -> the round's noise [L]; changes the state in place. Call
            it once for every round, in order. With a spacing above 0, of which all that is drawn are multiples, what
            is taken back of earlier noise is rounded to multiples of it, and so the noise is one (not under `honaker`).
        matrix: () -> C [m, n], a row for each vector that is drawn, in the order in which they are.
    """

    spec: Spec
    rounds: int
    separation: int
    participations: int
    prefix: Callable[[int], float]
    vectors: int
    next: Next
    matrix: Callable[[], Tensor]

    @property
    def sensitivity(self) -> float:
        """sens(C), or an upper bound on it."""
        return self.prefix(self.rounds)

    def init(self, length: int) -> Tensor:
        """The state before round 0: [vectors, length] float64."""
        return torch.zeros(self.vectors, length, dtype=torch.float64)

    def decoder(self) -> Tensor:
        """A^-1 B [n, m]: the noise of every round in units of the drawn vectors; for n rounds, in O(n m) steps."""
        m = len(self.matrix())
        basis = iter(torch.eye(m, dtype=torch.float64))
        state = self.init(m)
        rows = [self.next(t, state, lambda: next(basis).clone()) for t in range(self.rounds)]
        return torch.stack(rows)

    def errors(self) -> Tensor:
        """Standard deviation of the noise on each prefix sum, when noise_multiplier and clip norm are 1: [n]."""
        return torch.linalg.vector_norm(self.decoder().cumsum(dim=0), dim=1) * self.sensitivity


def independent(rounds: int, *, separation: int = 1, participations: int | None = None) -> Strategy:
    """Fresh noise in every round: sens = sqrt(k).

    Args:
        rounds: n.
        separation: b.
        participations: k; default as many as the separation allows.
    """
    most = _participation(rounds, separation, participations)
    return Strategy(
        record("independent", rounds=rounds, separation=separation, participations=most),
        rounds, separation, most, lambda r: math.sqrt(_visits(r, separation, most)), 0,
        lambda t, state, draw, spacing=0.0: draw(),
        lambda: torch.eye(rounds, dtype=torch.float64),
    )  # fmt: skip


def tree(rounds: int, *, separation: int = 1, participations: int | None = None, honaker: bool = True) -> Strategy:
    """Noise on the nodes of a binary tree over the rounds.

    A prefix sum is the sum of the nodes that make it up. With Honaker's estimate a node is known twice, by itself and
    by its two children, whose variance is v_(l-1) each, and both are weighted by their precision:

        v_0 = 1,   v_l = 1 / (1 + 1 / (2 v_(l-1)))

    Honaker 2015, "Efficient use of differentially private binary trees" (from below, as it can be done in a stream).
    Sensitivity: a client is in a node of 2^l rounds at most min(k, ceil(2^l / b)) times, and k times in a level, so

        sens^2 <= k sum_l min(k, ceil(2^l / b))

    which is log2(n) + 1, rounded down, for k = 1.

    Args:
        rounds: n.
        separation: b.
        participations: k; default as many as the separation allows.
        honaker: estimate nodes from below as well.
    """
    most = _participation(rounds, separation, participations)
    levels = rounds.bit_length()

    def prefix(r: int) -> float:
        k = _visits(r, separation, most)
        return math.sqrt(k * sum(min(k, -(-(1 << level) // separation)) for level in range(r.bit_length())))

    own = [1.0]  # the weight of a node's own noise in its estimate
    variance = 1.0
    for _ in range(1, levels):
        own.append(2 * variance / (2 * variance + 1) if honaker else 1.0)
        variance = own[-1] if honaker else 1.0

    def step(t: int, state: Tensor, draw: Draw, spacing: float = 0.0) -> Tensor:
        estimate, level = draw(), 0
        before = torch.zeros_like(estimate)
        while t >> level & 1:
            before += state[level]
            below = estimate.add_(state[level])
            level += 1
            share = own[level]
            estimate = below.mul_(1 - share).add_(draw(), alpha=share)
        state[level] = estimate
        return estimate - before

    def matrix() -> Tensor:
        rows: list[Tensor] = []
        for t in range(rounds):
            for level in range((~t & (t + 1)).bit_length()):
                rows.append(torch.zeros(rounds, dtype=torch.float64))
                rows[-1][t + 1 - (1 << level) : t + 1] = 1
        return torch.stack(rows)

    return Strategy(
        record("tree", rounds=rounds, separation=separation, participations=most, honaker=honaker),
        rounds, separation, most, prefix, levels, step, matrix,
    )  # fmt: skip


def banded(
    rounds: int, *, bands: int, separation: int | None = None, participations: int | None = None,
    coefficients: Sequence[float] | None = None,
) -> Strategy:  # fmt: skip
    """C is lower triangular and Toeplitz with some bands, by default those that make the error smallest.

    What is made small is sens^2 times the mean square of the noise on the n prefix sums. With no more bands than the
    separation, columns of a pattern do not overlap, and sens^2 = k |c|^2.

    Args:
        rounds: n, at most 2^14.
        bands: numbers of a column that are not 0, 1 to n.
        separation: b; default as many as bands.
        participations: k; default as many as the separation allows.
        coefficients: c [bands] instead of the best ones; c_0 > 0, and all are divided by it. With more bands than the
            separation they must be non-negative and not increasing, as the best ones are then made to be; with fewer
            C^-1 must stay small, or the noise grows from round to round until what is drawn is lost in its last bits.
    """
    if isinstance(bands, bool) or not isinstance(bands, int) or not 1 <= bands <= rounds:
        raise invalid("bands", bands, f"an integer from 1 to rounds={rounds}")
    apart = bands if separation is None else separation
    most = _participation(rounds, apart, participations)
    if rounds > MOST_ROUNDS:
        raise invalid("rounds", rounds, "at most 2^14 for a banded strategy", "Use buffered.")
    if coefficients is None:
        c = torch.tensor(_best_bands(rounds, bands, apart, most), dtype=torch.float64)
    else:
        c = torch.tensor(list(coefficients), dtype=torch.float64)
        if len(c) != bands or not bool(torch.isfinite(c).all()) or not c[0] > 0:
            raise invalid("coefficients", coefficients, f"{bands} finite numbers, the first above 0")
        if bands > apart and not bool((c >= 0).all() and (c[1:] <= c[:-1]).all()):
            raise invalid(
                "coefficients", coefficients, "non-negative and not increasing where bands exceed the separation"
            )
        if not bool((c >= 0).all() and (c[1:] <= c[:-1]).all()):
            inverse = _inverse(torch.nn.functional.pad(c / c[0], (0, rounds - bands)))
            if not bands * float((c / c[0]).norm() * inverse.abs().sum()) <= MOST_GROWTH:
                raise invalid(
                    "coefficients", coefficients, f"such that noise does not grow over {rounds} rounds, in which "
                    "double precision would swallow what hides new data",
                    "Coefficients that are non-negative and do not increase never let it.",
                )  # fmt: skip

    c = c / c[0]
    weights = c.tolist()

    def step(t: int, state: Tensor, draw: Draw, spacing: float = 0.0) -> Tensor:
        back = torch.zeros_like(state[0]) if bands > 1 else None
        for j in range(1, min(t, bands - 1) + 1):
            assert back is not None
            back.add_(state[(t - j) % (bands - 1)], alpha=weights[j])
        noise = draw() if back is None else draw().sub_(_rounded(back, spacing))
        if bands > 1:
            state[t % (bands - 1)] = noise
        return noise

    whole = torch.nn.functional.pad(c, (0, rounds - bands))
    return Strategy(
        record("banded", rounds=rounds, bands=bands, separation=apart, participations=most, coefficients=c.tolist()),
        rounds, apart, most, _prefix(whole, apart, most), bands - 1, step, lambda: toeplitz(whole),
    )  # fmt: skip


def buffered(
    rounds: int, *, buffers: int = 3, separation: int = 1, participations: int | None = None,
    decays: Sequence[float] | None = None, scales: Sequence[float] | None = None,
) -> Strategy:  # fmt: skip
    """A buffered linear Toeplitz strategy (BLT): c_0 = 1, c_j = sum_i scales_i decays_i^(j - 1).

    The round's noise is z_t - sum_i scales_i S_i, after which S_i <- decays_i S_i + noise. Decays and scales are those
    that make sens^2 times the mean square of the noise on the n prefix sums small.

    Args:
        rounds: n, at most 2^14.
        buffers: vectors that are kept, 1 to 10.
        separation: b.
        participations: k; default as many as the separation allows.
        decays: instead of the best: [buffers] in (0, 1).
        scales: instead of the best: [buffers] above 0, their sum at most 1.
    """
    most = _participation(rounds, separation, participations)
    if isinstance(buffers, bool) or not isinstance(buffers, int) or not 1 <= buffers <= 10:
        raise invalid("buffers", buffers, "an integer from 1 to 10")
    if rounds > MOST_ROUNDS:
        raise invalid("rounds", rounds, "at most 2^14")
    if (decays is None) != (scales is None):
        raise invalid("decays", decays, "given together with scales")
    if decays is None or scales is None:
        a, w = _best_buffers(rounds, buffers, separation, most)
    else:
        a, w = tuple(map(float, decays)), tuple(map(float, scales))
        if len(a) != buffers or not all(0 < x < 1 for x in a):
            raise invalid("decays", decays, f"{buffers} numbers in (0, 1)")
        if len(w) != buffers or not all(x > 0 for x in w) or sum(w) > 1:
            raise invalid("scales", scales, f"{buffers} numbers above 0 whose sum is at most 1")
    c = _buffered_column(torch.tensor(a, dtype=torch.float64), torch.tensor(w, dtype=torch.float64), rounds)

    def step(t: int, state: Tensor, draw: Draw, spacing: float = 0.0) -> Tensor:
        back = torch.zeros_like(state[0])
        for i in range(buffers):
            back.add_(state[i], alpha=w[i])
        noise = draw().sub_(_rounded(back, spacing))
        for i in range(buffers):
            state[i].mul_(a[i]).add_(noise)
        return noise

    return Strategy(
        record("buffered", rounds=rounds, separation=separation, participations=most, decays=a, scales=w),
        rounds, separation, most, _prefix(c, separation, most), buffers, step, lambda: toeplitz(c),
    )  # fmt: skip


# --- by name ----------------------------------------------------------------------------------------------------------

STRATEGIES = ("buffered", "banded", "tree", "independent")


def named(name: str, rounds: int, separation: int) -> Strategy:
    """A strategy whose noise can lie on a grid: three buffers, as many bands as the separation, a tree without
    Honaker's estimate, or fresh noise.

    Args:
        name: one of `STRATEGIES`.
        rounds: n.
        separation: b; the band is cut at n.
    """
    if name == "buffered":
        return buffered(rounds, separation=separation)
    if name == "banded":
        return banded(rounds, bands=min(separation, rounds), separation=separation)
    if name == "tree":
        return tree(rounds, separation=separation, honaker=False)
    if name == "independent":
        return independent(rounds, separation=separation)
    raise unknown("strategy", name, STRATEGIES)


def restored(spec: Mapping[str, Any]) -> Strategy:
    """The strategy of a spec, with the same numbers whatever would be chosen today."""
    arguments = {n: v for n, v in spec.items() if n != "name"}
    if spec["name"] == "buffered":
        return buffered(**arguments, buffers=len(spec["decays"]))
    if spec["name"] == "banded":
        return banded(**arguments)
    if spec["name"] == "tree":
        return tree(**arguments)
    if spec["name"] == "independent":
        return independent(**arguments)
    raise unknown("strategy", str(spec["name"]), STRATEGIES)


# --- Toeplitz matrices ------------------------------------------------------------------------------------------------


def square_root(count: int) -> Tensor:
    """First column of the square root of the lower triangle of ones: r_0 = 1, r_k = r_(k-1) (2 k - 1) / (2 k).

    Optimal among Toeplitz strategies for one participation up to lower order terms: Fichtenberger, Henzinger &
    Upadhyay 2023, "Constant matters: fine-grained error bound on differentially private continual observation".
    """
    k = torch.arange(1, count, dtype=torch.float64)
    return torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod((2 * k - 1) / (2 * k), dim=0)))


def toeplitz(column: Tensor) -> Tensor:
    """The lower triangular Toeplitz matrix [n, n] with this first column."""
    n = len(column)
    index = torch.arange(n)[:, None] - torch.arange(n)
    return torch.where(index >= 0, column[index.clamp(min=0)], 0.0)


def toeplitz_sensitivity(column: Tensor, separation: int, participations: int) -> float:
    """sens of the lower triangular Toeplitz matrix with this first column [n].

    For non-negative entries that do not increase the worst pattern begins at once and comes back as soon and as often
    as it may: the norm of the sum of columns 0, b, 2 b, ... (Kalinin & Lampert 2024, "Banded square root matrix
    factorization for differentially private model training", theorem 2). Of no more than b bands entries may be
    anything: columns do not overlap, and sqrt(k) |c| is an upper bound, which is met unless the last is cut off.
    """
    if bool((column >= 0).all() and (column[1:] <= column[:-1]).all()):
        return math.sqrt(float(_squared_sensitivity(column, separation, participations)))
    assert int(column.nonzero().max()) < separation
    return math.sqrt(participations) * float(column.norm())


def _prefix(column: Tensor, separation: int, participations: int) -> Callable[[int], float]:
    """sens for the first rounds alone, of the lower triangular Toeplitz matrix with this first column [n]."""

    @lru_cache(maxsize=256)
    def prefix(r: int) -> float:
        return toeplitz_sensitivity(column[:r], separation, _visits(r, separation, participations))

    return prefix


def _squared_sensitivity(column: Tensor, separation: int, participations: int) -> Tensor:
    total = column.clone()
    for i in range(1, participations):
        shifted = torch.nn.functional.pad(column[: len(column) - i * separation], (i * separation, 0))
        total = total + shifted
    return (total * total).sum()


def _inverse(column: Tensor) -> Tensor:
    """First column of the inverse, by Newton's iteration for power series."""
    n, found = len(column), (1 / column[:1])
    while len(found) < n:
        size = min(2 * len(found), n)
        product = _product(column[:size], found, size)
        correction = torch.nn.functional.pad(product.new_full((1,), 2.0), (0, size - 1)) - product
        found = _product(found, correction, size)
    return found


def _product(left: Tensor, right: Tensor, size: int) -> Tensor:
    """The first `size` coefficients of a product of power series."""
    length = 1 << (len(left) + len(right) - 1).bit_length()
    return torch.fft.irfft(torch.fft.rfft(left, length) * torch.fft.rfft(right, length), length)[:size]


def _mean_square(column: Tensor) -> Tensor:
    """Mean square of the noise on n prefix sums: of the rows of A C^-1."""
    n = len(column)
    sums = _inverse(column).cumsum(dim=0)
    return (sums * sums * torch.arange(n, 0, -1, dtype=sums.dtype)).sum() / n


def _minimise(start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The argument of a local minimum, by L-BFGS with a line search; never worse than the start."""
    if not len(start):
        return start
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimiser.step(closure)
    found = point.detach()
    better = bool(torch.isfinite(found).all()) and float(loss(found)) <= float(loss(start))
    return found if better else start


def _log_cost(column: Tensor, separation: int, participations: int, *, apart: bool) -> Tensor:
    squared = participations * (column * column).sum() if apart else None
    if squared is None:
        squared = _squared_sensitivity(column, separation, participations)
    return torch.log(squared) + torch.log(_mean_square(column))


@lru_cache(maxsize=32)
def _best_bands(rounds: int, bands: int, separation: int, participations: int) -> tuple[float, ...]:
    apart = bands <= separation
    start = square_root(bands)

    def column(point: Tensor) -> Tensor:
        # Ratios of neighbours in (0, 1) keep the entries from increasing where that is needed.
        ratios = point if apart else torch.sigmoid(point)
        c = torch.cat((ratios.new_ones(1), ratios if apart else torch.cumprod(ratios, dim=0)))
        return torch.nn.functional.pad(c, (0, rounds - bands))

    begin = start[1:] if apart else torch.logit(start[1:] / start[:-1])
    found = _minimise(begin, lambda p: _log_cost(column(p), separation, participations, apart=apart))
    return tuple(column(found)[:bands].tolist())


def _buffered_column(decays: Tensor, scales: Tensor, rounds: int) -> Tensor:
    powers = decays[:, None] ** torch.arange(rounds - 1, dtype=torch.float64)
    return torch.cat((decays.new_ones(1), scales @ powers))


@lru_cache(maxsize=32)
def _best_buffers(
    rounds: int, buffers: int, separation: int, participations: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # Decay times spread evenly, in the logarithm, from one round to all.
    times = torch.logspace(0.0, math.log10(max(2.0, rounds / 2)), buffers, dtype=torch.float64)
    decays = torch.exp(-1 / times) if buffers > 1 else torch.tensor([0.5], dtype=torch.float64)
    scales = (1 - decays) ** 0.5
    start = torch.cat((torch.logit(decays), torch.log(scales / scales.sum()), torch.zeros(1, dtype=torch.float64)))

    def unpack(point: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.sigmoid(point[:buffers]) * (1 - 1e-9)
        w = torch.softmax(point[buffers:-1], dim=0) * torch.sigmoid(point[-1]) * (1 - 1e-12)  # rounded: 1 at most
        return a, w

    def loss(point: Tensor) -> Tensor:
        a, w = unpack(point)
        return _log_cost(_buffered_column(a, w, rounds), separation, participations, apart=False)

    a, w = unpack(_minimise(start, loss))
    return tuple(a.tolist()), tuple(w.tolist())


def _participation(rounds: int, separation: int, participations: int | None) -> int:
    """How often a client can take part at most."""
    for name, value in (("rounds", rounds), ("separation", separation)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(name, value, "an integer of at least 1")
    possible = -(-rounds // separation)
    if participations is None:
        return possible
    if isinstance(participations, bool) or not isinstance(participations, int) or participations < 1:
        raise invalid("participations", participations, "an integer of at least 1, or None")
    return min(participations, possible)


def _visits(rounds: int, separation: int, participations: int) -> int:
    """How often a client takes part at most in the first rounds."""
    return min(participations, -(-rounds // separation))


def _rounded(values: Tensor, spacing: float) -> Tensor:
    """Multiples of a power of two that are next to these values, in place; as they are where it is 0."""
    return values if spacing == 0 else values.div_(spacing).round_().mul_(spacing)
