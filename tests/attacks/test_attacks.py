"""Attacks: their formulas on small matrices, who is malicious, and what they do to a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model
from torch import Tensor

import atoll
from atoll import aggregators, attacks
from atoll.algorithms import fedavg, fedexp, fednova, ifca, qfedavg, scaffold
from atoll.attacks import Attack, apply, chosen
from atoll.errors import CompositionError, InvalidArgument, NonFiniteError
from atoll.history import Record
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import error_feedback, sign

ATTACKS: dict[str, Attack] = {
    "sign_flip": attacks.sign_flip(3.0), "gaussian": attacks.gaussian(), "alie": attacks.alie(),
    "model_replacement": attacks.model_replacement(), "alie, given": attacks.alie(1.5), "ipm": attacks.ipm(),
    "mimic": attacks.mimic(), "min_max": attacks.min_max(), "min_sum": attacks.min_sum(),
    "lying_weight": attacks.lying_weight(), "non_finite": attacks.non_finite(), "free_rider": attacks.free_rider(),
    "stale": attacks.stale(),
}  # fmt: skip
every = pytest.mark.parametrize("name", ATTACKS)
on_rows = pytest.mark.parametrize("name", [n for n in ATTACKS if n != "lying_weight"])


def drawn(count: int = 10, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7


def split(rows: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are malicious, the honest ones, and those."""
    names = [str(i) for i in range(len(rows))]
    bad = torch.tensor([n in chosen(names, fraction) for n in names])
    return bad, rows[~bad], rows[bad]


def test_every_attack_is_listed() -> None:
    made = {a.name for a in ATTACKS.values()} | {"label_flip", "backdoor"}
    assert made | {"Attack", "Poison", "apply", "chosen"} == set(attacks.__all__)


# --- who --------------------------------------------------------------------------------------------------------------


def test_the_malicious_are_a_fraction_rounded_down_and_the_same_whoever_else_is_there() -> None:
    names = [f"c{i}" for i in range(10)]
    assert [len(chosen(names, f)) for f in (0, 0.19, 0.2, 0.3, 0.99, 1)] == [0, 1, 2, 3, 9, 10]
    assert set(chosen(names, 0.2)) <= set(chosen(names, 0.5))
    assert chosen(names, 0.3) == tuple(c for c in names if c in set(chosen(names[::-1], 0.3)))
    assert chosen(names, 0.3) != chosen(names, 0.3, seed=1) and chosen((), 0.5) == ()


@on_rows
def test_honest_rows_stay_and_the_same_seed_gives_the_same_rows(name: str) -> None:
    rows = drawn()
    bad, honest, _ = split(rows, 0.3)
    found = apply(rows, ATTACKS[name], fraction=0.3)
    assert torch.equal(found[~bad], honest) and rows is not found
    assert torch.equal(found.nan_to_num(), apply(rows, ATTACKS[name], fraction=0.3).nan_to_num())
    assert torch.equal(apply(rows, ATTACKS[name], fraction=0.05), rows), "nobody is malicious"
    assert found.dtype == torch.float64 and apply(rows.float(), ATTACKS[name], fraction=0.3).dtype == torch.float32


# --- what -------------------------------------------------------------------------------------------------------------


def test_formulas() -> None:
    rows = drawn()
    bad, honest, own = split(rows, 0.3)
    mean, spread = honest.mean(0), honest.std(0, correction=0)
    # n = 10, f = 3: 6 - 3 = 3 supporters are needed, and 4 of the 7 honest ones shall lie farther out.
    z = float(torch.special.ndtri(torch.tensor(4 / 7, dtype=torch.float64)))
    for name, expected in {
        "sign_flip": -3 * own, "model_replacement": own * 10 / 3, "alie": (mean - z * spread).expand(3, -1),
        "alie, given": (mean - 1.5 * spread).expand(3, -1), "ipm": (-0.5 * mean).expand(3, -1),
        "free_rider": 0 * own, "stale": 0 * own,
    }.items():  # fmt: skip
        torch.testing.assert_close(apply(rows, ATTACKS[name], fraction=0.3)[bad], expected, rtol=1e-12, atol=1e-12)


