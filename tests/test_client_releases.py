"""Runs whose clients add noise themselves: what is counted, budgets, kills, what is told, and what is refused."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import rdp_privacy_accountant
from problems import killed, quadratics, scalar_model, silent, wide
from scipy import stats
from torch import Tensor, nn

import atoll
from atoll import aggregators, client_releases, privacy, sampling
from atoll.errors import BudgetSpent, CompositionError, InvalidArgument
from atoll.journal import open_journal
from atoll.privacy import distributed
from atoll.report.runs import read_run
from atoll.rounds import Process
from atoll.secret import Source
from atoll.study import study
from atoll.transforms import (
    Transform,
    clip_norm,
    discrete_gaussian,
    gaussian_noise,
    grouped,
    local_noise,
    secure_sum,
    skellam,
)
from atoll.transforms.chain import Chain

CLIENTS, COHORT, ROUNDS = 12, 6, 4
UNIFORM = aggregators.mean(weights="uniform")
STAGES: dict[str, Any] = {"discrete_gaussian": discrete_gaussian, "skellam": skellam}
kinds = pytest.mark.parametrize("kind", STAGES)
BROKEN = (1e300, 1e300)
"""Curve and centre of a client whose training overflows."""


def model() -> atoll.Model:
    torch.manual_seed(0)
    return atoll.Model(nn.Linear(4, 3), "cross_entropy", metrics=("accuracy",))


def data(clients: int = CLIENTS) -> atoll.FederatedDataset:
    draw = torch.Generator().manual_seed(0)
    given = {
        f"c{i}": (torch.randn(6 + i, 4, generator=draw), torch.randint(0, 3, (6 + i,), generator=draw))
        for i in range(clients)
    }
    return atoll.FederatedDataset.from_arrays(given, test=given, holdout=given["c0"])


def shares(kind: str = "skellam", **options: Any) -> Transform:
    given: dict[str, Any] = {"clip": 1.0, "survivors": 5, "clients": COHORT, "delta": 1e-3} | options
    if "epsilon" not in given:
        given.setdefault("noise_multiplier", 4.0)
    return STAGES[kind](**given)


def channel(**options: Any) -> Any:
    return secure_sum(**{"clip": 1.0, "least": 5, **options})


def run(*stages: Transform, **options: Any) -> atoll.Result:
    given: dict[str, Any] = {
        "algorithm": atoll.fedavg(atoll.local_sgd(0.1)), "rounds": ROUNDS, "cohort": COHORT, "channel": channel(),
        "aggregator": UNIFORM, "progress": False, "engine": "loop",
    } | options  # fmt: skip
    return atoll.simulate(
        given.pop("model", None) or model(),
        given.pop("data", None) or data(),
        transforms=stages or (shares(),),
        **given,
    )


def of_sums(kind: str, count: int, multiplier: float = 4.0) -> float:
    """Epsilon of some sums of a run, by the scheme its 15 parameters are sent under and dp-accounting's conversion."""
    own = distributed.scheme(
        kind, clip=1.0, noise_multiplier=multiplier, survivors=5, clients=COHORT, bits=32, length=16, block=16
    )  # type: ignore[arg-type]
    divergences = [count * own.rdp(a) for a in distributed.ORDERS]
    return float(rdp_privacy_accountant.compute_epsilon(list(distributed.ORDERS), divergences, 1e-3)[0])


def entered(directory: Path) -> list[dict[str, Any]]:
    journal = open_journal(directory)
    try:
        return [e.body for e in journal.events("client_release")]
    finally:
        journal.close()


