"""Runs with noise: terms, budgets, what is counted when a run is killed, and what the result says."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting.pld import privacy_loss_mechanism
from problems import killed
from scipy import optimize
from torch import Tensor, nn

import atoll
from atoll import privacy, releases, sampling, simulation
from atoll.errors import BudgetSpent, CompositionError, InvalidArgument, NonFiniteError, RunError
from atoll.journal import open_journal
from atoll.privacy import factorization
from atoll.study import study
from atoll.transforms import clip_norm, correlated_noise, gaussian_noise

CLIENTS, ROUNDS = 12, 6


def model() -> atoll.Model:
    torch.manual_seed(0)
    return atoll.Model(nn.Linear(4, 3), "cross_entropy", metrics=("accuracy",))


def data(tests: bool = True, clients: int = CLIENTS) -> atoll.FederatedDataset:
    draw = torch.Generator().manual_seed(0)
    given = {
        f"c{i}": (torch.randn(6 + i, 4, generator=draw), torch.randint(0, 3, (6 + i,), generator=draw))
        for i in range(clients)
    }
    return atoll.FederatedDataset.from_arrays(given, test=given if tests else None)


def run(noise: Any = None, **options: Any) -> atoll.Result:
    given: dict[str, Any] = {
        "algorithm": atoll.fedavg(atoll.local_sgd(0.1)),
        "rounds": ROUNDS,
        "cohort": sampling.poisson(0.5),
        "transforms": (clip_norm(1.0), noise or gaussian_noise(2.0, delta=1e-3, accountant="rdp")),
        "aggregator": atoll.aggregators.mean(weights="uniform", denominator="expected"),
        "progress": False,
        "engine": "loop",
    } | options
    return atoll.simulate(model(), given.pop("data", None) or data(), **given)


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "kind", "rate"),
    [
        (sampling.poisson(0.5), "poisson", 0.5),
        (6, "fixed", 0.5),
        (0.25, "fixed", 0.25),
        (None, "none", 1.0),
        (sampling.everyone(), "none", 1.0),
        (sampling.cyclic(), "none", 1.0),
        (sampling.sequence([["c0", "c1"], ["c2"]]), "none", 1.0),
    ],
)
def test_the_accountant_reads_the_sampler_that_ran(cohort: Any, kind: str, rate: float) -> None:
    result = run(cohort=cohort)
    (said,) = result.privacy
    expected = privacy.epsilon(
        noise_multiplier=2.0, sampling_rate=rate, steps=ROUNDS, delta=1e-3, accountant="rdp", population=CLIENTS,
        sampling=kind,  # type: ignore[arg-type]
    )  # fmt: skip
    assert said["epsilon"] == pytest.approx(expected, rel=1e-9) == result.history[-1].epsilon
    assert said["neighbours"] == ("replace-one" if kind == "fixed" else "zero-out")
    assert said["releases"] == ROUNDS and said["unit"] == "client" and said["private"]
    spent = [r.epsilon for r in result.history]
    assert all(e is not None for e in spent) and spent == sorted(spent)  # type: ignore[type-var]


def test_an_epsilon_calibrates_the_noise_by_sampler_and_rounds() -> None:
    result = run(gaussian_noise(epsilon=2.0, delta=1e-3))
    (said,) = result.privacy
    assert 1.99 <= said["epsilon"] <= 2.0 == said["budget"]
    assert said["noise_multiplier"] == privacy.calibrate(epsilon=2.0, sampling_rate=0.5, steps=ROUNDS, delta=1e-3)
    assert said["accountant"] == "pld" and len(result.history) == ROUNDS


def test_delta_is_below_one_over_the_population_and_has_a_default() -> None:
    assert run(gaussian_noise(2.0, accountant="rdp")).privacy[0]["delta"] == 1e-5
    with pytest.raises(InvalidArgument, match=r"delta=0.1.*below 1 / population"):
        run(gaussian_noise(2.0, delta=0.1))
    assert privacy.accounting.usual_delta(10**6) == pytest.approx(10 ** (-6.6))


@pytest.mark.parametrize("accountant", ["analytic", "pld"])
def test_an_accountant_that_does_not_know_the_sampler_is_refused(accountant: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="accountant="):
        run(gaussian_noise(2.0, accountant=accountant), cohort=6, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before any work"


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_stops_the_run_before_the_release_that_would_exceed_it(tmp_path: Path) -> None:
    budget = privacy.epsilon(noise_multiplier=2.0, sampling_rate=0.5, steps=4, delta=1e-3, accountant="rdp")
    noise = gaussian_noise(2.0, delta=1e-3, accountant="rdp", budget=budget)
    result = run(noise, directory=tmp_path, data=holdout(), evaluate_every=3)
    assert len(result.history) == 4 and result.privacy[0]["epsilon"] == pytest.approx(budget)
    assert any(f"stops after round 4 of {ROUNDS}" in note for note in result.notes)
    assert result.history[-1].holdout, "the last round there is is evaluated"
    again = run(noise, directory=tmp_path, data=holdout(), evaluate_every=3, resume=True)
    assert len(again.history) == 4 and torch.equal(again.vector, result.vector)
    with pytest.raises(BudgetSpent, match=r"budget is spent: 0 releases.*above the budget of 0.1"):
        run(gaussian_noise(2.0, delta=1e-3, accountant="rdp", budget=0.1), directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_more_rounds_than_were_calibrated_for_end_at_the_epsilon(tmp_path: Path) -> None:
    noise = gaussian_noise(epsilon=2.0, delta=1e-3, accountant="rdp")
    run(noise, directory=tmp_path)
    result = run(noise, directory=tmp_path, rounds=3 * ROUNDS, resume=True)
    assert ROUNDS <= len(result.history) <= ROUNDS + 1 and result.privacy[0]["epsilon"] <= 2.0
    assert any("privacy budget of epsilon 2" in note for note in result.notes)


# --- what is secret, and what is told ---------------------------------------------------------------------------------


def holdout() -> atoll.FederatedDataset:
    given = data(tests=False)
    x, y = given["c0"].train["x"], given["c0"].train["y"]
    return atoll.FederatedDataset.from_arrays(
        {c: (given[c].train["x"], given[c].train["y"]) for c in given.clients}, holdout=(x, y)
    )


def test_nothing_that_noise_does_not_protect_is_told() -> None:
    result = run(data=holdout())
    for record in result.history:
        assert math.isnan(record.loss) and record.clients == CLIENTS // 2
        assert (record.test, record.validation, record.spread, record.refused) == ({}, {}, {}, {})
        assert record.holdout, "examples that are no client's are evaluated as ever"
    assert len({(r.bytes_up, r.bytes_down) for r in result.history}) == 1
    assert result.clients == {} and run(evaluate_every=1).history[-1].test == {}
    with pytest.raises(InvalidArgument, match=r"splits names test.*holdout.*result.evaluate"):
        run(splits=("test",))


def test_cohorts_are_drawn_secretly_unless_the_run_is_seeded() -> None:
    drawn: list[tuple[str, ...]] = []

    base = sampling.fixed(6)

    def secret(source: Any, population: int) -> Any:
        assert base.secret is not None
        found = base.secret(source, population)
        drawn.append(tuple(found.tolist()))
        return found

    spy = sampling.Sampler(base.spec, _never, base.expected, base.check, base.chance, secret)
    for _ in range(2):
        run(cohort=spy)
    assert drawn[:ROUNDS] != drawn[ROUNDS:] and len(set(drawn)) > ROUNDS
    drawn.clear()
    vectors = [run(gaussian_noise(2.0, accountant="rdp", seed=1), cohort=spy).vector for _ in range(2)]
    assert drawn[:ROUNDS] == drawn[ROUNDS:] and len(set(drawn[:ROUNDS])) > 1 and torch.equal(*vectors)
    assert not torch.equal(run().vector, run().vector)


def _never(seed: int, round: int, population: int) -> Any:
    raise AssertionError("a keyed cohort can be drawn again by anybody")


def test_a_seeded_run_says_that_it_is_not_private(tmp_path: Path) -> None:
    result = run(gaussian_noise(2.0, accountant="rdp", seed=1))
    assert not result.privacy[0]["private"]
    assert privacy.explain(result).startswith("NOT PRIVATE")
    assert "NOT PRIVATE" in result.report(tmp_path / "report.html").read_text()


def test_two_sentences_say_what_it_means(tmp_path: Path) -> None:
    result = run()
    text = privacy.explain(result)
    assert text.count(". ") == 1 and text.endswith(".")
    assert "each of 12 clients" in text and "probability 0.5" in text and f"{ROUNDS} releases" in text
    epsilon = result.privacy[0]["epsilon"]
    assert f"epsilon {epsilon:.3g} at delta 0.001" in text and f"at most {math.exp(epsilon):.3g}" in text
    assert text.split(" (")[0] in result.report(tmp_path / "report.html").read_text()
    plain = run(transforms=())
    assert plain.privacy == [] and privacy.explain(plain).startswith("No differential privacy")
    assert result.to_frame()["epsilon"].iloc[-1] == epsilon
    loaded = atoll.Result.load(result.save(tmp_path / "saved"))
    assert loaded.privacy == result.privacy and privacy.explain(loaded) == text
    result.plot(tmp_path / "history.png")


def test_a_fingerprint_of_the_data_is_told_under_a_key(tmp_path: Path) -> None:
    given = data()
    told = [
        run(directory=tmp_path / str(i), data=given).spec["experiment"]["data"] for i in range(2)
    ]  # fmt: skip
    assert told[0] != told[1] and given.fingerprint() not in told
    assert (tmp_path / "0" / "fingerprint.key").stat().st_mode & 0o077 == 0
    other = data()
    other.train.fields["x"][0, 0] += 1.0
    with pytest.raises(RunError, match="belongs to another experiment"):
        run(directory=tmp_path / "0", data=other, resume=True)


# --- killed anywhere --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for a kill of the process."""