def test_answers_by_hand() -> None:
    """Honest updates 0, 1 and 5: mean 2, standard deviation sqrt(14 / 3); two of five clients are malicious, at 3."""
    bad = torch.tensor([str(i) in chosen([str(i) for i in range(5)], 0.4) for i in range(5)])
    rows = torch.full((5, 1), 3.0, dtype=torch.float64)
    rows[~bad] = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    spread = (14 / 3) ** 0.5
    for attack, expected in (
        (attacks.sign_flip(2.0), -6.0),
        (attacks.model_replacement(), 7.5),  # 5 / 2 times
        (attacks.ipm(0.5), -1.0),
        (attacks.mimic(), 5.0),
        # One supporter is needed, for 3 - 2 make a majority of five: two thirds of a Gaussian lie below 0.430727.
        (attacks.alie(), 2 - 0.4307272992954576 * spread),
        (attacks.alie(2.0), 2 - 2 * spread),
        (attacks.min_max(), 0.0),  # no farther from 5 than 0 is
        (attacks.min_sum(), -1.0),  # 1 + 4 + 36 are the 25 + 16 of the update that stands out
        (attacks.free_rider(), 0.0),
    ):
        found = apply(rows, attack, fraction=0.4)[bad]
        assert found.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-12, abs=1e-12), attack.name


def test_few_malicious_clients_that_cannot_win_a_majority_send_the_mean() -> None:
    rows = drawn(10)
    bad, honest, _ = split(rows, 0.1)  # the quantile at 4 / 9 is below 0
    torch.testing.assert_close(apply(rows, attacks.alie(), fraction=0.1)[bad], honest.mean(0)[None])


def test_noise_has_the_size_it_says() -> None:
    rows = drawn(10, 4000)
    bad, honest, _ = split(rows, 0.3)
    noise = apply(rows, attacks.gaussian(5.0), fraction=0.3)[bad]
    assert float(noise.std() / honest.square().mean().sqrt()) == pytest.approx(5, rel=0.03)
    assert not torch.equal(noise[0], noise[1])
    other = apply(rows, attacks.gaussian(5.0), fraction=0.3, seed=0)[bad]
    assert torch.equal(noise, other)


def test_mimics_copy_the_honest_row_that_stands_out() -> None:
    rows = drawn()
    bad, _, _ = split(rows, 0.3)
    rows[~bad] = 0.01 * rows[~bad]
    place = int((~bad).nonzero()[4])
    rows[place, 2] += 1.0
    assert torch.equal(apply(rows, attacks.mimic(), fraction=0.3)[bad], rows[place].expand(3, -1))


def test_min_max_and_min_sum_go_as_far_as_they_may() -> None:
    rows = drawn()
    bad, honest, _ = split(rows, 0.3)
    apart = torch.cdist(honest, honest)
    for name, size, most in (
        ("min_max", lambda d: d.max(), apart.max()),
        ("min_sum", lambda d: d.square().sum(), apart.square().sum(1).max()),
    ):
        sent = apply(rows, ATTACKS[name], fraction=0.3)[bad][0]
        assert float(size((honest - sent).norm(dim=1))) == pytest.approx(float(most), rel=1e-9)
        step = (sent - honest.mean(0)) / honest.std(0, correction=0)
        assert float(step.max()) == pytest.approx(float(step.min())) and float(step[0]) < -0.5
    assert torch.equal(apply(torch.ones(5, 3), attacks.min_max(), fraction=0.4), torch.ones(5, 3)), "no spread, no step"


def test_stale_updates_are_those_of_the_first_round() -> None:
    rule = apply(aggregators.mean(weights="uniform"), attacks.stale(), fraction=0.3)
    rows, later = drawn(seed=1), drawn(seed=2)
    bad, _, own = split(rows, 0.3)
    first = rule.combine(rows)
    second = rule.combine(later, None, first.state)
    expected = later.clone()
    expected[bad] = own.mean(0)
    torch.testing.assert_close(second.row, expected.mean(0), rtol=1e-12, atol=1e-12)


