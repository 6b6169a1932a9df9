"""Tuning: what is chosen, by what, and that no test example has a say in it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model
from registry import MODELS

import atoll
from atoll import space
from atoll.data import FederatedDataset
from atoll.errors import CompositionError, InvalidArgument
from atoll.tuning import Trial, tune

A, B, START = (1.0, 2.0), (-1.0, 0.5), 3.0


def centred(centre: float, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, 1, dtype=torch.float64), torch.tensor([[1.0, centre]], dtype=torch.float64).repeat(n, 1)


def data(test: float = 9.0, **splits: Any) -> FederatedDataset:
    """Training ends at 1, validation examples lie at 0.5 of the way from 0, test examples somewhere else."""
    names = ("a", "b")
    return FederatedDataset.from_arrays(
        {c: centred(1.0) for c in names},
        **{"validation": {c: centred(0.5) for c in names}, "test": {c: centred(test) for c in names}, **splits},
    )


def make(found: FederatedDataset | None = None, **fixed: Any) -> Any:
    """One round of one step from 0: the model is lr."""

    def experiment(*, seed: int = 0, lr: float = 0.1, **rest: Any) -> atoll.Experiment:
        plan = atoll.local_sgd(lr, steps=1, batch_size=None)
        return atoll.Experiment(
            model=scalar_model(0.0), data=data() if found is None else found, algorithm=atoll.fedavg(plan),
            rounds=1, seed=seed, **fixed,
        )  # fmt: skip

    return experiment


def test_a_grid_takes_every_combination_and_chooses_on_validation_examples() -> None:
    seen: list[Trial] = []
    found = tune(make(), {"lr": [0.1, 0.4, 0.9], "other": ["x", None]}, search="grid", on_trial=seen.append)
    assert [t.settings for t in found.trials] == [{"lr": r, "other": o} for r in (0.1, 0.4, 0.9) for o in ("x", None)]
    assert found.settings == {"lr": 0.4, "other": "x"}, "of equals the first"
    assert [t.value for t in found.trials[::2]] == pytest.approx([(r - 0.5) ** 2 / 2 for r in (0.1, 0.4, 0.9)])
    assert found.metric == "loss" and found.better == -1 and list(found.trials) == seen
    assert found.validation == pytest.approx(0.005)
    assert found.test.mean == pytest.approx((0.4 - 9.0) ** 2 / 2) and math.isnan(found.test.low)
    assert float(found.results[0].vector) == pytest.approx(0.4)
    assert "on test examples 36.98; on the validation examples it was chosen by 0.005" in str(found)
    assert list(found.to_frame().columns) == ["lr", "other", "validation loss", "error"]


def test_the_choice_does_not_depend_on_test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are; and none is evaluated before the choice is made."""
    from atoll.rounds import Process

    looked: list[str] = []
    for name in ("evaluate_global", "evaluate"):
        before = getattr(Process, name)

        def watched(self: Any, state: Any, found: Any, split: str = "test", *, of: Any = before, **rest: Any) -> Any:
            looked.append(split)
            return of(self, state, found, split=split, **rest)

        monkeypatch.setattr(Process, name, watched)
    import atoll.result

    plain = atoll.result.evaluate

    def evaluate(model: Any, vector: Any, found: Any, *, split: str = "test", **rest: Any) -> Any:
        looked.append(split)
        return plain(model, vector, found, split=split, **rest)

    monkeypatch.setattr(atoll.result, "evaluate", evaluate)
    grid: Any = {"lr": [0.1, 0.4, 0.9]}
    near, far = (tune(make(data(test)), grid, search="grid") for test in (0.1, 50.0))
    assert near.settings == far.settings and near.test != far.test
    half = len(looked) // 2
    assert looked == looked[:half] * 2 and looked[:half].count("test") == 1 and looked[half - 1] == "test"


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_ranges_are_searched_by_a_seed(search: Any) -> None:
    ranges = {
        "lr": space.log(1e-3, 1.0),
        "other": space.integers(1, 3),
        "kind": ["a", "b"],
        "more": space.uniform(2, 3),
    }
    found = tune(make(), ranges, trials=15, search=search, seed=4)
    again = tune(make(), ranges, trials=15, search=search, seed=4)
    other = tune(make(), ranges, trials=15, search=search, seed=5)
    assert (
        [t.settings for t in found.trials] == [t.settings for t in again.trials] != [t.settings for t in other.trials]
    )
    for trial in found.trials:
        assert 1e-3 <= trial.settings["lr"] <= 1 and trial.settings["other"] in (1, 2, 3)
        assert isinstance(trial.settings["other"], int) and trial.settings["kind"] in ("a", "b")
        assert 2 <= trial.settings["more"] <= 3
    assert found.validation == min(t.value for t in found.trials)


