"""Randomised response: how often categories occur, when nobody is trusted with anybody's answer.

Of k categories everybody tells the true one with probability p and each of the others with probability q:

    p = e^epsilon / (e^epsilon + k - 1),    q = 1 / (e^epsilon + k - 1)

so that no answer is more than e^epsilon times as likely under one truth as under another: epsilon-local differential
privacy for each answer. Of n answers, c_j of which say j, the number whose truth is j is estimated without bias by

    (c_j - n q) / (p - q),    with a variance of at most  n / (4 (p - q)^2).

Warner 1965, "Randomized response: a survey technique for eliminating evasive answer bias"; Kairouz, Bonawitz & Ramage
2016, "Discrete distribution estimation under local privacy". Cost: k counts up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.analytics.statistic import Statistic
from atoll.errors import invalid
from atoll.secret import Source


@dataclass(frozen=True, slots=True)
class Shares:
    """Estimated frequencies of categories.

    Attributes:
        shares: [k] float64; they add up to 1, and may be below 0 where answers are few.
        error: standard deviation of each, at most.
        answers: n.
    """

    shares: Tensor
    error: float
    answers: int


def randomized_response(
    categories: int, *, epsilon: float, seed: int | None = None
) -> Statistic[Tensor, Tensor, Shares]:
    """The statistic: clients' true categories [n] in, randomised counts [k] out of every client, shares at the end.

    Every value is randomised by itself, at the client: epsilon holds for one value. A client that answers m times, or
    asks again, spends m epsilon.

    Args:
        categories: k, at least 2; values are integers from 0 to k - 1.
        epsilon: for one value, above 0 and up to 30.
        seed: answers that anybody can draw again, for tests: they protect nobody.
    """
    if isinstance(categories, bool) or not isinstance(categories, int) or categories < 2:
        raise invalid("categories", categories, "an integer of at least 2")
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= 30:
        raise invalid("epsilon", epsilon, "a number above 0, up to 30")
    others = 1 / (math.exp(epsilon) + categories - 1)
    # The chance of a uniform answer; the truth comes up in it as well. Rounded up, so that no epsilon is lost.
    blind = min(1.0, math.nextafter(categories * others, 1.0))
    source = Source(seed=seed)

    def local(values: Tensor) -> Tensor:
        if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise invalid(
                "values", f"{values.dtype} {tuple(values.shape)}", "a vector of integers, one for each answer"
            )
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < categories:
            raise invalid("values", "a category outside the range", f"integers from 0 to {categories - 1}")
        told = torch.where(
            source.bernoulli(blind, len(values)), source.integers(categories, len(values)), values.to(torch.int64)
        )
        return torch.bincount(told, minlength=categories)

    def finish(counts: Tensor) -> Shares:
        answers = int(counts.sum())
        if not answers:
            raise invalid("counts", 0, "those of at least one answer")
        uniform = blind / categories
        shares = (counts.double() / answers - uniform) / (1 - blind)
        return Shares(shares, 0.5 / (1 - blind) / math.sqrt(answers), answers)

    return Statistic(local, lambda one, other: one + other, finish)