@every
def test_where_all_are_malicious_attacks_that_need_honest_updates_are_refused(name: str) -> None:
    rule = aggregators.mean()
    if ATTACKS[name].observes:
        for target in (drawn(), rule):
            with pytest.raises(InvalidArgument, match=r"fraction=1.0.*below 1 for.*honest clients"):
                apply(target, ATTACKS[name], fraction=1.0)  # type: ignore[call-overload]
    elif name not in ("lying_weight", "model_replacement"):  # n / f is 1
        assert not torch.equal(apply(drawn(), ATTACKS[name], fraction=1.0), drawn())


def test_a_matrix_has_no_weights_to_lie_about() -> None:
    with pytest.raises(InvalidArgument, match=r"attack='lying_weight'.*Apply it to an aggregator"):
        apply(drawn(), attacks.lying_weight(), fraction=0.3)


def test_of_a_known_population_the_same_are_malicious_in_every_cohort() -> None:
    names = [f"c{i}" for i in range(20)]
    bad = chosen(names, 0.3)
    rule = apply(aggregators.median(), attacks.sign_flip(1e3), fraction=0.3, population=names)
    state: Any = None
    for cohort in (names[:5], names[5:12], names[3:18], list(bad[:3]), [c for c in names if c not in bad]):
        rows = drawn(len(cohort)).abs()
        ruling = rule.combine(rows, None, state, cohort)
        state = ruling.state
        assert ruling.rows is not None
        assert [bool(r[0] < 0) for r in ruling.rows] == [c in bad for c in cohort]
    assert rule.spec != apply(aggregators.median(), attacks.sign_flip(1e3), fraction=0.3).spec


# --- on rules ---------------------------------------------------------------------------------------------------------


@on_rows
@pytest.mark.parametrize("rule", ["median", "nnm"])
def test_a_rule_sees_what_the_attack_makes_of_the_rows(name: str, rule: str) -> None:
    behind = (
        aggregators.median() if rule == "median" else aggregators.nnm(byzantine=3, then=aggregators.krum(byzantine=2))
    )
    rows = drawn()
    names = [str(i) for i in range(10)]
    attacked = apply(behind, ATTACKS[name], fraction=0.3)
    found = attacked.combine(rows, None, None, names)
    if name != "stale":  # a first round tells the attacker what to send later
        expected = behind.combine(apply(rows, ATTACKS[name], fraction=0.3))
        assert torch.equal(found.row, expected.row)
        if found.share is not None and expected.share is not None:
            assert torch.equal(found.share, expected.share), "shares are the clients' own"
    assert bool(torch.isfinite(found.row).all())
    assert (attacked.least(9), attacked.bears(9), attacked.weights) == (behind.least(9), behind.bears(9), "uniform")


@pytest.mark.parametrize("rule", [aggregators.mean(weights="uniform"), aggregators.krum(byzantine=2)])
def test_of_two_attacks_the_second_writes_last(rule: aggregators.Aggregator) -> None:
    rows = drawn()
    bad, honest, _ = split(rows, 0.3)
    twice = apply(apply(rule, attacks.ipm(2.0), fraction=0.3), attacks.sign_flip(9.0), fraction=0.3)
    found = twice.combine(rows)
    assert found.rows is not None and found.weights is not None
    expected = apply(rows, attacks.ipm(2.0), fraction=0.3)
    assert torch.equal(found.rows, expected) and torch.equal(found.row, rule(expected))
    assert torch.equal(found.rows[~bad], honest)


@pytest.mark.parametrize("rule", [aggregators.mean(weights="uniform"), aggregators.median()], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "build",
    [
        lambda rule: aggregators.nnm(byzantine=1, then=rule),
        lambda rule: aggregators.bucketing(size=2, then=rule),
        lambda rule: aggregators.norm_bound(then=rule),
    ],
    ids=["nnm", "bucketing", "norm_bound"],
)
def test_nobody_attacks_behind_a_mixture(build: Any, rule: aggregators.Aggregator) -> None:
    attacked = apply(rule, attacks.ipm(), fraction=0.2)
    with pytest.raises(InvalidArgument, match=rf"then='{rule.name} under ipm'.*not under attack.*Attack the whole"):
        build(attacked)