# --- sums: what is counted --------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("grade", ["exact", "full"])
def test_every_sum_that_was_released_is_counted(kind: str, grade: str) -> None:
    result = run(shares(kind), channel=channel(grade=grade))
    (said,) = result.privacy
    assert (said["unit"], said["neighbours"], said["delta"]) == ("client", "zero-out", 1e-3)
    assert said["releases"] == ROUNDS and said["private"] and said["survivors"] == 5
    assert said["events"] == [
        {"mechanism": kind, "noise_multiplier": 4.0, "sampling": "none", "sampling_rate": 1.0, "count": ROUNDS}
    ]
    assert said["epsilon"] == pytest.approx(of_sums(kind, ROUNDS), rel=1e-9) == result.history[-1].epsilon
    fine = rdp_privacy_accountant.RdpAccountant(list(distributed.ORDERS))
    fine.compose(dp_event.GaussianDpEvent(4.0), ROUNDS)
    assert said["epsilon"] == pytest.approx(fine.get_epsilon(1e-3), rel=1e-3), "on fine grids it is Gaussian noise"
    spent = [r.epsilon for r in result.history]
    assert spent == pytest.approx([of_sums(kind, n) for n in range(1, ROUNDS + 1)])


@pytest.mark.parametrize("grade", ["exact", "full"])
def test_rounds_that_are_void_release_nothing_and_spend_nothing(grade: str) -> None:
    result = run(channel=channel(grade=grade, dropouts={"mask": 0.15, "unmask": 0.05}), rounds=8)
    made = [r.clients > 0 for r in result.history]
    assert 0 < sum(made) < 8, "some are void"
    assert result.privacy[0]["releases"] == sum(made)
    assert result.privacy[0]["epsilon"] == pytest.approx(of_sums("skellam", sum(made)))
    for record, before, there in zip(result.history[1:], result.history, made[1:], strict=False):
        assert record.epsilon is not None and before.epsilon is not None
        assert (record.epsilon > before.epsilon) == there and bool(record.notes) != there


def test_cohorts_that_the_noise_is_not_sized_for_make_void_rounds(tmp_path: Path) -> None:
    """Poisson cohorts of 6 expected clients: those of fewer than 5 or more than 7 show no sum, and the run goes on."""
    sampler, rounds = sampling.poisson(0.5), 12
    result = run(shares(clients=7), cohort=sampler, rounds=rounds, directory=tmp_path, evaluate_every=100)
    sizes = [len(sampler.cohort(0, r, data().clients)) for r in range(rounds)]
    fits = [5 <= size <= 7 for size in sizes]
    assert any(fits) and any(size < 5 for size in sizes) and any(size > 7 for size in sizes)
    assert [r.clients > 0 for r in result.history] == fits
    for record, size in zip(result.history, sizes, strict=True):
        said = f"there are {size}" if size < 5 else f"does not fit a cohort of {size}"
        assert (said in " ".join(record.notes)) == (record.clients == 0)
    assert len(entered(tmp_path)) == sum(fits) == result.privacy[0]["releases"]


