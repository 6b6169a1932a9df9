"""Audits: exact tails, published behaviour, and the power to find noise that is missing."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

import atoll
from atoll import transforms
from atoll.errors import InvalidArgument
from atoll.privacy import audit, distributed, factorization
from atoll.secret import Source
from atoll.transforms import discrete_gaussian


@pytest.mark.parametrize(("count", "probability"), [(1, 0.3), (20, 0.5), (500, 0.97), (7, 1.0), (7, 0.0)])
def test_tails_are_those_of_the_binomial_law(count: int, probability: float) -> None:
    k = np.arange(count + 2)
    found = audit._binomial_tails(count, probability)
    np.testing.assert_allclose(found, stats.binom.sf(k - 1, count, probability), atol=1e-11)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (40, 1000)])
def test_upper_bounds_are_those_of_clopper_and_pearson(hits: int, trials: int) -> None:
    expected = stats.beta.ppf(0.975, hits + 1, trials - hits) if hits < trials else 1.0
    assert math.isclose(audit.upper(hits, trials, 0.025), expected, rel_tol=1e-9)


def test_without_delta_it_is_a_binomial_test() -> None:
    p = math.exp(1.3) / (1 + math.exp(1.3))
    assert math.isclose(audit.rejection(1.3, 0.0, 45, 50, 99), stats.binom.sf(44, 50, p), rel_tol=1e-9)


def test_delta_by_hand() -> None:
    """Two guesses, both right, epsilon 0: P[W >= 2, 1, 0] = 1/4, 3/4, 1, so that max_i is (3/4 - 1/4) / 1."""
    assert math.isclose(audit.rejection(0.0, 0.01, 2, 2, 10), 0.25 + 2 * 10 * 0.01 * 0.5)


def test_all_right_bounds_epsilon_as_far_as_the_number_of_guesses_allows() -> None:
    included = np.arange(100) % 2 == 0
    found = audit.one_run(included.astype(float), included, delta=0.0, guesses=100)
    p = 0.05 ** (1 / 100)
    assert math.isclose(found.epsilon, math.log(p / (1 - p)), rel_tol=1e-6)
    assert found.correct == found.guesses == found.canaries == 100
    assert found.contradicts(3.0) and not found.contradicts(4.0)


def test_guessing_blindly_shows_nothing() -> None:
    source = Source(seed=0)
    wrong = sum(
        audit.one_run(source.normal(1.0, 200).numpy(), source.bernoulli(0.5, 200).numpy(), delta=0.0).epsilon > 0
        for _ in range(60)
    )
    assert wrong <= 9  # of 60, each with a chance of at most one in twenty


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_holds_for_randomised_response(epsilon: float) -> None:
    """Every canary's coin is told with probability e^eps / (1 + e^eps): the mechanism that is exactly epsilon."""
    source, p = Source(seed=1), 1 / (1 + math.exp(-epsilon))
    found = []
    for _ in range(15):
        coins = source.bernoulli(0.5, 1000)
        told = torch.where(source.bernoulli(p, 1000), coins, ~coins)
        found.append(audit.one_run(told.double().numpy(), coins.numpy(), delta=1e-6, guesses=1000).epsilon)
    assert sum(e > epsilon for e in found) <= 3 and np.median(found) > 0.7 * epsilon


def test_more_guesses_are_tried_at_a_price() -> None:
    source = Source(seed=2)
    coins = source.bernoulli(0.5, 400)
    scores = (coins.double() + source.normal(0.5, 400)).numpy()
    chosen = audit.one_run(scores, coins.numpy(), delta=0.0)
    fixed = audit.one_run(scores, coins.numpy(), delta=0.0, guesses=chosen.guesses)
    assert 0 < chosen.epsilon < fixed.epsilon and chosen.correct == fixed.correct


# --- many runs --------------------------------------------------------------------------------------------------------


def test_attack_bounds_hold_for_the_gaussian_mechanism_and_find_missing_noise() -> None:
    source = Source(seed=3)
    outside = source.normal(1.0, 2000).numpy()
    claimed = 4.38  # of the Gaussian mechanism with noise multiplier 1 at delta 1e-5, by the analytic formula
    found = audit.attack(source.normal(1.0, 2000).numpy() + 1, outside, delta=1e-5)
    assert 0.5 < found.epsilon < claimed
    alarm = audit.attack(source.normal(1.0, 2000).numpy() + 8, outside, delta=1e-5)
    assert alarm.contradicts(claimed)


def test_attack_bounds_are_rarely_wrong() -> None:
    source = Source(seed=4)
    wrong = sum(
        audit.attack(source.normal(1.0, 100).numpy(), source.normal(1.0, 100).numpy(), delta=0.0).epsilon > 0
        for _ in range(40)
    )
    assert wrong <= 6


# --- membership -------------------------------------------------------------------------------------------------------


def test_area_under_the_curve_is_that_of_scikit_learn_ties_included() -> None:
    source = Source(seed=5)
    own, other = source.integers(10, 300).numpy() + 2.0, source.integers(10, 500).numpy().astype(float)
    found = audit.membership(own, other)
    labels = np.concatenate((np.ones(300), np.zeros(500)))
    assert math.isclose(found.auc, roc_auc_score(labels, np.concatenate((own, other))))


def test_true_positives_at_few_false_ones() -> None:
    found = audit.membership([5, 6, 7, 8.5], list(range(10)), rates=(0.0, 0.1, 0.2, 1.0))
    assert found.hits == {0.0: 0.0, 0.1: 0.25, 0.2: 0.25, 1.0: 1.0}


# --- mechanisms -------------------------------------------------------------------------------------------------------


