"""Robust rules: answers worked out by hand, naive twins, and what colluding clients can and cannot do."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import quadratics, scalar_model
from registry import AGGREGATORS
from torch import Tensor

import atoll
from atoll import aggregators
from atoll.aggregators import (
    Aggregator,
    bucketing,
    bulyan,
    centered_clipping,
    geometric_median,
    krum,
    mda,
    meamed,
    mean,
    median,
    multi_krum,
    nnm,
    norm_bound,
    trimmed_mean,
)
from atoll.aggregators.meamed import around
from atoll.aggregators.rows import NETWORK, PIECE, Geometry, Rows, sort_columns
from atoll.algorithms import fedavg
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process

ROBUST = [n for n in AGGREGATORS if AGGREGATORS[n]().bears(13)]
ANCHORED = ("centred clipping", "norm bound", "norm bound, given")
"""Rules with a place of their own: they do not follow a shift of all rows."""

robust = pytest.mark.parametrize("name", ROBUST)
line = [0.0, 1.0, 2.0, 4.0, 7.0, 100.0]


def on_a_line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def drawn(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (trimmed_mean(drop=1), line, (1 + 2 + 4 + 7) / 4),
        (trimmed_mean(drop=2), line, 3.0),
        (trimmed_mean(drop=0), line, 19.0),
        (trimmed_mean(drop=0.2), line, 3.0),  # ceil(1.2) = 2 from each end
        (trimmed_mean(drop=0.1), [0.0] * 9 + [10.0], 0.0),  # 0.1 * 10 is one, not two
        # The median of six is 3; nearest are 2, 4, 1, 0 (3 away) and 7 (4 away).
        (meamed(byzantine=1), line, 14 / 5),
        (meamed(byzantine=2), line, 7 / 4),
        (meamed(byzantine=1), [0.0, 2.0, 4.0], 1.0),  # 0 and 4 are equally far: the smaller counts
        # n - f - 2 = 3 neighbours: scores 21, 11, 9, 22, 70, ...: 2 has 1 + 4 + 4.
        (krum(byzantine=1), line, 2.0),
        (multi_krum(byzantine=1, keep=2), line, 1.5),
        (multi_krum(byzantine=1), line, 14 / 5),
        # Two neighbours each: 0 and 3 have 1 + 4, 1 and 2 have 1 + 1: a tie, which the smaller wins.
        (krum(byzantine=1), [3.0, 2.0, 1.0, 0.0, 50.0], 1.0),
        (mda(byzantine=1), line, 14 / 5),
        (mda(byzantine=2), line, 7 / 4),
        (mda(byzantine=0), line, 19.0),
        # Seven rows, f = 1. Krum takes 4 neighbours of 7 rows, 3 of 6, ... and keeps 5 of 7; of these the 3 nearest to
        # the median. Taken, in turn: 3, 2, 4, 1, 0; median 2; nearest 2, 1, 3.
        (bulyan(byzantine=1), [0.0, 1.0, 2.0, 3.0, 4.0, 60.0, 90.0], 2.0),
        (bulyan(byzantine=0), line, 19.0),
        (geometric_median(), [0.0, 1.0, 2.0, 4.0, 100.0], 2.0),
        (geometric_median(), [5.0, 5.0, 5.0, -1e30, 1e30], 5.0),
        (geometric_median(), [1.0, 4.0], 2.5),  # any point between is one; the rows are treated alike
        (geometric_median(), [1.0, 1.0, 5.0, 5.0], 3.0),
        (centered_clipping(radius=2.0), [1.0, 1.0, 10.0], 4 / 3),
        (centered_clipping(radius=2.0, iterations=2), [1.0, 1.0, 10.0], 16 / 9),
        (norm_bound(2.0), [1.0, -1.0, 10.0], 2 / 3),
        (norm_bound(), [1.0, -3.0, 10.0], 1 / 3),
        (norm_bound(2.0, then=median()), [1.0, 9.0, 10.0], 2.0),
        (norm_bound(), [0.0, 0.0, 5.0], 0.0),
        # Neighbourhoods of 3 of [0, 1, 5, 100]: means 2, 2, 2, 106/3; their median 2.
        (nnm(byzantine=1, then=median()), [0.0, 1.0, 5.0, 100.0], 2.0),
        (bucketing(size=1, then=median()), line, 3.0),
        (bucketing(size=6, then=median()), line, 19.0),
    ],
)  # fmt: skip
def test_answers_by_hand(rule: Aggregator, values: list[float], expected: float) -> None:
    assert float(rule(on_a_line(*values))) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_values_around_a_centre_are_found_behind_equal_ones() -> None:
    ordered = on_a_line(0.0, 0.0, 0.0, 5.0, 5.0, 6.0, 7.0)
    assert float(around(ordered, torch.tensor([5.0], dtype=torch.float64), 2)) == 5.0


def test_the_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    """The sides are seen from it at 120 degrees: it lies 1 / sqrt(3) above the middle of the base."""
    rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(
        geometric_median()(rows), torch.tensor([0.0, 3**-0.5], dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_a_wide_angle_is_the_geometric_median_itself() -> None:
    rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median()(rows), rows[2], rtol=0, atol=1e-5)


def test_centred_clipping_goes_on_from_where_it_was() -> None:
    rule, rows = centered_clipping(radius=2.0), on_a_line(1.0, 1.0, 10.0)
    first = rule.combine(rows)
    second = rule.combine(rows, None, first.state)
    assert float(first.row) == pytest.approx(4 / 3) and float(second.row) == pytest.approx(16 / 9)
    assert first.share is not None and first.share.tolist() == pytest.approx([1 / 3, 1 / 3, 0.2 / 3])


def test_centred_clipping_at_the_centre_divides_by_nothing() -> None:
    found = centered_clipping(radius=1.0)(torch.zeros(3, 4))
    assert found.tolist() == [0.0] * 4


def test_buckets_are_drawn_anew_in_every_round_and_by_seed() -> None:
    rows, rule = drawn(8, 3), bucketing(size=2, then=median())
    first = rule.combine(rows)
    assert first.state == {"round": 1, "then": None}
    second = rule.combine(rows, None, first.state)
    assert not torch.equal(first.row, second.row)
    assert not torch.equal(first.row, bucketing(size=2, then=median(), seed=1)(rows))
    assert torch.equal(first.row, rule(rows))


def test_a_rule_behind_buckets_keeps_its_own_state() -> None:
    rule = bucketing(size=1, then=centered_clipping(radius=2.0))
    first = rule.combine(on_a_line(1.0, 1.0, 10.0))
    assert float(rule.combine(on_a_line(1.0, 1.0, 10.0), None, first.state).row) == pytest.approx(16 / 9)


# --- naive twins ------------------------------------------------------------------------------------------------------


def naive_scores(rows: np.ndarray, f: int) -> np.ndarray:
    apart = ((rows[:, None] - rows[None]) ** 2).sum(2)
    near = max(1, len(rows) - f - 2)
    return np.array([np.sort(np.delete(apart[i], i))[:near].sum() for i in range(len(rows))])


def naive_around(rows: np.ndarray, keep: int) -> np.ndarray:
    centre = np.median(rows, axis=0)
    near = [sorted(column, key=lambda v, c=c: (abs(v - c), v)) for column, c in zip(rows.T, centre, strict=True)]
    return np.array([np.mean(values[:keep]) for values in near])


def naive_bulyan(rows: np.ndarray, f: int) -> np.ndarray:
    left, taken = sorted(rows, key=tuple), []  # ties go by content
    while len(taken) < len(rows) - 2 * f:
        best = int(naive_scores(np.array(left), f).argmin()) if len(left) > 1 else 0
        taken.append(left.pop(best))
    return naive_around(np.array(taken), len(taken) - 2 * f)


def naive_mda(rows: np.ndarray, f: int) -> np.ndarray:
    def diameter(chosen: tuple[int, ...]) -> float:
        return max((float(np.linalg.norm(rows[i] - rows[j])) for i, j in itertools.combinations(chosen, 2)), default=0)

    return rows[list(min(itertools.combinations(range(len(rows)), len(rows) - f), key=diameter))].mean(0)


def naive_nnm(rows: np.ndarray, f: int) -> np.ndarray:
    apart = ((rows[:, None] - rows[None]) ** 2).sum(2)
    return np.stack([rows[np.argsort(a, kind="stable")[: len(rows) - f]].mean(0) for a in apart])


def naive_clipping(rows: np.ndarray, radius: float, iterations: int) -> np.ndarray:
    centre = np.zeros(rows.shape[1])
    for _ in range(iterations):
        moves = rows - centre
        centre = centre + (moves * np.minimum(1, radius / np.linalg.norm(moves, axis=1))[:, None]).mean(0)
    return centre


TWINS: dict[str, tuple[Aggregator, Callable[[np.ndarray], np.ndarray]]] = {
    "trimmed mean": (trimmed_mean(drop=2), lambda r: np.sort(r, axis=0)[2:-2].mean(0)),
    "meamed": (meamed(byzantine=2), lambda r: naive_around(r, len(r) - 2)),
    "krum": (krum(byzantine=2), lambda r: r[naive_scores(r, 2).argmin()]),
    "multi-krum": (multi_krum(byzantine=2, keep=4), lambda r: r[np.argsort(naive_scores(r, 2))[:4]].mean(0)),
    "bulyan": (bulyan(byzantine=2), lambda r: naive_bulyan(r, 2)),
    "mda": (mda(byzantine=3), lambda r: naive_mda(r, 3)),
    "centred clipping": (centered_clipping(radius=1.5, iterations=3), lambda r: naive_clipping(r, 1.5, 3)),
    "nnm": (nnm(byzantine=2, then=trimmed_mean(drop=2)), lambda r: np.sort(naive_nnm(r, 2), axis=0)[2:-2].mean(0)),
    "nnm, nnm": (
        nnm(byzantine=2, then=nnm(byzantine=3, then=mean(weights="uniform"))),
        lambda r: naive_nnm(naive_nnm(r, 2), 3).mean(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("count", [11, 12])
@pytest.mark.parametrize("seed", range(3))
def test_rules_follow_their_pseudocode(name: str, count: int, seed: int) -> None:
    rule, naive = TWINS[name]
    rows = drawn(count, 5, seed)
    rows[1:3] += torch.tensor([[9.0], [-4.0]])
    np.testing.assert_allclose(rule(rows).numpy(), naive(rows.numpy()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_the_geometric_median_is_where_the_pulls_balance(seed: int) -> None:
    rows = drawn(9, 6, seed) + 40.0
    rows[:2] *= 1e6
    found = geometric_median()(rows)
    pulls = torch.nn.functional.normalize(rows - found, dim=1)
    assert float(pulls.sum(0).norm()) < 1e-6, "three steps of Weiszfeld leave pulls a thousand times as large"


@pytest.mark.parametrize("count", [*range(1, 18), NETWORK, NETWORK + 1])
def test_the_sorting_network_sorts(count: int) -> None:
    block = torch.randint(-5, 6, (count, 40), generator=torch.Generator().manual_seed(count)).float()
    assert torch.equal(sort_columns(block), block.sort(dim=0).values)


def test_distances_in_single_precision_keep_their_digits_beside_a_common_offset_and_huge_rows() -> None:
    rows = (1e4 + 1e-2 * drawn(8, 300)).float()
    rows[2], rows[5] = 1e30, -3e38
    found = Geometry(Rows(rows)).squared[: len(rows)]
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    order = Rows(rows).order
    honest = [i for i, r in enumerate(order.tolist()) if r not in (2, 5)]
    expected = exact[order][:, order][honest][:, honest].square()
    torch.testing.assert_close(found[honest][:, honest], expected, rtol=1e-9, atol=1e-12)


# --- what all of them do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ROBUST if n not in ANCHORED])
def test_rules_follow_a_shift_and_a_change_of_scale(name: str) -> None:
    rows, shift, rule = drawn(9, 7), drawn(1, 7, 1), AGGREGATORS[name]()
    found = rule(rows)
    torch.testing.assert_close(rule(rows + 300 * shift), found + 300 * shift[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(rule(1024 * rows), 1024 * found, rtol=1e-9, atol=1e-9)


@robust
def test_memory_blocks_do_not_change_the_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(9, 3 * PIECE + 17).float()
    expected = AGGREGATORS[name]()(rows)
    for pieces in (1, 3):
        monkeypatch.setattr("atoll.aggregators.rows.BLOCK", pieces)
        assert torch.equal(AGGREGATORS[name]()(rows), expected)


ATTACKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "far away, together": lambda honest, f: torch.full((f, honest.shape[1]), 1e30, dtype=honest.dtype),
    "as far as numbers go": lambda honest, f: torch.full((f, honest.shape[1]), -1.7e308, dtype=honest.dtype),
    "apart": lambda honest, f: 1e12 * drawn(f, honest.shape[1], 5),
    "opposite": lambda honest, f: -50 * honest.mean(0).expand(f, -1),
    "one coordinate": lambda honest, f: honest[:f] + 1e20 * torch.eye(honest.shape[1], dtype=honest.dtype)[0],
    "at the edge": lambda honest, f: (honest.mean(0) - 1.5 * honest.std(0)).expand(f, -1),
    "a copy": lambda honest, f: honest[0].expand(f, -1),
}


@robust
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("places", ["first", "last", "between"])
def test_as_many_as_a_rule_bears_cannot_move_it_far(name: str, attack: str, places: str) -> None:
    rule, count = AGGREGATORS[name](), 13
    f = rule.bears(count)
    honest = 0.3 * drawn(count - f, 6, 3) + 0.5
    bad = ATTACKS[attack](honest, f)
    rows = torch.cat((bad, honest) if places == "first" else (honest, bad))
    if places == "between":
        rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    diameter = float(torch.cdist(honest, honest).max())
    assert float((rule(rows) - honest.mean(0)).norm()) <= 4 * diameter


@pytest.mark.parametrize("name", ["median", "trimmed mean", "krum", "mda", "norm bound, given"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_rules_that_stay_within_the_honest_range_do(name: str, attack: str) -> None:
    rule = AGGREGATORS[name]()
    f = rule.bears(13)
    honest = 0.1 * drawn(13 - f, 6, 3)
    if name in ("krum", "mda") and attack in ("at the edge", "one coordinate"):
        pytest.skip("they may take a row that is near but not within")
    found = rule(torch.cat((honest, ATTACKS[attack](honest, f))))
    assert bool((found >= honest.min(0).values - 1e-12).all() and (found <= honest.max(0).values + 1e-12).all())


@pytest.mark.parametrize(
    "rule",
    [median(), trimmed_mean(drop=2), meamed(byzantine=2), mda(byzantine=2), geometric_median(),
     bucketing(size=2, then=median()), nnm(byzantine=2, then=trimmed_mean(drop=2))],
    ids=lambda r: r.name,
)  # fmt: skip
def test_one_more_than_a_rule_bears_moves_it_as_far_as_it_likes(rule: Aggregator) -> None:
    count = 9
    f = rule.bears(count) + 1
    rows = torch.cat((drawn(count - f, 3), torch.full((f, 3), 1e9, dtype=torch.float64)))
    # Buckets spoil as many as fall together: the worst of some rounds counts.
    state, farthest = None, 0.0
    for _ in range(20):
        ruling = rule.combine(rows, None, state)
        state, farthest = ruling.state, max(farthest, float(ruling.row.abs().max()))
    assert farthest > 1e6


def test_the_mean_bears_nobody() -> None:
    assert mean().bears(100) == 0
    assert nnm(byzantine=2, then=mean(weights="uniform")).bears(100) == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (median(), 5), (geometric_median(), 5), (centered_clipping(radius=1.0), 5), (norm_bound(), 5),
        (norm_bound(then=krum(byzantine=2)), 2), (norm_bound(2.0, then=median()), 5),
        (norm_bound(then=nnm(byzantine=1, then=mean(weights="uniform"))), 0),
        (trimmed_mean(drop=3), 3), (trimmed_mean(drop=0.25), 3), (krum(byzantine=4), 4), (bulyan(byzantine=2), 2),
        (mda(byzantine=5), 5), (meamed(byzantine=0.4), 5), (nnm(byzantine=4, then=median()), 4),
        (nnm(byzantine=4, then=krum(byzantine=2)), 2), (bucketing(size=2, then=median()), 2),
        (bucketing(size=3, then=trimmed_mean(drop=1)), 1),
    ],
    ids=lambda r: str(getattr(r, "spec", r)),
)  # fmt: skip
def test_how_many_of_eleven_a_rule_bears(rule: Aggregator, expected: int) -> None:
    assert rule.bears(11) == expected


@robust
def test_shares_tell_who_was_taken(name: str) -> None:
    rule, rows = AGGREGATORS[name](), 0.1 * drawn(9, 4)
    rows[4] = 1e6
    ruling = rule.combine(rows)
    if ruling.share is None:
        return
    assert ruling.share.shape == (9,) and float(ruling.share.sum()) <= 1 + 1e-12
    assert float(ruling.share[4]) == float(ruling.share.min()) < 0.12, "the odd one has the smallest share"
    if name not in ("centred clipping", "bulyan"):
        torch.testing.assert_close((ruling.share[:, None] * rows).sum(0), ruling.row, rtol=1e-9, atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------

SMALL = [
    (trimmed_mean(drop=2), 4, 5, r"trimmed_mean needs at least 5 clients \(2 drop \+ 1, drop=2\)"),
    (trimmed_mean(drop=0.4), 4, 5, r"trimmed_mean needs at least 5 clients"),
    (meamed(byzantine=1), 2, 3, r"meamed needs at least 3 clients \(2 byzantine \+ 1, byzantine=1\)"),
    (krum(byzantine=2), 6, 7, r"krum needs at least 7 clients \(2 byzantine \+ 3, byzantine=2\)"),
    (multi_krum(byzantine=1), 4, 5, r"multi_krum needs at least 5 clients"),
    (multi_krum(byzantine=1, keep=8), 8, 9, r"multi_krum needs at least 9 clients.*keep=8"),
    (bulyan(byzantine=1), 6, 7, r"bulyan needs at least 7 clients \(4 byzantine \+ 3, byzantine=1\)"),
    (mda(byzantine=2), 4, 5, r"mda needs at least 5 clients"),
    (nnm(byzantine=1, then=median()), 2, 3, r"nnm needs at least 3 clients"),
    (nnm(byzantine=1, then=krum(byzantine=1)), 4, 5, r"nnm needs at least 5 clients.*then.*2 byzantine \+ 3"),
    (bucketing(size=2, then=krum(byzantine=1)), 8, 9, r"bucketing needs at least 9 clients \(buckets of 2; then"),
    (norm_bound(then=krum(byzantine=1)), 4, 5, r"norm_bound needs at least 5 clients"),
]


@pytest.mark.parametrize(("rule", "count", "least", "said"), SMALL)
def test_cohorts_that_are_too_small_are_refused_before_any_work(
    rule: Aggregator, count: int, least: int, said: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"rows=\({count}, 2\).*at least {rule.least(count)} rows"):
        rule(torch.zeros(count, 2))
    assert rule(torch.zeros(least, 2)).tolist() == [0.0, 0.0]
    process = Process(scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), aggregator=rule)
    data = quadratics([1.0] * count, range(count))
    with pytest.raises(CompositionError, match=rf"{said}.*round 1 has {count}: enlarge the cohort, or low"):
        process.next(process.init(), data)


@pytest.mark.parametrize(
    ("rule", "count", "said"),
    [
        (krum(byzantine=0.3), 5, r"at least 9 "),  # 2 ceil(0.3 n) + 3 first fits 9
        (krum(byzantine=0.4), 10, r"at least 15 "),
        (bulyan(byzantine=0.2), 7, r"at least 15 "),
        (bucketing(size=2, then=krum(byzantine=0.4)), 11, r"at least 29 "),  # fifteen buckets
        (krum(byzantine=0.499999), 10, r"more than 100,000 "),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_the_number_of_clients_that_is_named_is_enough(rule: Aggregator, count: int, said: str) -> None:
    with pytest.raises(InvalidArgument, match=f"a matrix of {said}rows"):
        rule(torch.zeros(count, 2))
    with pytest.raises(CompositionError, match=f"needs {said}clients.*lower that number or fraction"):
        rule.check(count, 0)
    if "least" in said:
        enough = int(said.split()[2])
        assert rule.least(enough) <= enough and rule(torch.zeros(enough, 2)).tolist() == [0.0, 0.0]
        assert not any(rule.least(n) <= n for n in range(count, enough))


def test_bulyan_refuses_a_quarter() -> None:
    with pytest.raises(InvalidArgument, match=r"byzantine=0.25.*\[0, 0.25\)"):
        bulyan(byzantine=0.25)


@pytest.mark.parametrize("value", [-1, 0.5, -0.1, True, "2", float("nan"), 1.5])
@pytest.mark.parametrize("name", ["krum", "multi_krum", "bulyan", "mda", "meamed", "trimmed_mean"])
def test_numbers_of_malicious_clients_outside_their_range(name: str, value: Any) -> None:
    argument = "drop" if name == "trimmed_mean" else "byzantine"
    below = 0.25 if name == "bulyan" else 0.5
    with pytest.raises(InvalidArgument, match=rf"{argument}=.*a fraction of the cohort in \[0, {below}\)"):
        getattr(aggregators, name)(**{argument: value})


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: multi_krum(byzantine=1, keep=0), "keep=0"),
        (lambda: geometric_median(smoothing=0.0), "smoothing=0.0"),
        (lambda: geometric_median(tolerance=1.0), "tolerance=1.0"),
        (lambda: centered_clipping(radius=0.0), "radius=0.0"),
        (lambda: centered_clipping(radius=1.0, iterations=0), "iterations=0"),
        (lambda: norm_bound(-1.0), "bound=-1.0"),
        (lambda: norm_bound(1.0, then="median"), "then='median'"),  # type: ignore[arg-type]
        (lambda: nnm(byzantine=1, then=None), "then=None"),  # type: ignore[arg-type]
        (lambda: bucketing(size=0, then=median()), "size=0"),
        (lambda: bucketing(size=2, then=mean()), r"then=.mean.*'examples'.*then=aggregators.mean\(weights=.uniform"),
        (lambda: nnm(byzantine=1, then=mean()), r"then=.mean.*'examples'.*Use then=aggregators.mean"),
        (
            lambda: norm_bound(then=mean(weights="uniform", denominator="expected")),
            r"then=.mean.*'expected'.*Use then=aggregators.mean",
        ),
        (lambda: bucketing(size=2, then=median), "then="),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(build: Callable[[], Aggregator], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build()


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [centered_clipping(radius=0.5), bucketing(size=2, then=centered_clipping(radius=0.5))], ids=lambda r: r.name
)
def test_what_a_rule_keeps_is_checkpointed(rule: Aggregator, tmp_path: Path) -> None:
    def run(rounds: int, **options: Any) -> atoll.Result:
        return atoll.simulate(
            scalar_model(), quadratics((1.0, 2.0, 3.0, 1.0), (1.0, -2.0, 4.0, 40.0)), rounds=rounds, progress=False,
            algorithm=fedavg(local_sgd(0.1, steps=1, batch_size=None)), aggregator=rule, **options,
        )  # fmt: skip

    whole = run(5)
    run(2, directory=tmp_path)
    assert torch.equal(run(5, directory=tmp_path, resume=True).vector, whole.vector)
    assert not torch.equal(run(4).vector, whole.vector)


UNWEIGHTED = [
    norm_bound(),
    nnm(byzantine=1, then=mean(weights="uniform")),
    bucketing(size=2, then=mean(weights="uniform")),
    mean(weights="uniform"),
]


@pytest.mark.parametrize("rule", UNWEIGHTED, ids=lambda r: r.name)
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_what_clients_claim_to_weigh_does_not_move_a_rule_without_weights(rule: Aggregator, engine: str) -> None:
    rows, claims = drawn(5, 3), torch.tensor([1e6, 1.0, 1.0, 1.0, 1.0])
    assert torch.equal(rule(rows, claims), rule(rows))
    process = Process(scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), engine=engine, aggregator=rule)
    data, found = quadratics((1.0,) * 5, (1.0, 2.0, 3.0, 4.0, 50.0)), []
    for lie in (False, True):
        state = process.init()
        task = process.open(state, data.clients, len(data))
        collector = process.collector(state, task)
        process.engine.prepare(process, data)
        for cohort, remembered in process.engine.tiles(process, task, data, state.memory):
            report = process.work(task, cohort, remembered)
            if lie:
                report = replace(report, weight=report.weight * torch.linspace(1, 99, len(report.weight))[:, None])
            collector.add(process.combine(task, report))
        collected = collector.finish()
        found.append((float(collected.mean), collected.weight))
    assert found[0] == found[1] and found[0][1] == 5.0


def test_a_centre_is_carried_from_round_to_round() -> None:
    """Pulls of 1, 1 and 10 with radius 2: the centre goes 4/3, then 16/9 if the clients pull the same again."""
    process = Process(scalar_model(), fedavg(local_sgd(1.0, steps=1, batch_size=None)),
                      aggregator=centered_clipping(radius=2.0))  # fmt: skip
    state, _ = process.next(process.init(), quadratics((1.0,) * 3, (1.0, 1.0, 10.0)))
    assert float(process.vector(state)) == pytest.approx(4 / 3)
    assert state.aggregator.tolist() == pytest.approx([4 / 3])
    again = quadratics((1.0,) * 3, (1 + 4 / 3, 1 + 4 / 3, 10 + 4 / 3))
    state, _ = process.next(state, again)
    assert float(process.vector(state)) == pytest.approx(4 / 3 + 16 / 9)