def test_a_sampler_whose_expected_cohort_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"needs 5 clients in a sum, but there are 4"):
        run(cohort=sampling.poisson(1 / 3), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_noise_of_a_run_has_the_deviation_that_was_counted() -> None:
    """Silent clients: the model is noise alone, sized for 3 survivors and given by 4."""
    size = 20_000
    found = run(
        skellam(clip=0.5, noise_multiplier=3.0, survivors=3, clients=4), model=wide(size), rounds=1, cohort=None,
        data=silent(size, 4),
        channel=secure_sum(clip=1.0),
    )  # fmt: skip
    own = distributed.scheme(
        "skellam", clip=0.5, noise_multiplier=3.0, survivors=3, clients=4, bits=32, length=20480, block=4096
    )
    assert own.std == pytest.approx(3.0 * own.norm * own.granularity) and own.norm * own.granularity >= 0.5
    noise = (4 * found.vector).numpy()
    assert stats.kstest(noise, "norm", args=(0.0, own.std * math.sqrt(4 / 3))).pvalue > 1e-6
    assert abs(noise.std() / (own.std * math.sqrt(4 / 3)) - 1) < 6 / math.sqrt(2 * size)


@kinds
def test_one_client_moves_the_sum_that_is_released_by_the_norm_that_was_counted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, and with roundings that can be drawn again: a client's data, huge or broken, against nothing."""
    monkeypatch.setattr(Source, kind, lambda self, scale, size: torch.zeros(size, dtype=torch.int64))
    sums: list[Tensor] = []
    undone = Chain.decode_sum

    def seen(self: Chain, total: Tensor, *given: Any, **named: Any) -> Tensor:
        sums.append(total.clone())
        return undone(self, total, *given, **named)

    monkeypatch.setattr(Chain, "decode_sum", seen)
    stage = STAGES[kind](clip=0.7, noise_multiplier=2.0, survivors=3, clients=4, seed=1)
    process = Process(
        scalar_model(), atoll.scaffold(atoll.local_sgd(1.0, steps=1, batch_size=None)), transforms=(stage,),
        channel=secure_sum(clip=1.0), aggregator=UNIFORM, engine="loop",
    )  # fmt: skip
    own = distributed.scheme(kind, clip=0.7, noise_multiplier=2.0, survivors=3, clients=4, bits=32, length=2, block=1)  # type: ignore[arg-type]
    for curve, centre in ((1.0, 0.0), (1.0, 0.3), (1.0, -1e6), (1.0, 1e200), BROKEN):
        process.next(process.init(), quadratics((1.0, 1.0, 1.0, curve), (0.1, -0.2, 5.0, centre)), entered=lambda: None)
    nought, *others = sums
    moved = [float((other - nought)[:-1].norm()) for other in others]
    assert max(moved) <= own.norm and moved[1] > 0.9 * own.norm, moved
    assert moved[-1] == 0, "a client whose training breaks sends noise alone"
    assert all(float(s[-1]) == 4 for s in sums)


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_stops_the_run_before_the_sum_that_would_exceed_it(tmp_path: Path) -> None:
    stage = shares(budget=of_sums("skellam", 2) * (1 + 1e-9))
    result = run(stage, directory=tmp_path / "run", evaluate_every=3)
    assert len(result.history) == 2 == result.privacy[0]["releases"]
    assert any(f"stops after round 2 of {ROUNDS}" in note for note in result.notes)
    assert result.history[-1].holdout, "the last round there is is evaluated"
    again = run(stage, directory=tmp_path / "run", evaluate_every=3, resume=True)
    assert len(again.history) == 2 and torch.equal(again.vector, result.vector)
    with pytest.raises(BudgetSpent, match=r"1 releases would take epsilon to .*above the budget of 0.1"):
        run(shares(budget=0.1), directory=tmp_path / "none")
    assert not (tmp_path / "none").exists(), "refused before any work"


@kinds
def test_an_epsilon_calibrates_the_noise_and_ends_a_longer_run(kind: str, tmp_path: Path) -> None:
    stage = shares(kind, epsilon=3.0)
    (said,) = run(stage, directory=tmp_path).privacy
    assert 2.98 <= said["epsilon"] <= 3.0 == said["budget"]
    assert said["epsilon"] == pytest.approx(of_sums(kind, ROUNDS, said["noise_multiplier"]))
    longer = run(stage, directory=tmp_path, rounds=3 * ROUNDS, resume=True)
    assert longer.privacy[0]["epsilon"] <= 3.0 and len(longer.history) <= ROUNDS + 1
    assert longer.privacy[0]["noise_multiplier"] == said["noise_multiplier"]


def test_a_calibration_without_a_solution_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"bits=10 is too small"):
        run(shares(epsilon=0.1, bits=10))
    with pytest.raises(InvalidArgument, match=r"delta=0.1.*below 1 / population"):
        run(shares(delta=0.1))
    for both in ({}, {"noise_multiplier": 1.0, "epsilon": 1.0}):
        with pytest.raises(InvalidArgument, match="noise_multiplier= or epsilon="):
            skellam(clip=1.0, survivors=2, clients=3, **both)


# --- killed anywhere --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for a kill of the process."""