def test_validation_examples_are_cut_from_training_where_there_are_none() -> None:
    kind = MODELS["perceptron"]
    found = kind.data((12, 9, 14))

    def experiment(*, seed: int, lr: float) -> atoll.Experiment:
        made = atoll.Experiment(
            model=kind.model(metrics=("accuracy",)), data=found, rounds=3, seed=seed,
            algorithm=atoll.ditto(atoll.local_sgd(lr, batch_size=4), lam=0.5),
        )  # fmt: skip
        return made

    tuned = tune(experiment, {"lr": [0.05, 0.5]}, search="grid", seeds=(0, 1, 2))
    assert tuned.metric == "accuracy" and tuned.better == 1, "the model's first metric"
    assert len(tuned.trials[0].by_seed) == 3 and tuned.test.low <= tuned.test.mean <= tuned.test.high
    for result, value in zip(tuned.results, tuned.tests["accuracy"], strict=True):
        assert result.evaluate(found, personal=True).metrics["accuracy"] == value, "personal models, on the same tests"


def test_early_stopping_goes_on_in_a_search() -> None:
    found = tune(make(stop=atoll.early_stopping(1)), {"lr": [0.1, 0.4]}, search="grid")
    assert found.settings == {"lr": 0.4}


def test_settings_that_diverge_are_told_and_not_chosen() -> None:
    target = quadratics(A, B, (2, 4))
    found = target.split(test=0.0, validation=0.4)

    def experiment(*, seed: int, lr: float) -> atoll.Experiment:
        plan = atoll.local_sgd(lr, steps=400, batch_size=None)
        return atoll.Experiment(
            model=scalar_model(START), data=found, rounds=1, algorithm=atoll.fedavg(plan), seed=seed
        )

    for search in ("grid", "random", "tpe"):
        tuned = tune(experiment, {"lr": [50.0, 0.1]}, search=search, trials=8)  # type: ignore[arg-type]
        failed = [t for t in tuned.trials if t.error]
        assert failed and all(math.isnan(t.value) and t.settings["lr"] == 50.0 for t in failed)
        assert tuned.settings["lr"] == 0.1
    with pytest.raises(InvalidArgument, match=r"failed under all 1 settings.*non-finite"):
        tune(experiment, {"lr": [50.0]}, search="grid")


@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
def test_a_refused_setting_is_told_and_the_search_goes_on(search: Any) -> None:
    """Whether `make` refuses it, or the parts turn out not to fit together once the model is known."""

    def experiment(*, seed: int, lr: float, rule: Any) -> atoll.Experiment:
        return replace(make()(seed=seed, lr=lr), aggregator=rule)

    grid: Any = {"lr": [-1.0, 0.4], "rule": [None, atoll.aggregators.krum(byzantine=1)]}  # there are two clients
    trials = 4 if search == "grid" else 12
    found = tune(experiment, grid, search=search, trials=trials, seed=1)
    assert len(found.trials) == trials and found.settings == {"lr": 0.4, "rule": None}
    for trial in found.trials:
        sound = trial.settings == found.settings
        assert trial.refused != sound and bool(trial.error) != sound and math.isnan(trial.value) != sound
        if not sound:
            assert ("lr=-1.0 is not allowed" in trial.error) == (trial.settings["lr"] < 0)
    reasons = {t.error for t in found.trials if t.refused}
    assert len(reasons) == 2, "each with its own"
    table = found.to_frame()
    assert set(table["error"]) == {"", *reasons}
    refused = sum(t.refused for t in found.trials)
    assert str(found).startswith(f"chosen of {trials} ({refused} refused, 0 failed): lr=0.4")


