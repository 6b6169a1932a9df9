"""Correlated noise: every stream decodes its strategy, and no client moves it further than its sensitivity says."""

import itertools
import json
import math

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant

from atoll.errors import InvalidArgument
from atoll.privacy import factorization as f
from atoll.secret import Source, grid

ROUNDS = 13
STRATEGIES = {
    "independent": f.independent(ROUNDS, separation=4),
    "tree": f.tree(ROUNDS, separation=3, honaker=False),
    "tree, once": f.tree(ROUNDS, participations=1),
    "tree, honaker": f.tree(ROUNDS, separation=4, participations=2),
    "banded": f.banded(ROUNDS, bands=4),
    "banded, once": f.banded(ROUNDS, bands=ROUNDS, participations=1, separation=ROUNDS),
    "banded, wide": f.banded(ROUNDS, bands=7, separation=3, participations=3),
    "banded, one": f.banded(ROUNDS, bands=1, separation=2),
    "banded, given": f.banded(ROUNDS, bands=3, separation=5, coefficients=(2.0, -0.5, 0.7)),
    "buffered": f.buffered(ROUNDS, buffers=2, separation=4),
    "buffered, once": f.buffered(ROUNDS, buffers=3, participations=1),
    "buffered, given": f.buffered(ROUNDS, buffers=2, separation=5, decays=(0.9, 0.2), scales=(0.3, 0.4)),
}


def patterns(rounds: int, separation: int, participations: int) -> list[tuple[int, ...]]:
    """All the rounds in which one client may take part, at most that often."""
    return [
        p
        for size in range(1, participations + 1)
        for p in itertools.combinations(range(rounds), size)
        if all(b - a >= separation for a, b in itertools.pairwise(p))
    ]