POINTS = {"before it is entered": 0, "before it is used": 1, "before the checkpoint": 1, "after the round": 0}


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_ledger_has_no_less_than_what_ran(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsynced: None
) -> None:
    enter, save = client_releases.ClientReleases.enter, atoll.simulation._Run._save

    def entering(self: Any, round: int, clients: Any) -> None:
        if round == 2 and point == "before it is entered":
            raise Killed
        enter(self, round, clients)
        if round == 2 and point == "before it is used":
            raise Killed

    def saving(self: Any) -> None:
        if self.state.round == 3 and point == "before the checkpoint":
            raise Killed
        save(self)

    def stop(record: atoll.Record) -> None:
        if record.round == 3 and point == "after the round":
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(client_releases.ClientReleases, "enter", entering)
        patched.setattr(atoll.simulation._Run, "_save", saving)
        with pytest.raises(Killed):
            run(directory=tmp_path, callbacks=(stop,), checkpoint_every=100)
    seen = 2 if point == "before it is entered" else 3
    assert len(entered(tmp_path)) == seen
    (half,) = read_run(tmp_path).privacy
    assert half["releases"] == seen and half["epsilon"] == pytest.approx(of_sums("skellam", seen))
    (said,) = run(directory=tmp_path, resume=True).privacy
    assert said["releases"] == len(entered(tmp_path)) == ROUNDS + POINTS[point]
    assert said["epsilon"] == pytest.approx(of_sums("skellam", ROUNDS + POINTS[point]))


@pytest.mark.slow
def test_killed_with_sigkill_the_ledger_has_what_ran(tmp_path: Path) -> None:
    killed(tmp_path, 3, "test_client_releases", f"run(directory={str(tmp_path / 'run')!r}, callbacks=(tell,))")
    assert len(entered(tmp_path / "run")) == 3
    (said,) = run(directory=tmp_path / "run", resume=True).privacy
    assert said["releases"] == ROUNDS == len(entered(tmp_path / "run"))


# --- what is told -----------------------------------------------------------------------------------------------------


def test_nothing_that_noise_does_not_protect_is_told(tmp_path: Path) -> None:
    result = run(directory=tmp_path / "run")
    for record in result.history:
        assert math.isnan(record.loss) and record.clients == COHORT
        assert (record.test, record.validation, record.spread, record.refused) == ({}, {}, {}, {})
        assert record.holdout, "examples that are no client's are evaluated as ever"
    assert result.clients == {} and result.engine.keys() <= {"engine", "reason"}
    assert result.spec["experiment"]["data"] != data().fingerprint()
    with pytest.raises(InvalidArgument, match=r"splits names test.*holdout.*result.evaluate"):
        run(splits=("test",))
    run(algorithm=atoll.fine_tune(atoll.local_sgd(0.1)), rounds=1, directory=tmp_path / "tuned")
    assert not atoll.Result.load(tmp_path / "tuned", model()).personalised


def test_a_round_tells_the_same_whatever_a_clients_data_are() -> None:
    """Numbers of examples, losses and broken training: nothing beside the noised sum depends on them."""
    stage = skellam(clip=1.0, noise_multiplier=2.0, survivors=3, clients=3, seed=1)
    told: list[str] = []
    for sizes, (curve, centre) in (((2, 4, 6), (3.0, 1.0)), ((8, 2, 2), (1.0, -7.0)), ((2, 4, 20), BROKEN)):
        process = Process(
            scalar_model(), atoll.scaffold(atoll.local_sgd(0.1, steps=1, batch_size=None)), transforms=(stage,),
            channel=secure_sum(clip=1.0), aggregator=UNIFORM, engine="vectorized",
        )  # fmt: skip
        state, metrics = process.next(process.init(), quadratics((1.0, 2.0, curve), (0.2, 5.0, centre), sizes=sizes))
        told.append(str({n: v for n, v in metrics.items() if n != "summed"}))
        assert math.isnan(metrics["loss"]) and math.isnan(metrics["examples"]) and metrics["clients"] == 3.0
        kept = state.memory.rows(["c2"], torch.full((1,), 9.0, dtype=torch.float64))
        assert bool(torch.isfinite(kept).all()), "a broken client keeps what it had"
    assert len(set(told)) == 1