def test_a_search_ends_where_every_setting_is_refused_or_the_code_is_wrong() -> None:
    with pytest.raises(InvalidArgument, match=r"refused all 2 settings.*lr=-2 is not allowed"):
        tune(make(), {"lr": [-1, -2]}, search="grid")
    seen: list[Any] = []

    def wrong(*, seed: int, lr: float) -> atoll.Experiment:
        seen.append(lr)
        raise TypeError("a mistake of the caller's")

    with pytest.raises(TypeError, match="of the caller's"):
        tune(wrong, {"lr": [0.1, 0.2]}, search="grid")
    assert seen == [0.1]


def test_what_is_refused() -> None:
    grid: Any = {"lr": [0.1]}
    with pytest.raises(InvalidArgument, match=r"test examples that no choice has looked at.*split\(test=0\.2\)"):
        tune(make(data(test=0.0).__class__.from_arrays({"a": centred(1.0)})), grid, search="grid")
    with pytest.raises(InvalidArgument, match="metric='auc' is unknown"):
        tune(make(), grid, search="grid", metric="auc")
    with pytest.raises(InvalidArgument, match="search='bayes'"):
        tune(make(), grid, search="bayes")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="lists for a grid"):
        tune(make(), {"lr": space.uniform(0, 1)}, search="grid")
    for wrong in ({}, {"lr": []}, {"lr": "abc"}, {"lr": 0.1}):
        with pytest.raises(InvalidArgument, match="space"):
            tune(make(), wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"seeds=\[\]"):
        tune(make(), grid, seeds=())
    with pytest.raises(InvalidArgument, match="trials=0"):
        tune(make(), grid, trials=0)
    with pytest.raises(InvalidArgument, match=r"run=\['splits'\]"):
        tune(make(), grid, search="grid", splits=("test",))

    def shifting(*, seed: int, lr: float) -> atoll.Experiment:
        return make(data(test=float(seed)))(seed=seed, lr=lr)

    with pytest.raises(InvalidArgument, match=r"different test examples.*seed of their own"):
        tune(shifting, grid, search="grid", seeds=(0, 1))
    for build, said in (
        (lambda: space.log(0.0, 1.0), "low=0.0"),
        (lambda: space.uniform(1.0, 1.0), "high=1.0"),
        (lambda: space.integers(1, 2.5), "high=2.5"),  # type: ignore[arg-type]
        (lambda: space.uniform(math.nan, 1.0), "low=nan"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            build()


def test_what_a_search_would_pass_over_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"seeds=\(0, 1\)"):
        tune(make(), {"lr": [0.1], "seed": [3, 4]}, search="grid")
    private = atoll.privacy.example_level(clip=1.0, noise_multiplier=1.0)
    plan = atoll.local_sgd(0.1, batch_size=2, privacy=private)
    noisy = (atoll.transforms.clip_norm(1.0), atoll.transforms.gaussian_noise(noise_multiplier=1.0))
    for changed in ({"algorithm": atoll.fedavg(plan)}, {"transforms": noisy}):

        def experiment(*, seed: int, lr: float, changed: Any = changed) -> atoll.Experiment:
            return replace(make()(seed=seed, lr=lr), **changed)

        with pytest.raises(CompositionError, match="every trial looks at the same examples"):
            tune(experiment, {"lr": [0.1, 0.2]}, search="grid")
