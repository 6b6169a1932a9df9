"""Who takes part: sizes, probabilities, and independence of history."""

import json
import math
import time

import numpy as np
import pytest
from scipy import stats

from atoll import random, sampling
from atoll.data.names import Numbered, PackedNames
from atoll.errors import InvalidArgument

CLIENTS = [f"c{i}" for i in range(12)]
RULES = {
    "fixed": sampling.fixed(5),
    "fraction": sampling.fraction(0.4),
    "poisson": sampling.poisson(0.3),
    "everyone": sampling.everyone(),
    "sequence": sampling.sequence([["c1", "c0"], [], ["c5"]]),
    "cyclic": sampling.cyclic(),
    "cyclic, shuffled": sampling.cyclic(shuffle=True),
}
rules = pytest.mark.parametrize("name", RULES)


@rules
def test_cohorts_are_distinct_known_clients_and_keyed_by_seed_and_round(name: str) -> None:
    rule = RULES[name]
    forward = [rule.cohort(3, r, CLIENTS) for r in range(30)]
    backward = [rule.cohort(3, r, CLIENTS) for r in reversed(range(30))]
    assert forward == backward[::-1], "a cohort must not depend on those drawn before"
    for cohort in forward:
        assert len(set(cohort)) == len(cohort) and set(cohort) <= set(CLIENTS)
    if name in ("fixed", "fraction", "poisson", "cyclic, shuffled"):
        assert forward != [rule.cohort(4, r, CLIENTS) for r in range(30)]
        assert len(set(forward)) > 5, "the same cohort in every round"


@rules
def test_expected_sizes_are_the_means(name: str) -> None:
    rule = RULES[name]
    sizes = [len(rule.cohort(0, r, CLIENTS)) for r in range(600)]
    assert abs(np.mean(sizes) - rule.expected(12)) < 5 * (12 * 0.25 / 600) ** 0.5
    if name != "poisson":
        assert np.mean(sizes) == pytest.approx(rule.expected(12))


@rules
def test_specs_are_json(name: str) -> None:
    assert json.loads(json.dumps(RULES[name].spec)) == RULES[name].spec
    RULES[name].check(CLIENTS)


@pytest.mark.parametrize("name", ["fixed", "fraction", "poisson"])
def test_every_client_comes_as_often(name: str) -> None:
    counts = dict.fromkeys(CLIENTS, 0)
    for round in range(2000):
        for client in RULES[name].cohort(7, round, CLIENTS):
            counts[client] += 1
    share = RULES[name].expected(12) / 12
    spread = math.sqrt(2000 * share * (1 - share))
    assert all(abs(c - 2000 * share) < 5 * spread for c in counts.values())


def test_poisson_sizes_are_binomial_and_may_be_nought() -> None:
    rule = sampling.poisson(0.1)
    sizes = np.array([len(rule.cohort(1, r, CLIENTS)) for r in range(3000)])
    assert (sizes == 0).any()
    observed = np.array([(sizes == k).sum() for k in range(4)] + [(sizes > 3).sum()])
    expected = 3000 * np.array([*stats.binom.pmf(range(4), 12, 0.1), stats.binom.sf(3, 12, 0.1)])
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    assert sampling.poisson(1).cohort(0, 0, CLIENTS) == tuple(CLIENTS)


def test_fractions_take_at_least_one() -> None:
    assert len(sampling.fraction(0.01).cohort(0, 0, CLIENTS)) == 1
    assert sampling.fraction(1.0).cohort(0, 0, CLIENTS) == tuple(CLIENTS)
    assert sampling.fraction(0.25).expected(12) == 3


def test_everyone_and_sequences_are_in_the_order_given() -> None:
    assert sampling.everyone().cohort(0, 5, CLIENTS) == tuple(CLIENTS)
    rule = RULES["sequence"]
    assert [rule.cohort(0, r, CLIENTS) for r in range(4)] == [("c1", "c0"), (), ("c5",), ("c1", "c0")]


def test_cyclic_visits_everybody_once_in_a_pass() -> None:
    assert [sampling.cyclic().cohort(0, r, CLIENTS)[0] for r in range(24)] == CLIENTS * 2
    rule = sampling.cyclic(shuffle=True)
    passes = [[rule.cohort(0, 12 * p + i, CLIENTS)[0] for i in range(12)] for p in range(3)]
    assert all(sorted(p) == sorted(CLIENTS) for p in passes) and passes[0] != passes[1]


@rules
def test_names_made_when_asked_for_are_drawn_alike(name: str) -> None:
    rule, numbers = RULES[name], [str(i) for i in range(12)]
    if name != "sequence":
        for round in range(20):
            drawn = rule.cohort(3, round, numbers)
            assert drawn == rule.cohort(3, round, Numbered(12)) and all(type(client) is str for client in drawn)
    packed = PackedNames.of(CLIENTS)
    rule.check(packed)
    assert [rule.cohort(3, r, CLIENTS) for r in range(20)] == [rule.cohort(3, r, packed) for r in range(20)]