def test_a_caller_without_a_driver_is_told_epsilon_round_by_round() -> None:
    stage = skellam(clip=1.0, noise_multiplier=2.0, survivors=3, clients=3, delta=1e-3, budget=1.9)
    process = Process(
        scalar_model(), atoll.fedavg(atoll.local_sgd(0.1)), transforms=(stage,), channel=secure_sum(clip=1.0),
        aggregator=UNIFORM,
    )  # fmt: skip
    state, three = process.init(), quadratics((1.0, 1.0, 1.0), (1.0, 2.0, 3.0))
    own = distributed.scheme(
        "skellam", clip=1.0, noise_multiplier=2.0, survivors=3, clients=3, bits=32, length=1, block=1
    )
    state, told = process.next(state, three)
    assert told["epsilon"] == pytest.approx(distributed.epsilon(own, rounds=1, delta=1e-3)) and told["delta"] == 1e-3
    with pytest.raises(BudgetSpent, match="budget is spent: 2 releases"):
        process.next(state, three)


def test_the_sentences_say_what_is_guaranteed_and_who_is_trusted(tmp_path: Path) -> None:
    result = run(shares(), channel=channel(grade="full"))
    text = privacy.explain(result)
    assert text.count(". ") == 1 and text.endswith(".")
    for part in ("each of 12 clients", "4 sums", "Skellam noise of at least 4 times", "honest but curious",
                 "5 clients of every sum to add their noise honestly", "cryptographic source", "neighbours zero-out",
                 f"epsilon {result.privacy[0]['epsilon']:.3g} at delta 0.001"):  # fmt: skip
        assert part in text, part
    assert "honest but curious" in result.report(tmp_path / "report.html").read_text()
    loaded = atoll.Result.load(result.save(tmp_path / "saved"))
    assert loaded.privacy == result.privacy and privacy.explain(loaded) == text


def test_a_seeded_run_says_that_it_is_not_private(tmp_path: Path) -> None:
    result = run(shares(seed=1))
    assert not result.privacy[0]["private"] and privacy.explain(result).startswith("NOT PRIVATE")
    assert "NOT PRIVATE" in result.report(tmp_path / "report.html").read_text()


def test_examples_may_be_protected_beside_clients() -> None:
    plan = atoll.local_sgd(
        0.1, steps=2, batch_size=4,
        privacy=privacy.example_level(clip=1.0, noise_multiplier=2.0, delta=1e-3, accountant="rdp"),
    )  # fmt: skip
    result = run(algorithm=atoll.fedavg(plan), rounds=1)
    client, example = result.privacy
    assert (client["unit"], example["unit"]) == ("client", "example")
    assert len(privacy.explain(result).splitlines()) == 2
    assert example["clients"] == {}, "a client's own epsilon tells how many examples it has"
    assert any("how many examples clients have" in what for what in client["not_covered"])


# --- each client alone ------------------------------------------------------------------------------------------------

VISITS = sampling.sequence([["c0", "c1", "c2"], ["c0", "c3", "c4"], ["c5", "c6", "c0"], ["c3", "c7", "c8"]])


def alone(*stages: Transform, **options: Any) -> atoll.Result:
    given: dict[str, Any] = {"channel": "plain", "cohort": VISITS} | options
    return run(*(stages or (local_noise(9.0, clip=1.0, delta=1e-3),)), **given)


