"""Tables: every proposal dominates, sure decisions are right, and slow decisions give the same law as fast ones."""

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from scipy import stats

from atoll.secret import Source, laws
from atoll.secret.rejection import CHUNK, ENTRIES, STRETCH, Table, table

LAWS = {
    "gaussian 0.7": laws.gaussian(0.7),
    "gaussian 2.5": laws.gaussian(2.5),
    "gaussian large": laws.gaussian(1.3 * 2.0**32),
    "gaussian largest": laws.gaussian(2.0**40),
    "laplace 1.5": laws.laplace(1.5),
    "laplace large": laws.laplace(1.3 * 2.0**32),
    "poisson 3.3": laws.poisson(3.3),
    "poisson 1e5": laws.poisson(1e5),
    "poisson largest": laws.poisson(2.0**40),
}


def masses(law: laws.Law) -> tuple[np.ndarray, np.ndarray]:
    """The support of a narrow law and its probabilities."""
    x = np.arange(law.low, law.high + 1)
    p = np.array([float(laws.context(30).exp(law.exact(int(i), 20))) for i in x])
    return x, p / p.sum()


def misfit(drawn: np.ndarray, law: laws.Law) -> float:
    """p-value of a chi-square test against the law; cells below 5 expected draws are taken together."""
    x, p = masses(law)
    counts = np.array([(drawn == i).sum() for i in x], dtype=float)
    assert counts.sum() == len(drawn)
    expected = p * len(drawn)
    few = expected < 5
    counts = np.append(counts[~few], counts[few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    keep = expected > 0
    if expected[-1] < 1:
        keep[-1] = False
        assert counts[-1] <= 3
        expected = expected * counts[keep].sum() / expected[keep].sum()
    return float(stats.chisquare(counts[keep], expected[keep]).pvalue)


def draw(own: Table, count: int, seed: int = 0) -> np.ndarray:
    out = np.empty(count, dtype=np.int64)
    own.fill(out, Source(seed=seed).words)
    return out


@pytest.mark.parametrize("name", LAWS)
def test_proposals_dominate_the_law_and_sure_decisions_are_right(name: str) -> None:
    own = table(LAWS[name])
    law, width = own.law, 1 << own.shift
    assert own.owned.sum() == ENTRIES == len(own.entries) and own.bits >= 8
    assert law.low + width * len(own.owned) > law.high
    bins = (own.entries >> np.uint64(own.bits)).astype(np.int64)
    np.testing.assert_array_equal(np.bincount(bins, minlength=len(own.owned)), own.owned)
    for i in np.unique(np.linspace(0, len(own.owned) - 1, 300).astype(int)).tolist():
        first = law.low + i * width
        sure = int(own.entries[np.searchsorted(bins, i)]) & ((1 << own.bits) - 1)
        for x in (first, first + width - 1, min(max(law.mode, first), first + width - 1)):
            accepted = Decimal(own.factor) * laws.context(60).exp(law.exact(x, 40)) / Decimal(own.owned[i])
            assert Decimal(sure) / (1 << own.bits) <= accepted <= 1


@pytest.mark.parametrize("name", LAWS)
def test_few_proposals_are_rejected(name: str) -> None:
    asked = 0
    source = Source(seed=1)

    def words(count: int) -> np.ndarray:
        nonlocal asked
        asked += count
        return source.words(count)

    table(LAWS[name]).fill(np.empty(20_000, dtype=np.int64), words)
    assert asked < 1.35 * 20_000


@pytest.mark.parametrize("name", ["gaussian 0.7", "gaussian 2.5", "laplace 1.5", "poisson 3.3"])
def test_draws_follow_the_law(name: str) -> None:
    assert misfit(draw(table(LAWS[name]), STRETCH + CHUNK + 5), LAWS[name]) > 1e-4


def wide(law: laws.Law, most_bits: int) -> Table:
    """A table with needlessly wide bins, so that the shape inside a bin comes from decisions alone."""
    low = 0 if law.low >= 0 else law.low - 2**17
    return table(replace(law, low=low, high=law.high + 2**17), most_bits=most_bits)


@pytest.mark.parametrize("law", [laws.gaussian(20.0), laws.laplace(11.0), laws.poisson(300.0)], ids=["g", "l", "p"])
@pytest.mark.parametrize(("most_bits", "draws"), [(64, 100_000), (4, 30_000), (1, 4_000)])
def test_fast_and_slow_decisions_give_the_same_law(law: laws.Law, most_bits: int, draws: int) -> None:
    """With few bits of the uniform number in the word, most decisions need more bits than there are."""
    own = wide(law, most_bits)
    assert own.shift >= 4 and own.bits == min(most_bits, 48 - own.shift)
    assert misfit(draw(own, draws), law) > 1e-4