def test_a_lying_weight_owns_the_mean_and_not_the_median() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    bad, _, own = split(rows, 0.25)
    lie = attacks.lying_weight(1e6)
    assert float(apply(aggregators.mean(), lie, fraction=0.25)(rows)) == pytest.approx(-float(own), rel=1e-4)
    assert 1 <= float(apply(aggregators.median(), lie, fraction=0.25)(rows)) <= 3
    alike = apply(aggregators.mean(weights="uniform"), lie, fraction=0.25)(rows)
    assert float(alike) == pytest.approx((10 - 2 * float(own)) / 4)
    assert int(bad.sum()) == 1


@pytest.mark.parametrize("factor", [1.1e7, 1e12, 1e300])
def test_an_absurd_weight_is_left_out_of_the_mean(factor: float) -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    bad, honest, _ = split(rows, 0.25)
    ruling = apply(aggregators.mean(), attacks.lying_weight(factor), fraction=0.25).combine(rows)
    assert float(ruling.row) == pytest.approx(float(honest.mean())) and ruling.share is not None
    assert ruling.share[bad].tolist() == [0.0]
    for claim in (torch.nan, torch.inf, -1.0, 1.1e7):
        weights = torch.ones(4, dtype=torch.float64)
        weights[bad] = claim
        assert float(aggregators.mean()(rows, weights)) == pytest.approx(float(honest.mean()))


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_clipped_weights_stay_clipped_under_an_attack(engine: str) -> None:
    plan = local_sgd(0.1, steps=1, batch_size=None)
    data = atoll.FederatedDataset.from_arrays(
        {f"c{i}": (torch.ones(4 + i, 1), torch.tensor([[1.0, float(i)]]).repeat(4 + i, 1)) for i in range(4)}
    )
    rule = aggregators.mean(clip=5)
    found: list[Tensor] = []
    for one in (rule, apply(rule, attacks.sign_flip(), fraction=0.0)):
        run = Process(scalar_model(), fedavg(plan), aggregator=one, engine=engine)
        found.append(run.vector(run.next(run.init(), data)[0]))
    torch.testing.assert_close(found[1], found[0])


def test_what_is_not_finite_is_left_out_by_every_rule() -> None:
    rows, attack = drawn(), attacks.non_finite()
    _, honest, _ = split(rows, 0.3)
    torch.testing.assert_close(apply(aggregators.mean(), attack, fraction=0.3)(rows), aggregators.mean()(honest))
    with pytest.raises(NonFiniteError, match=r"no row is finite.*nothing to average"):
        aggregators.mean()(torch.full((2, 3), torch.nan))
    assert torch.equal(apply(aggregators.median(), attack, fraction=0.3)(rows), aggregators.median()(honest))
    found = apply(aggregators.krum(byzantine=2), attack, fraction=0.3).combine(rows)
    assert found.share is not None and float(found.share.sum()) == 1 and found.share.shape == (10,)


def test_nobody_can_stop_a_round_by_sending_what_is_not_finite() -> None:
    """Of seven clients, bulyan(1) needs all: the broken row is the one it bears, and the rest are judged without it."""
    rows = drawn(7)
    broken = rows.clone()
    broken[2, 3] = torch.nan
    rule, rest = aggregators.bulyan(byzantine=1), rows[[0, 1, 3, 4, 5, 6]]
    assert torch.equal(rule(broken), aggregators.bulyan(byzantine=0)(rest))
    assert torch.equal(rule(torch.full((7, 2), torch.nan)), torch.zeros(2))


def far_off(count: int) -> Tensor:
    return 0.1 * torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 10.0