def moved(strategy: f.Strategy) -> float:
    """What one client can change C X by, tried out over all patterns; contributions may point against each other."""
    gram = strategy.matrix().T @ strategy.matrix()
    allowed = patterns(strategy.rounds, strategy.separation, strategy.participations)
    return max(math.sqrt(float(gram[list(p)][:, list(p)].abs().sum())) for p in allowed)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_stream_decodes_the_strategy(name: str) -> None:
    """W C = A for the noise W on prefix sums: releases are a function of C X + Z, which the guarantee is about."""
    strategy = STRATEGIES[name]
    prefix = strategy.decoder().cumsum(dim=0)
    triangle = torch.ones(ROUNDS, ROUNDS, dtype=torch.float64).tril()
    torch.testing.assert_close(prefix @ strategy.matrix(), triangle, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_client_moves_it_further_than_its_sensitivity(name: str) -> None:
    strategy, found = STRATEGIES[name], moved(STRATEGIES[name])
    assert found <= strategy.sensitivity * (1 + 1e-12)
    # Bounds that are not exact are not far off either.
    assert strategy.sensitivity <= found * (1 + 1e-12 if not name.startswith("tree") else 1.35)
    if strategy.participations == 1:
        assert math.isclose(found, strategy.sensitivity, rel_tol=1e-12)


def test_banded_strategies_may_be_cut_off_at_the_end() -> None:
    """The last participation of a pattern may fall where fewer rounds than bands are left: a bound, not more."""
    strategy = f.banded(10, bands=3, separation=3, coefficients=(1.0, 0.4, 0.6))
    assert moved(strategy) < strategy.sensitivity <= moved(strategy) * 1.2


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_the_promised_vectors_are_kept(name: str) -> None:
    strategy = STRATEGIES[name]
    source = Source(seed=0)
    state = strategy.init(5)
    assert state.shape == (strategy.vectors, 5) and state.dtype == torch.float64
    kept = state.data_ptr()
    for t in range(ROUNDS):
        noise = strategy.next(t, state, lambda: source.normal(1.0, 5))
        assert noise.shape == (5,) and bool(torch.isfinite(noise).all())
    assert state.data_ptr() == kept


@pytest.mark.parametrize("name", ["tree", "tree, honaker", "banded, wide", "buffered"])
def test_a_state_goes_on_where_it_was_left(name: str) -> None:
    strategy = STRATEGIES[name]
    draws = iter(Source(seed=1).normal(1.0, (200, 3)))
    again = iter(Source(seed=1).normal(1.0, (200, 3)))
    whole, state = [], strategy.init(3)
    for t in range(ROUNDS):
        whole.append(strategy.next(t, state, lambda: next(draws).clone()))
    parts, state = [], strategy.init(3)
    for t in range(ROUNDS):
        state = state.clone()  # what a checkpoint keeps
        parts.append(strategy.next(t, state, lambda: next(again).clone()))
    assert torch.equal(torch.stack(whole), torch.stack(parts))


@pytest.mark.parametrize("name", ["independent", "tree", "tree, honaker", "banded", "buffered"])
def test_noise_that_is_drawn_has_the_errors_that_are_told(name: str) -> None:
    strategy, source, length = STRATEGIES[name], Source(seed=3), 40_000
    state, total = strategy.init(length), torch.zeros(length, dtype=torch.float64)
    for t, error in enumerate(strategy.errors().tolist()):
        total += strategy.next(t, state, lambda: source.normal(strategy.sensitivity, length))
        assert abs(float(total.square().mean()) / error**2 - 1) < 5 * math.sqrt(2 / length)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_first_rounds_are_a_mechanism_of_their_own(name: str) -> None:
    """Of C X + Z only rows are released that no later round is part of; nobody moves these further than is told."""
    strategy, c = STRATEGIES[name], STRATEGIES[name].matrix()
    told = [strategy.prefix(r) for r in range(1, ROUNDS + 1)]
    for r, most in enumerate(told, 1):
        made = c[(c[:, r:] == 0).all(dim=1)]
        gram = (made.T @ made).abs()
        allowed = patterns(r, strategy.separation, strategy.participations)
        found = max(math.sqrt(float(gram[list(p)][:, list(p)].sum())) for p in allowed)
        assert found <= most * (1 + 1e-12)
        if strategy.spec["name"] in ("independent", "buffered"):
            assert math.isclose(found, most, rel_tol=1e-12)
    assert told == sorted(told) and told[-1] == strategy.sensitivity


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_restored_from_its_spec(name: str) -> None:
    strategy = STRATEGIES[name]
    again = f.restored(json.loads(json.dumps(strategy.spec)))
    assert again.spec == strategy.spec and again.sensitivity == strategy.sensitivity
    assert torch.equal(again.decoder(), strategy.decoder())


@pytest.mark.parametrize("name", f.STRATEGIES)
@pytest.mark.parametrize(("rounds", "separation"), [(1, 1), (7, 1), (7, 3), (7, 7), (7, 20)])
def test_noise_on_a_grid_stays_on_it(name: str, rounds: int, separation: int) -> None:
    strategy, source, spacing = f.named(name, rounds, separation), Source(seed=1), grid(1.0)
    exact, rounded = strategy.init(20), strategy.init(20)
    drawn: list[torch.Tensor] = []
    for t in range(rounds):
        drawn.clear()
        noise = strategy.next(t, rounded, lambda: drawn.append(source.normal(1.0, 20)) or drawn[-1].clone(), spacing)
        assert torch.equal(noise / spacing, (noise / spacing).round())
        kept = iter([d.clone() for d in drawn])
        plain = strategy.next(t, exact, lambda: next(kept))
        torch.testing.assert_close(noise, plain, rtol=0, atol=10 * spacing)
    assert strategy.participations == -(-rounds // separation)


def test_strategies_that_nobody_knows() -> None:
    for call in (lambda: f.named("band", 5, 1), lambda: f.restored({"name": "band"})):
        with pytest.raises(InvalidArgument, match=r"strategy='band' is unknown.*Did you mean 'banded'"):
            call()


# --- the tree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 8, 9, 100])
def test_a_tree_is_counted_as_the_accountant_of_others_counts_it(rounds: int) -> None:
    orders = [1.5, 2.0, 8.0, 32.0]
    sigma = 3.0
    accountant = rdp_privacy_accountant.RdpAccountant(orders, rdp_privacy_accountant.NeighborRel.REPLACE_SPECIAL)
    accountant.compose(dp_event.SingleEpochTreeAggregationDpEvent(sigma, rounds))
    own = f.tree(rounds, participations=1).sensitivity
    for order, found in zip(orders, accountant._rdp, strict=True):
        assert math.isclose(found, order * own**2 / (2 * sigma**2), rel_tol=1e-12)


def test_prefix_sums_of_a_plain_tree_have_as_many_terms_as_ones_in_binary() -> None:
    errors = f.tree(16, participations=1, honaker=False).errors() ** 2 / 5
    torch.testing.assert_close(errors, torch.tensor([float((t + 1).bit_count()) for t in range(16)]).double())


def test_estimates_from_below_have_the_variance_of_the_recursion() -> None:
    """v_1 = 2/3, v_2 = 4/7: the errors after 2 and 4 rounds; after 3 one node and one leaf."""
    errors = f.tree(4, participations=1).errors() ** 2 / 3
    torch.testing.assert_close(errors, torch.tensor([1, 2 / 3, 1 + 2 / 3, 4 / 7], dtype=torch.float64))


# --- Toeplitz ---------------------------------------------------------------------------------------------------------


def test_the_square_root_is_one() -> None:
    root = f.toeplitz(f.square_root(50))
    torch.testing.assert_close(root @ root, torch.ones(50, 50, dtype=torch.float64).tril())
    assert f.square_root(4).tolist() == [1, 0.5, 0.375, 0.3125]


@pytest.mark.parametrize(("separation", "participations"), [(1, 3), (2, 4), (3, 2), (5, 3), (13, 1)])
def test_sensitivity_of_a_column_that_does_not_increase(separation: int, participations: int) -> None:
    column = torch.tensor([1, 0.9, 0.9, 0.5, 0.4, 0.1, 0.1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    c = f.toeplitz(column)
    tried = max(float(c[:, list(p)].sum(dim=1).norm()) for p in patterns(13, separation, participations))
    assert math.isclose(tried, f.toeplitz_sensitivity(column, separation, participations), rel_tol=1e-12)


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if s.spec["name"] in ("banded", "buffered")])
def test_mean_square_by_power_series_is_that_of_the_matrix(name: str) -> None:
    c = STRATEGIES[name].matrix()
    wanted = (torch.ones_like(c).tril() @ torch.linalg.inv(c)).square().sum() / ROUNDS
    torch.testing.assert_close(f._mean_square(c[:, 0].contiguous()), wanted)


def rms(strategy: f.Strategy) -> float:
    return float(strategy.errors().square().mean().sqrt())


def test_better_strategies_have_smaller_errors() -> None:
    n, k = 64, {"participations": 1}
    found = {
        "independent": rms(f.independent(n, **k)),
        "tree": rms(f.tree(n, **k, honaker=False)),
        "honaker": rms(f.tree(n, **k)),
        "buffered": rms(f.buffered(n, buffers=3, **k)),
        "root": rms(f.banded(n, bands=n, separation=n, coefficients=f.square_root(n).tolist(), **k)),
        "best": rms(f.banded(n, bands=n, separation=n, **k)),
    }
    assert found["independent"] > found["tree"] > found["honaker"] > found["root"] > found["best"]
    assert found["buffered"] < 1.02 * found["best"], found


def test_best_bands_are_stationary() -> None:
    """No small change of a coefficient makes the error smaller."""
    best = f.banded(20, bands=4, participations=3)
    c = best.spec["coefficients"]
    for i, step in itertools.product(range(1, 4), (-1e-3, 1e-3)):
        changed = [v + step * (i == j) for j, v in enumerate(c)]
        assert rms(f.banded(20, bands=4, participations=3, coefficients=changed)) > rms(best)


def test_more_separation_needs_less_noise() -> None:
    found = [rms(f.buffered(60, buffers=2, separation=b)) for b in (1, 5, 20, 60)]
    assert found == sorted(found, reverse=True)


def test_choosing_a_strategy_is_deterministic() -> None:
    f._best_buffers.cache_clear()
    first = f.buffered(50, separation=10).spec
    f._best_buffers.cache_clear()
    assert f.buffered(50, separation=10).spec == first


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: f.tree(0), "rounds"),
        (lambda: f.tree(5, separation=0), "separation"),
        (lambda: f.independent(5, participations=0), "participations"),
        (lambda: f.banded(5, bands=6), "bands"),
        (lambda: f.banded(2**14 + 1, bands=2), "rounds"),
        (lambda: f.banded(5, bands=2, coefficients=(0.0, 1.0)), "coefficients"),
        (lambda: f.banded(5, bands=2, coefficients=(1.0,)), "coefficients"),
        (lambda: f.banded(5, bands=2, separation=1, coefficients=(1.0, -0.5)), "coefficients"),
        (lambda: f.banded(5, bands=2, separation=1, coefficients=(1.0, 1.5)), "coefficients"),
        (lambda: f.buffered(5, buffers=0), "buffers"),
        (lambda: f.buffered(5, buffers=1, decays=(0.5,)), "decays"),
        (lambda: f.buffered(5, buffers=1, decays=(1.0,), scales=(0.5,)), "decays"),
        (lambda: f.buffered(5, buffers=2, decays=(0.5, 0.5), scales=(0.6, 0.5)), "scales"),
    ],
)
def test_impossible_strategies_are_refused_by_name(call, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        call()


@pytest.mark.parametrize(("rounds", "coefficients"), [(60, (1.0, 2.0)), (200, (1.0, -1.2)), (2, (1.0, 1e300))])
def test_coefficients_under_which_noise_outgrows_double_precision_are_refused(
    rounds: int, coefficients: tuple[float, ...]
) -> None:
    with pytest.raises(InvalidArgument, match=rf"^coefficients=.*does not grow over {rounds} rounds"):
        f.banded(rounds, bands=2, coefficients=coefficients)
    f.banded(rounds, bands=2, coefficients=(1.0, -0.9))
    f.banded(rounds, bands=2, coefficients=(1.0, 1.0))


def test_participations_are_never_more_than_the_separation_allows() -> None:
    assert f.independent(10, separation=4, participations=100).participations == 3
    assert f.independent(10, separation=4, participations=2).participations == 2