def test_draws_are_those_of_version_0_1() -> None:
    # Runs are resumed with them, so a faster way to draw must draw the same.
    assert sampling.fixed(3).cohort(3, 7, CLIENTS) == ("c2", "c7", "c8")
    assert sampling.fixed(3).cohort(3, 7, Numbered(1_000_000)) == ("202724", "599120", "801360")
    assert sampling.poisson(0.3).cohort(3, 7, CLIENTS) == ("c3", "c5", "c6")
    rule = sampling.cyclic(shuffle=True)
    for round in (30, 5, 25, 29):
        order = random.numpy_generator(3, "cyclic", round // 12).permutation(12)
        assert rule.cohort(3, round, CLIENTS) == (CLIENTS[order[round % 12]],)
    assert sampling.cyclic().cohort(0, 1_234_567, Numbered(1_000_000)) == ("234567",)


def test_a_round_among_a_million_costs_what_the_cohort_costs() -> None:
    clients = Numbered(1_000_000)
    for rule in (sampling.fixed(10), sampling.cyclic(), sampling.cyclic(shuffle=True)):
        taken: list[float] = []
        for round in range(5):
            began = time.perf_counter()
            rule.cohort(0, round, clients)
            taken.append(time.perf_counter() - began)
        # Going through a million numbers in numpy alone takes a millisecond.
        assert min(taken) < 0.001, rule.spec


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"cohort=13.*at most the population of 12 clients.*everyone\(\)"):
        sampling.fixed(13).check(CLIENTS)
    sampling.fixed(12).check(CLIENTS)


def test_strangers_in_a_sequence_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="not in the data: x, z"):
        sampling.sequence([["c1"], ["z", "x"]]).check(CLIENTS)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_sizes_outside_their_range(size: object) -> None:
    with pytest.raises(InvalidArgument, match="cohort="):
        sampling.fixed(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan, True])
def test_rates_outside_their_range(rate: float) -> None:
    with pytest.raises(InvalidArgument, match="rate="):
        sampling.poisson(rate)
    with pytest.raises(InvalidArgument, match="cohort="):
        sampling.fraction(rate)


@pytest.mark.parametrize("cohorts", [[], "ab", ["ab"], [["a", "a"]]])
def test_what_is_no_sequence_of_cohorts(cohorts: object) -> None:
    with pytest.raises(InvalidArgument, match="cohorts"):
        sampling.sequence(cohorts)  # type: ignore[arg-type]


def test_cohort_arguments() -> None:
    assert sampling.resolve(None).spec == sampling.everyone().spec
    assert sampling.resolve(3).spec == sampling.fixed(3).spec
    assert sampling.resolve(0.5).spec == sampling.fraction(0.5).spec
    assert sampling.resolve(RULES["poisson"]) is RULES["poisson"]
    for value in (True, "all", [1]):
        with pytest.raises(InvalidArgument, match="cohort="):
            sampling.resolve(value)  # type: ignore[arg-type]


# --- minimum separation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "separation", "population"), [(3, 4, 12), (2, 5, 13), (1, 7, 7), (4, 1, 6)])
def test_nobody_takes_part_again_within_the_separation(size: int, separation: int, population: int) -> None:
    sampler = sampling.min_separation(size, separation)
    clients = [f"c{i}" for i in range(population)]
    sampler.check(clients)
    assert sampler.apart is not None and sampler.apart(population) == separation, "what is promised is what is held to"
    last: dict[str, int] = {}
    for round in range(60):
        cohort = sampling.min_separation(size, separation).cohort(3, round, clients)  # as after a restart
        assert len(set(cohort)) == size == sampler.expected(population)
        assert all(round - last.get(c, -separation) >= separation for c in cohort)
        last |= dict.fromkeys(cohort, round)
    if population == size * separation:
        assert set(last) == set(clients)
    assert sampler.cohort(3, 5, clients) == sampler.cohort(3, 5, clients)
    assert any(sampler.cohort(4, t, clients) != sampler.cohort(3, t, clients) for t in range(10)) or size == population


def test_groups_are_dealt_alike_in_every_version_of_numpy() -> None:
    clients = [f"c{i}" for i in range(8)]
    sampler = sampling.min_separation(2, 4)  # who is in which group; a run counts on it over restarts
    groups = [("c0", "c4"), ("c1", "c2"), ("c3", "c6"), ("c5", "c7")]
    assert [sampler.cohort(3, round, clients) for round in range(4)] == groups


def test_a_separation_the_population_is_too_small_for_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"separation=5 is not allowed.*at most 4"):
        sampling.min_separation(3, 5).check([f"c{i}" for i in range(14)])
    for arguments in ((0, 2), (2, 0), (2.0, 1)):
        with pytest.raises(InvalidArgument, match=r"^(size|separation)="):
            sampling.min_separation(*arguments)