@pytest.mark.parametrize(
    ("rule", "count", "broken"),
    [
        (aggregators.krum(byzantine=2), 7, 2), (aggregators.multi_krum(byzantine=2), 7, 2),
        (aggregators.mda(byzantine=3), 7, 3), (aggregators.bulyan(byzantine=5), 25, 5),
        (aggregators.bulyan(byzantine=0.2), 25, 5), (aggregators.trimmed_mean(drop=3), 7, 3),
        (aggregators.meamed(byzantine=3), 7, 3), (aggregators.norm_bound(then=aggregators.krum(byzantine=2)), 7, 2),
        (aggregators.nnm(byzantine=2, then=aggregators.krum(byzantine=2)), 7, 2),
        (aggregators.bucketing(size=1, then=aggregators.krum(byzantine=2)), 7, 2),
        (apply(aggregators.krum(byzantine=2), attacks.sign_flip(), fraction=0.0), 7, 2),
    ],
    ids=lambda v: v.name if isinstance(v, aggregators.Aggregator) else None,
)  # fmt: skip
def test_broken_rows_do_not_pull_a_rule_to_nought(rule: aggregators.Aggregator, count: int, broken: int) -> None:
    rows = far_off(count)
    rows[:broken, 1] = torch.nan
    ruling = rule.combine(rows)
    assert float((ruling.row - 10.0).abs().max()) < 0.5
    assert ruling.share is None or not bool(ruling.share[:broken].any())


def test_more_broken_rows_than_a_rule_bears_make_up_its_number() -> None:
    rows = far_off(7)
    rows[:5] = torch.nan
    ruling = aggregators.krum(byzantine=2).combine(rows)
    assert bool(torch.isfinite(ruling.row).all()) and ruling.share is not None and ruling.share.shape == (7,)


# --- on data ----------------------------------------------------------------------------------------------------------


def labelled() -> atoll.FederatedDataset:
    clients = {f"c{i}": (torch.rand(4, 2, 3), torch.tensor([0, 1, 2, 3])) for i in range(5)}
    return atoll.FederatedDataset.from_arrays(clients, test=clients)


def test_labels_are_flipped_at_the_malicious_clients_only() -> None:
    data = labelled()
    poisoned = apply(data, attacks.label_flip(), fraction=0.4)
    bad = chosen(list(data.clients), 0.4)
    for client in data.clients:
        flipped = poisoned[client].train["y"].tolist()
        assert flipped == ([3, 2, 1, 0] if client in bad else [0, 1, 2, 3])
        assert torch.equal(poisoned[client].test["y"], data[client].test["y"])
        assert torch.equal(poisoned[client].train["x"], data[client].train["x"])
    assert data[bad[0]].train["y"].tolist() == [0, 1, 2, 3], "the data given stay as they are"
    assert poisoned.fingerprint() != data.fingerprint() and "label_flip" in poisoned.name


def test_a_backdoor_marks_some_examples_and_gives_them_its_label() -> None:
    data = labelled()
    poisoned = apply(data, attacks.backdoor(target=2, fraction=0.5, features=2, value=9.0), fraction=0.2)
    (client,) = chosen(list(data.clients), 0.2)
    x, y = poisoned[client].train["x"], poisoned[client].train["y"]
    assert y.tolist() == [2, 2, 2, 3]
    assert x[:2, 1, 1:].flatten().tolist() == [9.0] * 4 and torch.equal(x[2:], data[client].train["x"][2:])
    assert torch.equal(x[:2, 0], data[client].train["x"][:2, 0])


# --- in a run ---------------------------------------------------------------------------------------------------------