@cache
def of_rows(count: int) -> float:
    """Epsilon of some rows of one client with noise of multiplier 9, by dp-accounting."""
    if not count:
        return 0.0
    pld = privacy_loss_distribution.from_gaussian_mechanism(9.0, sensitivity=2.0)
    return float(pld.self_compose(count).get_epsilon_for_delta(1e-3))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"aggregator": aggregators.median()}, {"channel": secure_sum(clip=9.0)},
        {"channel": grouped(secure_sum(clip=9.0), aggregators.median(), size=3), "cohort": None},
    ],
    ids=["plain", "median", "secure_sum", "grouped"],
)  # fmt: skip
def test_each_client_spends_when_it_takes_part_whatever_follows(options: dict[str, Any]) -> None:
    result = alone(**options)
    (said,) = result.privacy
    took = {"c0": 3, "c1": 1, "c2": 1, "c3": 2, **{f"c{i}": 1 for i in range(4, 9)}, **dict.fromkeys(LATER, 0)}
    if "cohort" in options:
        took = dict.fromkeys(took, ROUNDS)
    most = max(took.values())
    assert (said["unit"], said["neighbours"], said["releases"]) == ("client, local model", "replace-one", most)
    assert said["clients"] == pytest.approx({c: of_rows(n) for c, n in took.items()}, rel=5e-3)
    assert said["epsilon"] == max(said["clients"].values()) == result.history[-1].epsilon
    assert all(math.isnan(r.loss) and r.test == {} and r.holdout for r in result.history)


LATER = ("c9", "c10", "c11")