def counted(directory: Path) -> int:
    journal = open_journal(directory)
    try:
        return sum(1 for _ in journal.events("release"))
    finally:
        journal.close()


POINTS = ["before the sum is kept", "before it is entered", "before it is used", "after the round"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "correlated"])
def test_killed_anywhere_every_release_is_counted_once(
    point: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = atoll.local_sgd(0.1)
    options: dict[str, Any] = {
        "algorithm": atoll.scaffold(plan) if method == "scaffold" else atoll.fedavg(plan),
        "directory": tmp_path, "checkpoint_every": 100,
    }  # fmt: skip
    if method == "correlated":
        options |= {"noise": correlated_noise(2.0, delta=1e-3), "cohort": sampling.min_separation(3, 4)}
    shown: dict[int, Tensor] = {}
    calls = {"left": 4}

    def dying(function: Any, *, after: bool) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls["left"] -= 1
            if not calls["left"] and not after:
                raise Killed
            found = function(*arguments, **named)
            if not calls["left"]:
                raise Killed
            return found

        return call

    class Journal:
        def __init__(self, inner: Any, kill: bool) -> None:
            self._inner, self._kill = inner, kill

        def append(self, kind: str, body: dict[str, Any]) -> None:
            if kind == "release":
                calls["left"] -= 1
                if not calls["left"] and self._kill:
                    raise Killed
            self._inner.append(kind, body)
            if kind == "release" and not calls["left"]:
                raise Killed

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    def keep(record: atoll.Record) -> None:
        if point == "after the round" and record.round == 4:
            raise Killed

    with monkeypatch.context() as patched:
        if point == "before the sum is kept":
            patched.setattr(releases, "_write", dying(releases._write, after=False))
        elif point != "after the round":
            opened = simulation.open_journal
            kill = point == "before it is entered"
            patched.setattr(simulation, "open_journal", lambda d: Journal(opened(d), kill))
        with pytest.raises(Killed):
            run(**options, callbacks=(keep,))
    before = counted(tmp_path)
    assert before == (3 if point in POINTS[:2] else 4), "never less than what was used"
    kept = {p.name: p.read_bytes() for p in (tmp_path / "releases").glob("*")}
    result = run(**options, resume=True)
    assert counted(tmp_path) == ROUNDS == result.privacy[0]["releases"]
    assert [r.round for r in result.history] == list(range(1, ROUNDS + 1))
    lost = [r.round for r in result.history if any("lost when the run was stopped" in note for note in r.notes)]
    if method == "scaffold":  # a sum brings back no client's memory: the record says so
        assert lost == {POINTS[0]: [], POINTS[1]: [4], POINTS[2]: [4], POINTS[3]: []}[point]
    else:
        assert not lost
        assert set(kept) >= {f"round-{i:08d}.safetensors" for i in range(1, 4)}
        # The end follows from the noised sums alone: those from before the kill were used, and not drawn again.
        journal = open_journal(tmp_path)
        first = [e.body["round"] for e in journal.events("release")]
        journal.close()
        assert first == list(range(1, ROUNDS + 1)) and not shown


def test_a_replayed_round_has_the_model_of_the_first_time(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    def stop(record: atoll.Record) -> None:
        if record.round == 4:
            raise Killed

    with pytest.raises(Killed):
        run(directory=tmp_path, checkpoint_every=100, callbacks=(stop,))
    sums = [releases._read(p)[0]["sum"] for p in sorted((tmp_path / "releases").glob("*"))]
    vector = model().init()
    for total in sums:
        vector = vector + (total / (CLIENTS / 2)).to(vector)
    result = run(directory=tmp_path, rounds=4, checkpoint_every=100, resume=True)
    torch.testing.assert_close(result.vector, vector)
    assert result.privacy[0]["releases"] == 4 and not seen


def test_rounds_whose_sums_are_lost_are_counted_again(tmp_path: Path) -> None:
    def stop(record: atoll.Record) -> None:
        if record.round == 4:
            raise Killed

    with pytest.raises(Killed):
        run(directory=tmp_path, checkpoint_every=100, callbacks=(stop,))
    path = tmp_path / "releases" / "round-00000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    result = run(directory=tmp_path, resume=True)
    assert result.privacy[0]["releases"] == ROUNDS + 1 == counted(tmp_path)


def test_kept_sums_go_when_two_checkpoints_stand_behind_them(tmp_path: Path) -> None:
    run(directory=tmp_path, checkpoint_every=1)
    assert len(list((tmp_path / "releases").glob("*"))) <= 2


def test_killed_with_sigkill_the_ledger_has_what_ran(tmp_path: Path) -> None:
    call = f"run(directory={str(tmp_path / 'run')!r}, checkpoint_every=2, callbacks=(tell,))"
    killed(tmp_path, 3, "test_releases", call)
    assert counted(tmp_path / "run") == 3
    from atoll.report.runs import read_run

    assert read_run(tmp_path / "run").privacy[0]["releases"] == 3, "an unfinished run can be asked"
    result = run(directory=tmp_path / "run", resume=True)
    assert counted(tmp_path / "run") == ROUNDS == result.privacy[0]["releases"]


def test_workers_and_engines_take_the_same_road() -> None:
    fixed = gaussian_noise(2.0, accountant="rdp", seed=1)
    how = (("loop", 1), ("auto", 1), ("auto", 2))
    ends = [run(fixed, engine=engine, workers=workers).vector for engine, workers in how]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(ends[1], ends[2])


def test_training_under_noise_still_learns() -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(3000, 4, generator=draw)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) > 0).long()
    many = atoll.partition.iid((x, y), clients=300, seed=0)
    result = run(
        gaussian_noise(1.0, delta=1e-4, accountant="rdp", seed=2), data=many, rounds=30, cohort=sampling.poisson(0.3),
        algorithm=atoll.fedavg(atoll.local_sgd(0.5, epochs=2)), engine="auto",
    )  # fmt: skip
    found = result.predict(x).argmax(dim=1)
    assert float((found == y).float().mean()) > 0.9