def run(rule: Any, **options: Any) -> Any:
    return Process(scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), aggregator=rule, **options)


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_malicious_clients_in_a_round(engine: str) -> None:
    data = quadratics((1.0,) * 5, (1.0, 1.0, 1.0, 1.0, 1.0))
    for rule, expected in ((aggregators.mean(weights="uniform"), 0.1 * (4 - 50) / 5), (aggregators.median(), 0.1)):
        process = run(apply(rule, attacks.sign_flip(50.0), fraction=0.2), engine=engine)
        state, _ = process.next(process.init(), data)
        assert float(process.vector(state)) == pytest.approx(expected, abs=1e-12)
        assert state.aggregator["round"] == 1


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("method", [fedavg, scaffold, fednova, ifca])
@pytest.mark.parametrize(
    "rule",
    [aggregators.mean(), aggregators.mean(weights="uniform"),
     aggregators.mean(weights="uniform", denominator="expected")],
    ids=["examples", "uniform", "expected"],
)  # fmt: skip
def test_a_mean_without_any_attacker_is_the_plain_mean(rule: Any, method: Any, engine: str) -> None:
    plan = local_sgd(0.1, steps=1, batch_size=None)
    algorithm = ifca(plan, clusters=2) if method is ifca else method(plan)
    data, found = quadratics((1.0, 2.0, 1.5, 1.0), (1.0, 2.0, 3.0, 4.0), sizes=(2, 6, 4, 10)), []
    try:
        plain = Process(scalar_model(), algorithm, aggregator=rule, engine=engine)
    except CompositionError:
        pytest.skip("the method needs another denominator")
    for process in (plain, Process(scalar_model(), algorithm, engine=engine,
                                   aggregator=apply(rule, attacks.sign_flip(), fraction=0.0))):  # fmt: skip
        state = process.init()
        for cohort in (["c0", "c1", "c3"], ["c1", "c2"]):
            state, _ = process.next(state, data, cohort, expected=2.5)
        found.append(float(process.vector(state)))
    assert found[0] == pytest.approx(found[1], rel=1e-12) and found[0] != 0


def test_methods_with_numbers_of_other_units_refuse_rules() -> None:
    plan = local_sgd(0.1, steps=1, batch_size=None)
    for algorithm in (fednova(plan), qfedavg(plan, q=1.0), fedexp(plan)):
        for rule in (aggregators.median(), apply(aggregators.krum(byzantine=1), attacks.alie(), fraction=0.2)):
            with pytest.raises(CompositionError, match=rf"{rule.name} treats.*{algorithm.name}.*mean\(\), or fedavg"):
                Process(scalar_model(), algorithm, aggregator=rule)
        Process(scalar_model(), algorithm, aggregator=apply(aggregators.mean(), attacks.alie(), fraction=0.2))


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_a_round_goes_on_without_a_broken_client_and_it_keeps_what_it_had(engine: str) -> None:
    process = Process(scalar_model(), scaffold(local_sgd(0.1, steps=1, batch_size=None)), engine=engine,
                      aggregator=aggregators.median())  # fmt: skip
    fine = quadratics((1.0,) * 4, (1.0, 2.0, 3.0, 4.0))
    state, _ = process.next(process.init(), fine)
    names = list(fine.clients)
    before = state.memory.rows(names, torch.zeros(1, dtype=torch.float64)).clone()
    state, metrics = process.next(state, quadratics((1.0,) * 4, (1.0, 2.0, 3.0, 1e200)))
    assert metrics["clients"] == 3 and metrics["loss"] < 10
    # x is 0.25, c is -2.5 and c_i is -b_i: everybody steps by 0.1 (2.5 - 0.25).
    assert float(process.vector(state)) == pytest.approx(0.25 + 0.225)
    after = state.memory.rows(names, torch.zeros(1, dtype=torch.float64))
    assert float(after[3]) == float(before[3]) and float(after[0]) != float(before[0])
    with pytest.raises(NonFiniteError, match="c0, c1"):
        process.next(state, quadratics((1.0,) * 4, (1e200,) * 4))