def test_a_budget_stops_the_run_before_a_client_would_exceed_it(tmp_path: Path) -> None:
    """One update of each client: c0 has sent one when round 2 asks for another."""
    stage = local_noise(9.0, clip=1.0, delta=1e-3, budget=1.01 * of_rows(1))
    result = alone(stage, directory=tmp_path / "run", evaluate_every=3)
    assert len(result.history) == 1 and any("stops after round 1 of 4" in note for note in result.notes)
    assert result.history[-1].holdout and result.privacy[0]["releases"] == 1
    apart = sampling.sequence([["c0", "c1"], ["c2", "c3"], ["c4", "c5"], ["c6", "c7"]])
    assert len(alone(stage, cohort=apart).history) == ROUNDS, "who has sent nothing has spent nothing"
    with pytest.raises(BudgetSpent, match=r"1 releases would take epsilon to .*above the budget of 0.1"):
        alone(local_noise(9.0, clip=1.0, budget=0.1), directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (local_noise(1e9, clip=1.0), "^noise_multiplier=1000000000.0.*less for sums of 15 numbers"),
        (local_noise(1e9, clip=1.0, mechanism="laplace"), "more rounding than data"),
        (local_noise(1.0, clip=1e-31), "^clip=1e-31"), (local_noise(1.0, clip=1e31, mechanism="laplace"), "^clip=1e"),
    ],
    ids=["much", "much laplace", "tiny", "huge laplace"],
)  # fmt: skip
def test_noise_that_no_client_could_add_is_refused_before_any_work(stage: Transform, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=said):
        alone(stage, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_an_epsilon_calibrates_for_the_client_that_takes_part_most(law: Any) -> None:
    (said,) = alone(local_noise(clip=1.0, epsilon=4.0, mechanism=law)).privacy
    assert 3.98 <= said["epsilon"] <= 4.0 == said["budget"] and said["releases"] == 3
    if law == "laplace":
        assert said["delta"] == 0 and said["epsilon"] == pytest.approx(3 * 2 * math.sqrt(2) / said["noise_multiplier"])
        assert "but for a chance" not in privacy.explain(said)


def test_calibrated_noise_is_what_clients_add() -> None:
    """Clients that have nothing to say: the model is their noise alone."""
    size = 20_000
    result = alone(
        local_noise(clip=0.5, epsilon=4.0), model=wide(size), rounds=1, cohort=None,
        data=silent(size, 4),
    )  # fmt: skip
    std = result.privacy[0]["noise_multiplier"] * 0.5 / math.sqrt(4)
    assert stats.kstest(result.vector.numpy(), "norm", args=(0.0, std)).pvalue > 1e-6
    assert abs(float(result.vector.std()) / std - 1) < 6 / math.sqrt(2 * size)


def test_a_visit_that_was_cut_short_by_a_kill_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Process.finish

    def finishing(self: Process, state: Any, *given: Any) -> Any:
        if state.round == 2:
            raise Killed
        return closed(self, state, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Process, "finish", finishing)
        with pytest.raises(Killed):
            alone(directory=tmp_path)
    (half,) = read_run(tmp_path).privacy
    assert half["releases"] == 3 and half["epsilon"] == pytest.approx(of_rows(3), rel=5e-3)
    (said,) = alone(directory=tmp_path, resume=True).privacy
    assert said["releases"] == 4 and said["clients"]["c5"] == pytest.approx(of_rows(2), rel=5e-3)
    assert len(entered(tmp_path)) == ROUNDS + 1


def test_seeded_noise_is_the_same_for_any_number_of_workers_and_other_noise_never() -> None:
    stage = local_noise(clip=1.0, epsilon=4.0, seed=3)
    assert torch.equal(*[alone(stage, engine="vectorized", workers=workers).vector for workers in (1, 2)])
    secret = local_noise(clip=1.0, epsilon=4.0)
    assert not torch.equal(*[alone(secret, engine="vectorized", workers=2).vector for _ in range(2)])


def test_the_sentences_of_local_privacy() -> None:
    text = privacy.explain(alone())
    for part in (
        "unit client, local model", "the server, which sees every update", "nobody but the client itself",
        "at most 3 updates of one client", "L2 norm of 1", "Gaussian noise of 9 times", "replace-one",
    ):  # fmt: skip
        assert part in text, part
    assert privacy.explain(alone(local_noise(9.0, clip=1.0, seed=1))).startswith("NOT PRIVATE")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_the_noise_in_shares_does_not_protect_is_refused_by_name() -> None:
    with pytest.raises(CompositionError, match=r"skellam cannot stand before the aggregator mean with weights"):
        run(aggregator=aggregators.mean())
    with pytest.raises(CompositionError, match=r"survivors=5\).*least=3\), which would show sums.*least=5"):
        run(channel=secure_sum(clip=1.0))
    with pytest.raises(CompositionError, match=r"skellam cannot protect clients under pooled.*example-level"):
        run(algorithm=atoll.algorithms.pooled(atoll.local_sgd(0.1)), cohort=None)
    with pytest.raises(CompositionError, match=r"skellam has no numbers to add noise to.*Leave skellam out"):
        run(algorithm=atoll.local_only(atoll.local_sgd(0.1)))
    with pytest.raises(CompositionError, match=r"gaussian_noise cannot stand in one pipeline with skellam"):
        run(clip_norm(1.0), gaussian_noise(1.0), shares())
    with pytest.raises(CompositionError, match="replace BatchNorm by GroupNorm"):
        run(model=atoll.Model(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "cross_entropy"))
    with pytest.raises(CompositionError, match="leave schedule out"):
        run(schedule=atoll.schedule.rounds(over=1.2))
    with pytest.raises(CompositionError, match="leave stop out"):
        run(stop=atoll.early_stopping(2))
    with pytest.raises(CompositionError, match=r"needs 5 clients in a sum, but there are 3"):
        run(cohort=sampling.sequence([["c0", "c1", "c2"]]))
    process = Process(
        scalar_model(), atoll.fedavg(atoll.local_sgd(0.1)), transforms=(shares(epsilon=1.0),), channel=channel(),
        aggregator=UNIFORM,
    )  # fmt: skip
    with pytest.raises(CompositionError, match=r"skellam\(epsilon=1\) cannot calibrate itself here"):
        process.next(process.init(), quadratics((1.0,) * 5, (1.0,) * 5))


def test_whoever_judges_by_clients_own_examples_refuses_it() -> None:
    def make(*, seed: int, lr: float) -> atoll.Experiment:
        return atoll.Experiment(
            model=model(), data=data(), algorithm=atoll.fedavg(atoll.local_sgd(lr)), rounds=1, seed=seed,
            transforms=(shares(),), channel=channel(), aggregator=UNIFORM,
        )  # fmt: skip

    with pytest.raises(InvalidArgument, match="test examples, which no noise of skellam protects"):
        study(make, {"a": {"lr": 0.1}}, (0, 1))
    with pytest.raises(CompositionError, match="cannot search for settings of a private run"):
        atoll.tune(make, {"lr": [0.1, 0.2]}, search="grid")