def gaussian(multiplier: float, clip: float, seed: int):
    source = Source(seed=seed)

    def release(rows: Tensor) -> Tensor:
        clipped = rows * (clip / rows.norm(dim=1, keepdim=True).clamp(min=clip))
        return source.add_normal(clipped.sum(dim=0), multiplier * clip)

    return release


@pytest.mark.parametrize("canaries", [300, 1200])
def test_a_mechanism_as_claimed_is_not_contradicted_and_one_without_noise_is(canaries: int) -> None:
    claimed = 4.38
    options = {"norm": 5.0, "delta": 1e-5, "canaries": canaries, "seed": 6}
    found = audit.mechanism(gaussian(1.0, 5.0, 0), 1000, **options)
    assert 0.3 < found.epsilon < claimed
    broken = audit.mechanism(gaussian(1e-3, 5.0, 0), 4000, **options)
    assert broken.contradicts(claimed if canaries > 1000 else 3.3)


def test_noise_that_is_half_of_what_is_claimed_is_found() -> None:
    """Epsilon 0.9 is claimed, as of noise multiplier 4; the noise is a quarter of it."""
    assert audit.mechanism(gaussian(1.0, 1.0, 1), 3000, norm=1.0, delta=1e-5, canaries=3000, seed=7).contradicts(0.9)
    assert not audit.mechanism(gaussian(4.0, 1.0, 1), 3000, norm=1.0, delta=1e-5, canaries=3000, seed=7).contradicts(
        0.9
    )


@pytest.mark.parametrize("name", ["tree", "buffered"])
def test_correlated_noise_over_rounds_holds_what_it_claims(name: str) -> None:
    """All clients take part in every round: 8 participations, counted by the sensitivity."""
    rounds, length, source = 8, 1500, Source(seed=8)
    strategy = getattr(factorization, name)(rounds)

    def stream(multiplier: float):
        state, t = strategy.init(length), iter(range(rounds))
        std = multiplier * strategy.sensitivity

        def release(rows: Tensor) -> Tensor:
            return rows.sum(dim=0) + strategy.next(next(t), state, lambda: source.normal(std, length))

        return release

    options = {"norm": 1.0, "delta": 1e-5, "canaries": length, "rounds": rounds, "seed": 9}
    assert not audit.mechanism(stream(1.0), length, **options).contradicts(4.38)
    assert audit.mechanism(stream(0.05), length, **options).contradicts(4.38)


def through_training(noise_multiplier: float) -> audit.Audit:
    """Canary clients in a whole experiment: one example each, whose gradient of a linear model is a coordinate."""
    count, source = 400, Source(seed=10)
    included = source.bernoulli(0.5, count)
    clients = {f"c{i}": (torch.eye(count)[i : i + 1] * 10, torch.tensor([[10.0]])) for i in range(count) if included[i]}
    module = torch.nn.Linear(count, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    stage = discrete_gaussian(
        clip=0.1, noise_multiplier=noise_multiplier, survivors=len(clients), clients=len(clients), seed=11
    )
    result = atoll.simulate(
        atoll.Model(module, loss="mse"), atoll.FederatedDataset.from_arrays(clients),
        algorithm=atoll.fedavg(atoll.local_sgd(1.0, steps=1, batch_size=None)), rounds=1, transforms=(stage,),
        channel=transforms.secure_sum(clip=1.0, least=len(clients)),
        aggregator=atoll.aggregators.mean(weights="uniform"), evaluate_every=0, progress=False,
    )  # fmt: skip
    return audit.one_run(result.vector.double().numpy(), included.numpy(), delta=1e-5)


def test_an_experiment_with_noise_holds_its_epsilon_and_without_noise_raises_the_alarm() -> None:
    own = distributed.scheme(
        "discrete_gaussian", clip=0.1, noise_multiplier=2.0, survivors=200, clients=200, bits=32, length=512, block=512
    )
    claimed = distributed.epsilon(own, rounds=1, delta=1e-5)
    assert 1.5 < claimed < 3.0
    assert not through_training(2.0).contradicts(claimed)
    assert through_training(1e-4).contradicts(claimed)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: audit.one_run([1.0, math.nan], [True, False], delta=0.0), "scores"),
        (lambda: audit.one_run([], np.array([], dtype=bool), delta=0.0), "scores"),
        (lambda: audit.one_run([1.0], [True], delta=0.0), "scores"),
        (lambda: audit.one_run([1.0, 2.0], [1, 0], delta=0.0), "included"),
        (lambda: audit.one_run([1.0, 2.0], [True], delta=0.0), "included"),
        (lambda: audit.one_run([1.0, 2.0], [True, False], delta=1.0), "delta"),
        (lambda: audit.one_run([1.0, 2.0], [True, False], delta=0.0, confidence=1.0), "confidence"),
        (lambda: audit.one_run([1.0, 2.0], [True, False], delta=0.0, guesses=1), "guesses"),
        (lambda: audit.one_run([1.0, 2.0], [True, False], delta=0.0, guesses=4), "guesses"),
        (lambda: audit.attack([1.0] * 3, [1.0] * 9, delta=0.0), "inside"),
        (lambda: audit.attack([1.0] * 9, [[1.0] * 9], delta=0.0), "outside"),
        (lambda: audit.membership([], [1.0]), "inside"),
        (lambda: audit.mechanism(lambda rows: rows.sum(0), 0, norm=1.0, delta=0.0), "length"),
        (lambda: audit.mechanism(lambda rows: rows.sum(0), 1, norm=1.0, delta=0.0, canaries=0), "canaries"),
    ],
)
def test_bad_input_is_refused_by_name(call, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        call()