def test_who_was_refused_and_why_is_told(tmp_path: Path) -> None:
    """Pulls of 0.1, 0.2, 0.3, 0.4 and, flipped, -9 times one of them: multi-Krum leaves that one out in every round."""
    data = quadratics((1.0,) * 5, (1.0, 1.1, 1.2, 1.3, 1.4))
    (bad,) = chosen(list(data.clients), 0.2)
    result = atoll.simulate(
        scalar_model(), data, rounds=3, progress=False, directory=tmp_path,
        algorithm=fedavg(local_sgd(0.1, steps=1, batch_size=None)),
        aggregator=apply(aggregators.multi_krum(byzantine=1), attacks.sign_flip(90.0), fraction=0.2),
    )  # fmt: skip
    record = result.history[0]
    assert list(record.refused) == [bad] and record.clients == 5 and record.flat()["refused"] == 1
    told, own = record.refused[bad], 0.1 * float(data[bad].train["y"][:, 1].mean())
    honest = [0.1 * (1 + i / 10) for i, c in enumerate(data.clients) if c != bad]
    assert told["reason"] == "multi_krum under sign_flip gave it no share" and told["norm"] == pytest.approx(90 * own)
    assert told["distance"] == pytest.approx(90 * own + sum(honest) / 4)
    kept = atoll.Result.load(tmp_path).history
    assert [list(r.refused) for r in kept] == [[bad]] * 3 and kept[0].refused == record.refused
    result.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Refused updates" in page and "gave it no share" in page


def test_more_refused_clients_than_are_named_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.collecting.REFUSED", 2)
    data = quadratics((1.0,) * 9, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
    result = atoll.simulate(
        scalar_model(), data, rounds=2, progress=False, directory=tmp_path,
        algorithm=fedavg(local_sgd(0.1, steps=1, batch_size=None)), aggregator=aggregators.bulyan(byzantine=1),
    )  # fmt: skip
    assert [(len(r.refused), r.refusals, r.flat()["refused"]) for r in result.history] == [(2, 2, 2)] * 2
    krum = Process(scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), aggregator=aggregators.krum(
        byzantine=1))  # fmt: skip
    _, metrics = krum.next(krum.init(), data)
    assert len(metrics["refused"]) == 2 and metrics["refusals"] == 8
    result = atoll.simulate(
        scalar_model(), data, rounds=2, progress=False, directory=tmp_path / "krum",
        algorithm=fedavg(local_sgd(0.1, steps=1, batch_size=None)), aggregator=aggregators.krum(byzantine=1),
    )  # fmt: skip
    assert atoll.Result.load(tmp_path / "krum").history[0].flat()["refused"] == 8
    result.report(tmp_path / "page.html")
    assert "And 12 more refusals" in (tmp_path / "page.html").read_text()
    before = result.history[0].to_dict()
    del before["refusals"]
    assert Record.from_dict(before).refusals == 2, "as journals had it before there was a count"


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("kind", ["scaffold", "error feedback"])
def test_refused_clients_keep_what_they_had(kind: str, engine: str) -> None:
    plan = local_sgd(0.1, steps=1, batch_size=None)
    stages = () if kind == "scaffold" else (error_feedback(sign()),)
    process = Process(scalar_model(), scaffold(plan) if stages == () else fedavg(plan), engine=engine,
                      transforms=stages, aggregator=aggregators.multi_krum(byzantine=1))  # fmt: skip
    data = quadratics((1.0,) * 5, (1.0, 1.1, 1.2, 1.3, 90.0))
    state, metrics = process.next(process.init(), data)
    assert list(metrics["refused"]) == ["c4"]
    assert "c4" not in state.memory and all(c in state.memory for c in ("c0", "c1", "c2", "c3"))


def test_identical_updates_are_all_taken() -> None:
    ruling = aggregators.geometric_median().combine(torch.tensor([[2.0], [2.0], [2.0], [2.0], [7.0]]))
    assert ruling.share is not None and ruling.share.tolist() == [0.25] * 4 + [0.0]


