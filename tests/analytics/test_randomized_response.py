"""Randomised response: exact probabilities, unbiased shares, and an epsilon that is not exceeded."""

import math

import pytest
import torch
from scipy import stats

from atoll.analytics import randomized_response
from atoll.errors import InvalidArgument


@pytest.mark.parametrize(("categories", "epsilon"), [(2, 0.5), (2, math.log(3)), (5, 1.0), (5, 30.0)])
def test_answers_have_their_probabilities(categories: int, epsilon: float) -> None:
    statistic = randomized_response(categories, epsilon=epsilon, seed=1)
    counts = statistic.local(torch.ones(50_000, dtype=torch.int64))
    truth = math.exp(epsilon) / (math.exp(epsilon) + categories - 1)
    assert stats.binomtest(int(counts[1]), 50_000, truth).pvalue > 1e-4
    if epsilon < 10:
        others = torch.cat((counts[:1], counts[2:])).numpy()
        assert len(others) == 1 or stats.chisquare(others).pvalue > 1e-4


def test_shares_are_unbiased_over_clients() -> None:
    clients = [torch.tensor([0] * 700 + [2] * 300), torch.tensor([0] * 500), torch.tensor([2] * 500)]
    found = [randomized_response(3, epsilon=1.0, seed=s).over(clients) for s in range(200)]
    assert all(f.answers == 2000 and math.isclose(float(f.shares.sum()), 1.0, abs_tol=1e-9) for f in found)
    shares = torch.stack([f.shares for f in found])
    expected = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    spread = shares.std(dim=0)
    assert bool(((shares.mean(dim=0) - expected).abs() < 4.5 * spread / 200**0.5).all())
    assert float(spread.max()) < 1.15 * found[0].error


def test_private_answers_differ() -> None:
    statistic = randomized_response(1000, epsilon=0.1)
    values = torch.arange(1000)
    assert not torch.equal(statistic.local(values), statistic.local(values))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: randomized_response(1, epsilon=1.0), "categories"),
        (lambda: randomized_response(2, epsilon=0.0), "epsilon"),
        (lambda: randomized_response(2, epsilon=math.nan), "epsilon"),
        (lambda: randomized_response(2, epsilon=1.0).local(torch.tensor([2])), "values"),
        (lambda: randomized_response(2, epsilon=1.0).local(torch.tensor([-1])), "values"),
        (lambda: randomized_response(2, epsilon=1.0).local(torch.tensor([0.5])), "values"),
        (lambda: randomized_response(2, epsilon=1.0).over([torch.zeros(0, dtype=torch.int64)]), "counts"),
    ],
)
def test_bad_input_is_refused_by_name(call, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        call()
