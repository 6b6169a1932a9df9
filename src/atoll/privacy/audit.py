"""Empirical audits: a lower bound on epsilon from attacks that succeed, to hold against the epsilon that is claimed.

An audit cannot prove privacy. A lower bound above the claimed epsilon proves that something is wrong: noise that was
forgotten, a sensitivity or a sampling that was counted wrongly.

    one run     m canaries are put in or left out by independent fair coins; whoever sees the output guesses the coins.
                Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run", theorem 5.2
    attack      a threshold attack over many independent runs with and without a record; Clopper-Pearson intervals.
                Jagielski, Ullman & Oprea 2020; Nasr, Song, Thakurta, Papernot & Carlini 2021
    membership  how well scores tell members from others: area under the curve, true positives at few false ones.
                Carlini et al. 2022, "Membership inference attacks from first principles"
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from atoll.errors import invalid
from atoll.secret import Source

Release = Callable[[Tensor], Tensor]
"""What is audited: rows [k, L] of the clients that take part, each of them allowed any norm -> what is released [L]."""

LARGEST = 50.0
"""Lower bounds are looked for up to here."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found.

    Attributes:
        epsilon: lower bound at `delta`: with the given confidence the true one is not smaller.
        delta: at which it holds.
        confidence: 1 - the chance that the bound is wrong.
        correct: guesses that were right.
        guesses: guesses that were made.
        canaries: canaries, or runs, in all.
    """

    epsilon: float
    delta: float
    confidence: float
    correct: int
    guesses: int
    canaries: int

    def contradicts(self, epsilon: float) -> bool:
        """Whether a claimed epsilon, at the same delta, is below the lower bound."""
        return self.epsilon > epsilon


def one_run(
    scores: ArrayLike, included: ArrayLike, *, delta: float, confidence: float = 0.95, guesses: int | None = None
) -> Audit:
    """A lower bound on epsilon from one run with canaries.

    The g / 2 highest scores are guessed to be in, the g / 2 lowest to be out, and v guesses are right. (epsilon, delta)
    is rejected if

        P[W >= v] + 2 m delta max_i (P[W >= v - i] - P[W >= v]) / i  <=  1 - confidence,

    W binomial of g draws with probability e^epsilon / (1 + e^epsilon). Neighbours differ in one canary that is there or
    not. Without `guesses` several numbers are tried, and each is given its share of the error.

    Args:
        scores: the higher, the more a canary seems to be in: [m].
        included: whether it was, by independent fair coins: [m].
        delta: of the claim.
        confidence: of the bound.
        guesses: g, an even number chosen before the scores were seen.
    """
    s, b = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if s.ndim != 1 or not len(s) or not np.isfinite(s).all():
        raise invalid("scores", s.shape, "a list of at least one finite number")
    if b.shape != s.shape or b.dtype != np.bool_:
        raise invalid("included", f"{b.dtype} {b.shape}", f"booleans, one for each of {len(s)} scores")
    _check(delta, confidence)
    m = len(s)
    if guesses is not None and (isinstance(guesses, bool) or guesses % 2 or not 2 <= guesses <= m):
        raise invalid("guesses", guesses, f"an even number from 2 to the {m} canaries")
    tried = [guesses] if guesses is not None else sorted({max(2, m >> k & ~1) for k in range(6) if m >= 2})
    if not tried:
        raise invalid("scores", m, "at least 2 canaries")
    order = np.argsort(s, kind="stable")
    found: list[Audit] = []
    for g in tried:
        half = g // 2
        correct = int(b[order[m - half :]].sum()) + int((~b[order[:half]]).sum())
        error = (1 - confidence) / len(tried)
        bound = _largest(lambda e, v=correct, g=g: rejection(e, delta, v, g, m) <= error)  # noqa: B023
        found.append(Audit(bound, delta, confidence, correct, g, m))
    return max(found, key=lambda a: a.epsilon)


def rejection(epsilon: float, delta: float, correct: int, guesses: int, canaries: int) -> float:
    """The chance of at least this many right guesses if (epsilon, delta) were true, at most."""
    tails = _binomial_tails(guesses, 1 / (1 + math.exp(-epsilon)))
    beyond = tails[correct]
    i = np.arange(1, correct + 1)
    worst = float(((tails[correct - i] - beyond) / i).max()) if correct else 0.0
    return min(1.0, float(beyond) + 2 * canaries * delta * worst)


def attack(inside: ArrayLike, outside: ArrayLike, *, delta: float, confidence: float = 0.95) -> Audit:
    """A lower bound on epsilon from independent runs with and without a record.

    Half of the runs choose the threshold; the others count. With Clopper-Pearson bounds on false positives and
    negatives, each of half the error,

        epsilon >= ln((1 - delta - FNR) / FPR)  and  ln((1 - delta - FPR) / FNR).

    Args:
        inside: scores of runs with the record: [n], at least 4.
        outside: scores of runs without it: [n'], at least 4.
        delta: of the claim.
        confidence: of the bound.
    """
    own, other = np.asarray(inside, dtype=np.float64), np.asarray(outside, dtype=np.float64)
    for name, value in (("inside", own), ("outside", other)):
        if value.ndim != 1 or len(value) < 4 or not np.isfinite(value).all():
            raise invalid(name, value.shape, "a list of at least 4 finite scores")
    _check(delta, confidence)
    error = (1 - confidence) / 2
    half = len(own) // 2, len(other) // 2

    def bounds(threshold: float, a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        missed, alarms = int((a < threshold).sum()), int((b >= threshold).sum())
        fnr, fpr = upper(missed, len(a), error), upper(alarms, len(b), error)
        ways = ((1 - delta - fnr, fpr), (1 - delta - fpr, fnr))
        return max([0.0, *(math.log(top / bottom) for top, bottom in ways if top > 0)])

    best = _threshold(own[: half[0]], other[: half[1]], delta)
    tested = own[half[0] :], other[half[1] :]
    correct = int((tested[0] >= best).sum() + (tested[1] < best).sum())
    guesses = len(tested[0]) + len(tested[1])
    return Audit(bounds(best, *tested), delta, confidence, correct, guesses, len(own) + len(other))


def _threshold(own: NDArray[np.float64], other: NDArray[np.float64], delta: float) -> float:
    """The threshold with the largest ratio of rates; one more of every mistake is counted, so that none is free."""
    choices = np.unique(np.concatenate((own, other)))
    missed = (np.searchsorted(np.sort(own), choices, "left") + 1) / (len(own) + 1)
    alarms = (len(other) - np.searchsorted(np.sort(other), choices, "left") + 1) / (len(other) + 1)
    ratio = np.maximum((1 - delta - missed) / alarms, (1 - delta - alarms) / missed)
    return float(choices[int(np.argmax(ratio))])


@dataclass(frozen=True, slots=True)
class Membership:
    """How well scores tell members from others.

    Attributes:
        auc: chance that a member's score is above another's; one half: not at all.
        hits: true positive rate at these false positive rates.
    """

    auc: float
    hits: dict[float, float]


def membership(inside: ArrayLike, outside: ArrayLike, *, rates: Sequence[float] = (0.001, 0.01, 0.1)) -> Membership:
    """Area under the curve and true positive rates of an attack by scores.

    Args:
        inside: scores of members, for example minus their loss: [n].
        outside: scores of others: [n'].
        rates: false positive rates at which the true positive rate is told.
    """
    own, other = np.asarray(inside, dtype=np.float64), np.asarray(outside, dtype=np.float64)
    for name, value in (("inside", own), ("outside", other)):
        if value.ndim != 1 or not len(value) or not np.isfinite(value).all():
            raise invalid(name, value.shape, "a list of at least one finite score")
    ranked = np.sort(other)
    below, upto = np.searchsorted(ranked, own, "left"), np.searchsorted(ranked, own, "right")
    auc = float((below + upto).sum()) / (2 * len(own) * len(other))
    hits: dict[float, float] = {}
    for rate in rates:
        allowed = math.floor(rate * len(other))
        # The highest scores of others that may be taken for members end here.
        edge = ranked[len(ranked) - allowed - 1] if allowed < len(ranked) else -math.inf
        hits[rate] = float((own > edge).mean())
    return Membership(auc, hits)


def mechanism(
    release: Release, length: int, *, norm: float, delta: float, canaries: int = 1000, rounds: int = 1,
    confidence: float = 0.95, seed: int | None = None,
) -> Audit:  # fmt: skip
    """Audit a mechanism in one run: canary clients along directions of their own, in or out by fair coins.

    Canary i sends `norm` along a random direction u_i in every round, its score is the product of u_i with all that was
    released. With no more canaries than coordinates directions are coordinates, so that canaries do not disturb each
    other; they add to the noise otherwise.

    Args:
        release: the whole pipeline from clients' rows [k, length] to what leaves it [length], k from 0 on.
        length: of a row.
        norm: of a canary's row; the clip norm is the worst that is allowed.
        delta: of the claim.
        canaries: how many.
        rounds: releases, all with the same clients.
        confidence: of the bound.
        seed: of coins and directions, for tests; default the secret source.
    """
    for name, value in (("length", length), ("canaries", canaries), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(name, value, "an integer of at least 1")
    _check(delta, confidence)
    source = Source(seed=seed)
    included = source.bernoulli(0.5, canaries)
    directions = torch.zeros(canaries, length, dtype=torch.float64)
    if canaries <= length:
        directions[torch.arange(canaries), source.sample(length, canaries)] = 1.0
    else:
        directions = source.normal(1.0, (canaries, length))
        directions /= directions.norm(dim=1, keepdim=True)
    total = torch.zeros(length, dtype=torch.float64)
    for _ in range(rounds):
        total += release(norm * directions[included]).double()
    scores = (directions @ total).numpy()
    return one_run(scores, included.numpy(), delta=delta, confidence=confidence)


def upper(hits: int, trials: int, error: float) -> float:
    """Clopper & Pearson's upper bound on a probability: the largest at which so few hits are not too unlikely.

    Args:
        hits: successes.
        trials: of so many.
        error: the chance that the bound is wrong.
    """
    if hits >= trials:
        return 1.0
    low, high = hits / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        few = 1 - _binomial_tails(trials, middle)[hits + 1]
        low, high = (middle, high) if few > error else (low, middle)
    return high


def _binomial_tails(count: int, probability: float) -> NDArray[np.float64]:
    """P[W >= k] for k = 0..count + 1."""
    k = np.arange(count + 1, dtype=np.float64)
    logs = torch.lgamma(torch.from_numpy(np.stack((k + 1, count - k + 1)))).sum(dim=0).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.float64(probability)
        mass = np.exp(math.lgamma(count + 1) - logs + _times(k, np.log(p)) + _times(count - k, np.log1p(-p)))
    return np.append(np.minimum(np.cumsum(mass[::-1])[::-1], 1.0), 0.0)


def _times(count: NDArray[np.float64], log: np.float64) -> NDArray[np.float64]:
    """count log, where nought times minus infinity is nought."""
    return np.where(count > 0, count * log, 0.0)


def _largest(rejected: Callable[[float], bool]) -> float:
    """The largest epsilon that is rejected; 0 if none is."""
    if not rejected(0.0):
        return 0.0
    low, high = 0.0, LARGEST
    if rejected(high):
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _check(delta: float, confidence: float) -> None:
    if isinstance(delta, bool) or not 0 <= delta < 1:
        raise invalid("delta", delta, "a number in [0, 1)")
    if isinstance(confidence, bool) or not 0 < confidence < 1:
        raise invalid("confidence", confidence, "a number in (0, 1)")