def test_broken_clients_are_told_of_too() -> None:
    rule = apply(aggregators.median(), attacks.non_finite(), fraction=0.25)
    process = run(rule)
    data = quadratics((1.0,) * 5, (1.0, 2.0, 3.0, 4.0, 1e200))
    _, metrics = process.next(process.init(), data)
    assert set(metrics["refused"]) == {"c4", *chosen(["c0", "c1", "c2", "c3"], 0.25)}
    assert all(told == {"reason": "the update or loss is not finite"} for told in metrics["refused"].values())
    _, metrics = run(aggregators.median()).next(process.init(), quadratics((1.0,) * 3, (1.0, 2.0, 3.0)))
    assert metrics["refused"] == {}


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (attacks.non_finite(), "the update or loss is not finite"),
        (attacks.lying_weight(1e9), "it claims a weight of 2e+09, where 0 to 1e+07 is allowed"),
    ],
    ids=lambda v: v.name if isinstance(v, Attack) else None,
)
def test_a_mean_goes_on_without_whoever_claims_what_is_absurd(attack: Attack, said: str, engine: str) -> None:
    """Everybody has two examples and pulls by 0.1 b; who is left out counts for nothing in any part of the update."""
    data = quadratics((1.0,) * 5, (1.0, 2.0, 3.0, 4.0, 5.0))
    (bad,) = chosen(list(data.clients), 0.2)
    others = [c for c in data.clients if c != bad]
    for algorithm in (fedavg, scaffold):
        found = []
        for rule, cohort in ((apply(aggregators.mean(), attack, fraction=0.2), None), (aggregators.mean(), others)):
            process = Process(scalar_model(), algorithm(local_sgd(0.1, steps=1, batch_size=None)), engine=engine,
                              aggregator=rule)  # fmt: skip
            state, metrics = process.next(process.init(), data, cohort)
            variate = float(state.algorithm.variate) if algorithm is scaffold else 0.0
            found.append((float(process.vector(state)), variate, metrics["clients"]))
            if cohort is None:
                assert list(metrics["refused"]) == [bad] and metrics["refused"][bad]["reason"] == said
                assert bad not in state.memory
        assert found[0] == pytest.approx(found[1], rel=1e-12), algorithm.__name__


def test_an_attack_goes_on_where_it_was_after_a_resume(tmp_path: Path) -> None:
    def go(rounds: int, **options: Any) -> atoll.Result:
        rule = apply(aggregators.centered_clipping(radius=0.5), attacks.stale(), fraction=0.4)
        return atoll.simulate(
            scalar_model(), quadratics((1.0,) * 5, (1.0, 2.0, 3.0, 4.0, 9.0)), rounds=rounds, aggregator=rule,
            algorithm=fedavg(local_sgd(0.1, steps=1, batch_size=None)), progress=False, **options,
        )  # fmt: skip

    whole = go(6)
    go(2, directory=tmp_path)
    assert torch.equal(go(6, directory=tmp_path, resume=True).vector, whole.vector)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: apply(labelled(), attacks.alie(), fraction=0.2), "attack=.*one on data"),  # type: ignore[call-overload]
        (lambda: apply(drawn(), attacks.label_flip(), fraction=0.2), "attack=.*one on updates"),  # type: ignore[call-overload]
        (lambda: apply("median", attacks.alie(), fraction=0.2), "target='median'"),  # type: ignore[call-overload]
        (lambda: apply(drawn(), attacks.alie(), fraction=1.2), "fraction=1.2"),
        (lambda: apply(drawn(), attacks.alie(), fraction=0.2, population=["0"]), "population=.*aggregator"),  # type: ignore[call-overload]
        (lambda: apply(quadratics((1.0,), (1.0,)), attacks.label_flip(), fraction=1.0), "needs an integer field y"),
        (lambda: apply(labelled(), attacks.backdoor(target=7), fraction=0.2), "target=7 is no class: the data has 4"),
        (lambda: attacks.backdoor(target=-1), "target=-1"),
        (lambda: attacks.backdoor(target=1, fraction=0.0), "fraction=0.0"),
        (lambda: attacks.backdoor(target=1, features=0), "features=0"),
        (lambda: attacks.sign_flip(0.0), "scale=0.0"),
        (lambda: attacks.lying_weight(-1.0), "factor=-1.0"),
        (lambda: attacks.alie(float("inf")), "z=inf"),
    ],
)
def test_wrong_arguments(call: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        call()