# --- correlated noise -------------------------------------------------------------------------------------------------

APART = sampling.min_separation(3, 4)


def correlated(noise: Any = None, **options: Any) -> atoll.Result:
    return run(noise or correlated_noise(2.0, delta=1e-3), **{"cohort": APART} | options)


def stop_after(round: int) -> Any:
    def stop(record: atoll.Record) -> None:
        if record.round == round:
            raise Killed

    return stop


STRATEGIES = {
    "buffered": factorization.buffered(ROUNDS, separation=4),
    "banded": factorization.banded(ROUNDS, bands=4, separation=4),
    "tree": factorization.tree(ROUNDS, separation=4, honaker=False),
    "independent": factorization.independent(ROUNDS, separation=4),
}


def gaussian(noise_multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism, by dp-accounting called directly."""
    loss = privacy_loss_mechanism.GaussianPrivacyLoss(noise_multiplier)
    return float(optimize.brentq(lambda epsilon: loss.get_delta_for_epsilon(epsilon) - delta, 0.0, 50.0, xtol=1e-13))


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_rounds_of_correlated_noise_are_one_mechanism(name: str) -> None:
    result = correlated(correlated_noise(2.0, strategy=name, delta=1e-3))
    (said,) = result.privacy
    assert said["epsilon"] == pytest.approx(gaussian(2.0, 1e-3), rel=1e-9) == result.history[-1].epsilon
    assert said["releases"] == ROUNDS and said["neighbours"] == "zero-out" and said["private"]
    own = STRATEGIES[name]
    assert said["strategy"] == {
        "name": name, "rounds": ROUNDS, "separation": 4, "participations": 2, "sensitivity": own.sensitivity
    }  # fmt: skip
    (event,) = said["events"]
    assert event["mechanism"] == "correlated gaussian" and event["sampling"] == "none" and event["count"] == ROUNDS
    assert result.spec["experiment"]["transforms"][1]["strategy"] == name


@pytest.mark.parametrize("name", STRATEGIES)
def test_so_far_the_beginning_of_the_mechanism_is_spent(name: str) -> None:
    """The first r rows of C X + Z, whose sensitivity is that of the first r rounds."""
    result = correlated(correlated_noise(2.0, strategy=name, delta=1e-3))
    own, spent = STRATEGIES[name], [r.epsilon for r in result.history]
    for r, told in enumerate(spent, 1):
        matrix = own.matrix()
        made = matrix[(matrix[:, r:] == 0).all(dim=1)]  # rows that no later round is part of
        gram = (made.T @ made).abs()
        pairs = [(i, j) for i in range(ROUNDS) for j in range(i + 4, ROUNDS)]
        moved = max([float(gram[i, i]) for i in range(ROUNDS)], default=0.0)
        moved = max([moved, *(float(gram[list(p)][:, list(p)].sum()) for p in pairs)])
        least = gaussian(2.0 * own.sensitivity / math.sqrt(moved), 1e-3)
        assert told is not None and told >= least * (1 - 1e-9), "never less than the client's that is moved most"
        if name in ("buffered", "independent"):  # their sensitivity is exact
            assert told == pytest.approx(least, rel=1e-9)
    assert spent == sorted(spent)  # type: ignore[type-var]


def test_an_epsilon_calibrates_one_mechanism() -> None:
    result = correlated(correlated_noise(epsilon=2.0, delta=1e-3))
    (said,) = result.privacy
    assert said["noise_multiplier"] == privacy.calibrate(epsilon=2.0, steps=1, delta=1e-3, sampling="none")
    assert 1.99 <= said["epsilon"] <= 2.0 == said["budget"] and len(result.history) == ROUNDS


def test_a_budget_stops_correlated_noise_before_the_release_that_would_exceed_it(tmp_path: Path) -> None:
    own = STRATEGIES["buffered"]
    after = [
        privacy.epsilon(noise_multiplier=2.0 * own.sensitivity / own.prefix(r), steps=1, delta=1e-3, sampling="none")
        for r in range(1, ROUNDS + 1)
    ]
    noise = correlated_noise(2.0, delta=1e-3, budget=(after[3] + after[4]) / 2)
    result = correlated(noise, directory=tmp_path)
    assert len(result.history) == 4 and result.privacy[0]["epsilon"] == pytest.approx(after[3])
    assert any(f"stops after round 4 of {ROUNDS}" in note for note in result.notes)
    assert f"the first 4 of {ROUNDS} rounds" in privacy.explain(result)
    again = correlated(noise, directory=tmp_path, resume=True)
    assert len(again.history) == 4 and counted(tmp_path) == 4
    with pytest.raises(BudgetSpent, match="0 releases"):
        correlated(correlated_noise(2.0, delta=1e-3, budget=after[0] / 2), directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_with_correlated_noise_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    noise = correlated_noise(2.0, strategy=name, delta=1e-3, seed=4)
    whole = correlated(noise)
    for every, last in ((1, 3), (2, 5), (100, 3)):
        folder = tmp_path / f"{every}-{last}"
        with pytest.raises(Killed):
            correlated(noise, directory=folder, checkpoint_every=every, callbacks=(stop_after(last),))
        result = correlated(noise, directory=folder, checkpoint_every=every, resume=True)
        assert torch.equal(result.vector, whole.vector)
        assert counted(folder) == ROUNDS == result.privacy[0]["releases"]
        assert result.privacy == whole.privacy


def test_correlated_noise_that_was_released_is_not_drawn_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        correlated(directory=tmp_path, checkpoint_every=100, callbacks=(stop_after(4),))
    before = {p.name: releases._read(p)[0] for p in (tmp_path / "releases").glob("round-*")}
    assert len(before) == 4
    result = correlated(directory=tmp_path, checkpoint_every=100, resume=True)
    after = {p.name: releases._read(p)[0] for p in (tmp_path / "releases").glob("round-*")}
    assert len(after) == ROUNDS
    for name, kept in before.items():
        assert all(torch.equal(tensor, after[name][n]) for n, tensor in kept.items())
    # From the noise that was drawn over both lives, and what was released, follows what clients sent: it was bounded.
    own = factorization.restored(next(iter(open_terms(tmp_path)))["strategy"])
    drawn = torch.cat([after[name]["drawn"] for name in sorted(after)])
    sums = torch.stack([after[name]["sum"] for name in sorted(after)])
    assert float(torch.linalg.vector_norm(sums - own.decoder() @ drawn, dim=1).max()) < 3 + 1e-6
    vector = model().init()
    for total in sums:
        vector = vector + (total / 3).to(vector)
    torch.testing.assert_close(result.vector, vector)


def open_terms(directory: Path) -> list[dict[str, Any]]:
    journal = open_journal(directory)
    try:
        return [e.body["terms"] for e in journal.events("privacy")]
    finally:
        journal.close()


@pytest.mark.parametrize("gone", [True, False])
def test_correlated_noise_whose_sum_is_lost_is_not_drawn_again(gone: bool, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        correlated(directory=tmp_path, checkpoint_every=100, callbacks=(stop_after(4),))
    path = tmp_path / "releases" / "round-00000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if gone else path.write_bytes(bytes(content))
    with pytest.raises(RunError, match=r"sum of round 3 was released.*never drawn again.*another directory"):
        correlated(directory=tmp_path, resume=True)
    assert counted(tmp_path) == 4


def test_correlated_noise_without_its_memory_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        correlated(directory=tmp_path, checkpoint_every=3, callbacks=(stop_after(4),))
    (path,) = (tmp_path / "releases").glob("noise-*")
    assert path.name == "noise-00000003.safetensors"
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(RunError, match=r"noise-00000003\.safetensors is missing"):
        correlated(directory=tmp_path, resume=True)
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(RunError, match=r"noise-00000003\.safetensors is damaged"):
        correlated(directory=tmp_path, resume=True)


def test_noise_on_disk_is_its_owner_s_and_goes_with_the_sums(tmp_path: Path) -> None:
    result = correlated(directory=tmp_path / "run", checkpoint_every=1)
    files = list((tmp_path / "run" / "releases").iterdir())
    assert len(files) <= 4 and {p.name[:5] for p in files} == {"round", "noise"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in files)
    result.save(tmp_path / "saved")
    names = [p.name for p in (tmp_path / "saved").rglob("*")]
    assert names and not any(n.startswith(("round-", "noise-")) for n in names)


def test_noise_that_was_being_written_at_a_kill_does_not_stay(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        correlated(directory=tmp_path, checkpoint_every=1, callbacks=(stop_after(3),))
    torn = tmp_path / "releases" / ".round-00000004.safetensors.1"
    torn.write_bytes(b"noise of a process that is gone")
    correlated(directory=tmp_path, checkpoint_every=1, resume=True)
    assert not torn.exists()


@pytest.mark.parametrize("kind", ["buffered", "independent", "fresh"])
def test_a_round_that_left_the_finite_numbers_fails_again_from_its_kept_sum(kind: str, tmp_path: Path) -> None:
    noise = gaussian_noise(8.0, seed=3) if kind == "fresh" else correlated_noise(8.0, strategy=kind, seed=3)
    far = atoll.fedavg(atoll.local_sgd(0.1), server=atoll.server.sgd(lr=4e37))
    told: dict[str, Any] = {"algorithm": far, "cohort": APART, "directory": tmp_path, "checkpoint_every": 100}
    with pytest.raises(NonFiniteError) as first:
        run(noise, **told)
    made = counted(tmp_path)
    assert 1 < made <= ROUNDS, "the round before was fine"
    with pytest.raises(NonFiniteError) as again:
        run(noise, **told, resume=True)
    assert str(again.value) == str(first.value) and str(first.value).startswith(f"round {made}:")
    result = run(noise, **told | {"rounds": made - 1}, resume=True)
    assert bool(torch.isfinite(result.vector).all()) and counted(tmp_path) == made == result.privacy[0]["releases"]


def test_sums_of_a_run_without_a_journal_are_no_other_run_s(tmp_path: Path) -> None:
    correlated(directory=tmp_path, checkpoint_every=100)
    for path in tmp_path.glob("journal.sqlite*"):
        path.unlink()
    for resume in (False, True):
        with pytest.raises(RunError, match=r"noised sums of a run whose journal is gone.*another directory"):
            correlated(directory=tmp_path, resume=resume, algorithm=atoll.fedavg(atoll.local_sgd(0.5)))
    assert counted(tmp_path) == 0


def test_a_damaged_checkpoint_leaves_the_one_before_and_its_noise(tmp_path: Path) -> None:
    noise = correlated_noise(2.0, delta=1e-3, seed=4)
    with pytest.raises(Killed):
        correlated(noise, directory=tmp_path, checkpoint_every=2, callbacks=(stop_after(5),))
    newest = max((tmp_path / "checkpoints").glob("*"))
    newest.write_bytes(newest.read_bytes() + b"?")
    with pytest.warns(UserWarning, match="damaged"):
        result = correlated(noise, directory=tmp_path, checkpoint_every=2, resume=True)
    assert torch.equal(result.vector, correlated(noise).vector) and counted(tmp_path) == ROUNDS


def test_more_rounds_than_noise_was_correlated_for_are_refused(tmp_path: Path) -> None:
    correlated(directory=tmp_path)
    with pytest.raises(InvalidArgument, match=rf"rounds={ROUNDS + 1}.*at most the {ROUNDS} .*another run"):
        correlated(directory=tmp_path, rounds=ROUNDS + 1, resume=True)
    assert counted(tmp_path) == ROUNDS


def test_a_strategy_may_have_rounds_to_spare(tmp_path: Path) -> None:
    long = factorization.banded(2 * ROUNDS, bands=2, separation=4)
    noise = correlated_noise(2.0, strategy=long, delta=1e-3, seed=1)
    part = correlated(noise, directory=tmp_path)
    assert part.privacy[0]["epsilon"] == pytest.approx(
        gaussian(2.0 * long.sensitivity / long.prefix(ROUNDS), 1e-3), rel=1e-9
    )
    whole = correlated(noise, directory=tmp_path, rounds=2 * ROUNDS, resume=True)
    assert whole.privacy[0]["epsilon"] == pytest.approx(gaussian(2.0, 1e-3), rel=1e-9)
    assert torch.equal(whole.vector, correlated(noise, rounds=2 * ROUNDS).vector)


OTHERS = [
    sampling.poisson(0.5), 6, 0.25, sampling.cyclic(), sampling.cyclic(shuffle=True), sampling.sequence([["c0"]])
]  # fmt: skip


@pytest.mark.parametrize("cohort", OTHERS)
def test_correlated_noise_needs_a_sampler_that_keeps_clients_apart(cohort: Any, tmp_path: Path) -> None:
    name = sampling.resolve(cohort).spec["name"]
    with pytest.raises(InvalidArgument, match=rf"cohort='{name}'.*correlated_noise.*min_separation\(size, separation"):
        correlated(cohort=cohort, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before any work"


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (factorization.buffered(ROUNDS, separation=5), r"separation of at most 4.*min_separation\(size, 5\)"),
        (factorization.tree(ROUNDS - 1, separation=4, honaker=False), r"rounds=6.*at most the 5 .*tree"),
        (factorization.independent(ROUNDS, separation=4, participations=1), r"participations=1.*at least 2"),
        (factorization.independent(3 * ROUNDS, separation=2, participations=4), r"participations=4.*at least 5"),
    ],
)
def test_a_strategy_for_other_cohorts_is_refused(strategy: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        correlated(correlated_noise(2.0, strategy=strategy))


def test_a_sampler_s_promise_of_sampling_counts_for_nothing_under_correlated_noise() -> None:
    own = replace(sampling.poisson(1.0), apart=lambda population: 1)
    (said,) = correlated(correlated_noise(2.0, delta=1e-3), cohort=own).privacy
    assert said["events"][0]["sampling"] == "none" and said["strategy"]["participations"] == ROUNDS
    everyone = correlated(correlated_noise(2.0, delta=1e-3), cohort=None).privacy[0]
    assert everyone["strategy"]["participations"] == ROUNDS and everyone["epsilon"] == said["epsilon"]


def test_correlated_noise_is_told_as_what_it_is(tmp_path: Path) -> None:
    result = correlated()
    text = privacy.explain(result)
    assert text.count(". ") == 1 and f"the whole of one Gaussian mechanism of {ROUNDS} rounds" in text
    assert "strategy buffered" in text and "at most 2 times, 4 rounds apart" in text and "odds" in text
    assert text.split(" (")[0] in result.report(tmp_path / "report.html").read_text()
    loaded = atoll.Result.load(result.save(tmp_path / "saved"))
    assert loaded.privacy == result.privacy and privacy.explain(loaded) == text
    seeded = correlated(correlated_noise(2.0, seed=1))
    assert privacy.explain(seeded).startswith("NOT PRIVATE") and not seeded.privacy[0]["private"]


@pytest.mark.slow
def test_correlated_noise_killed_with_sigkill_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    call = (
        f"correlated(correlated_noise(2.0, delta=1e-3, seed=4), directory={str(tmp_path / 'run')!r}, "
        "checkpoint_every=2, callbacks=(tell,))"
    )
    killed(tmp_path, 5, "test_releases", call)
    assert counted(tmp_path / "run") == 5
    from atoll.report.runs import read_run

    own = STRATEGIES["buffered"]
    told = read_run(tmp_path / "run").privacy[0]
    expected = gaussian(2.0 * own.sensitivity / own.prefix(5), 1e-3)
    assert told["releases"] == 5 and told["epsilon"] == pytest.approx(expected, rel=1e-9)
    noise = correlated_noise(2.0, delta=1e-3, seed=4)
    result = correlated(noise, directory=tmp_path / "run", checkpoint_every=2, resume=True)
    assert counted(tmp_path / "run") == ROUNDS and torch.equal(result.vector, correlated(noise).vector)


# --- example-level privacy --------------------------------------------------------------------------------------------


def protected(noise: Any = None, **options: Any) -> Any:
    told = noise or privacy.example_level(clip=1.0, noise_multiplier=1.0, delta=1e-3, accountant="rdp")
    return atoll.local_sgd(0.1, **{"epochs": 1, "batch_size": 4} | options, privacy=told)


def example_run(noise: Any = None, **options: Any) -> atoll.Result:
    given = {"algorithm": atoll.fedavg(protected(noise)), "cohort": None, "transforms": (), "aggregator": None}
    return run(**given | {"rounds": 3} | options)


def of_client(n: int, visits: int) -> float:
    return privacy.epsilon(
        noise_multiplier=1.0, sampling_rate=4 / n, steps=visits * -(-n // 4), delta=1e-3, accountant="rdp"
    )


def test_every_client_s_examples_are_counted_by_its_own_visits_and_size() -> None:
    result = example_run(cohort=sampling.sequence([["c0", "c5"], ["c5"], ["c11"]]))
    (said,) = result.privacy
    assert said["unit"] == "example" and said["private"]
    expected = {f"c{i}": 0.0 for i in range(CLIENTS)} | {
        "c0": of_client(6, 1), "c5": of_client(11, 2), "c11": of_client(17, 1)
    }  # fmt: skip
    assert said["clients"] == pytest.approx(expected)
    assert said["epsilon"] == pytest.approx(max(expected.values())) == result.history[-1].epsilon
    assert math.isnan(result.history[-1].loss) and result.history[-1].test, "test examples are other examples"
    assert "each single example of any client" in privacy.explain(result)
    with pytest.raises(InvalidArgument, match="splits names train"):
        example_run(splits=("train",))


def test_example_level_noise_is_calibrated_for_the_client_that_is_hardest_to_protect() -> None:
    told = privacy.example_level(clip=1.0, epsilon=6.0, delta=1e-3, accountant="rdp")
    result = example_run(told)
    (said,) = result.privacy
    assert 5.9 <= said["epsilon"] <= 6.0 and max(said["clients"].values()) == said["epsilon"]


def test_visits_are_counted_again_when_rounds_are_run_again(tmp_path: Path) -> None:
    def stop(record: atoll.Record) -> None:
        if record.round == 2:
            raise Killed

    with pytest.raises(Killed):
        example_run(directory=tmp_path, checkpoint_every=100, callbacks=(stop,))
    result = example_run(directory=tmp_path, resume=True)
    assert result.privacy[0]["clients"]["c0"] == pytest.approx(of_client(6, 2 + 3))


def test_clients_and_examples_are_two_statements() -> None:
    result = run(algorithm=atoll.fedavg(protected()), rounds=2)
    assert [s["unit"] for s in result.privacy] == ["client", "example"]
    assert result.privacy[1]["epsilon"] == pytest.approx(of_client(6, 2)), "who took part stays a secret"
    assert result.privacy[1]["clients"] == {}, "a client's own epsilon tells how many examples it has"
    assert any("how many examples clients have" in what for what in result.privacy[0]["not_covered"])
    assert len(privacy.explain(result).splitlines()) == 2


@pytest.mark.parametrize("method", [atoll.fine_tune, lambda p: atoll.fedper(p, private=("bias",)), atoll.local_only])
def test_personal_models_are_no_part_of_a_saved_private_result(method: Any, tmp_path: Path) -> None:
    run(algorithm=method(atoll.local_sgd(0.1)), rounds=1, directory=tmp_path / "run")
    loaded = atoll.Result.load(tmp_path / "run", model())
    assert not loaded.personalised and "privacy" in loaded.notes[-1]
    with pytest.raises(RunError, match="no personal models"):  # nor is it told who was visited
        loaded.personal("c0")


def test_models_that_are_made_anew_are_not_saved_uncounted(tmp_path: Path) -> None:
    plan = atoll.local_sgd(
        0.1, steps=2, batch_size=4,
        privacy=privacy.example_level(clip=1.0, noise_multiplier=2.0, delta=1e-3, accountant="rdp"),
    )  # fmt: skip
    kept: dict[str, bool] = {}
    for name, method in (("fine_tune", atoll.fine_tune(plan)), ("ditto", atoll.ditto(plan, lam=0.1))):
        atoll.simulate(
            model(), data(tests=False), algorithm=method, rounds=1, cohort=1, progress=False, directory=tmp_path / name
        )
        kept[name] = atoll.Result.load(tmp_path / name, model()).personalised
    assert kept == {"fine_tune": False, "ditto": True}  # what was trained in a round was counted in it


def test_sampling_counts_only_where_cohorts_are_drawn_in_secret() -> None:
    with pytest.raises(InvalidArgument, match=r"cohort='poisson'.*drawn in secret"):
        run(cohort=replace(sampling.poisson(0.5), secret=None))


def test_whoever_judges_by_clients_own_examples_refuses_client_level_privacy() -> None:
    def make(*, seed: int, lr: float) -> atoll.Experiment:
        return atoll.Experiment(
            model=model(), data=data(), algorithm=atoll.fedavg(atoll.local_sgd(lr)), rounds=1, seed=seed,
            transforms=(clip_norm(1.0), gaussian_noise(2.0)),
            aggregator=atoll.aggregators.mean(weights="uniform", denominator="expected"),
        )  # fmt: skip

    with pytest.raises(InvalidArgument, match="test examples, which no noise of gaussian_noise protects"):
        study(make, {"a": {"lr": 0.1}}, (0, 1))
    with pytest.raises(CompositionError, match="cannot search for settings of a private run"):
        atoll.tune(make, {"lr": [0.1, 0.2]}, search="grid")


def test_how_wide_tiles_were_is_not_told() -> None:
    told = run(engine="vectorized", rounds=1).engine
    assert told["engine"] == "vectorized" and told.keys() <= {"engine", "reason"}
