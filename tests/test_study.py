import json
import math

import pytest
import torch
from torch import nn

import atoll
from atoll.errors import InvalidArgument, RunError
from atoll.study import Study, interval, study, t_quantile


def made(values, *, better=1, overlap=0.0, seeds=3):
    """A study of one metric with values arm -> client -> one for each seed."""
    clients = tuple(next(iter(values.values())))
    every = {arm: {"accuracy": {c: tuple(v) for c, v in of.items()}} for arm, of in values.items()}
    return Study(
        tuple(values), clients, ("accuracy",), tuple(range(seeds)), every, {"accuracy": better}, 0.95, overlap, {}
    )


# Two-sided 95 % and 99 % points from printed tables of Student's t.
@pytest.mark.parametrize(
    ("freedom", "at95", "at99"),
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (9, 2.262, 3.250),
        (30, 2.042, 2.750),
    ],
)
def test_quantiles_are_those_of_printed_tables(freedom, at95, at99):
    assert t_quantile(0.975, freedom) == pytest.approx(at95, abs=5e-4)
    assert t_quantile(0.995, freedom) == pytest.approx(at99, abs=5e-4)
    assert t_quantile(0.025, freedom) == pytest.approx(-at95, abs=5e-4)


def test_quantiles_known_in_closed_form():
    assert t_quantile(0.75, 1) == pytest.approx(1.0, rel=1e-12)  # Cauchy: tan(pi / 4)
    assert t_quantile(0.9, 2) == pytest.approx(0.8 * math.sqrt(2 / (1 - 0.64)), rel=1e-12)
    assert t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-12)
    assert t_quantile(0.975, 100_000) == pytest.approx(1.95998, abs=1e-4)  # nearly normal
    with pytest.raises(InvalidArgument, match="probability=1"):
        t_quantile(1, 3)
    with pytest.raises(InvalidArgument, match="freedom=0"):
        t_quantile(0.5, 0)


def test_an_interval_worked_out_by_hand():
    # Mean 2, standard deviation 1, t(2) = 4.302653: half width 4.302653 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    # With a third of the examples in the test, sqrt(1/3 + 1/2).
    assert interval([1.0, 2.0, 3.0], overlap=0.5) == pytest.approx((2.0, 2 - 3.927767, 2 + 3.927767), abs=1e-6)
    assert interval([5.0, 5.0]) == (5.0, 5.0, 5.0)


def test_undefined_values_are_left_out_of_an_interval():
    assert interval([1.0, math.nan, 2.0, 3.0]) == interval([1.0, 2.0, 3.0])
    mean, low, high = interval([1.0, math.nan])
    assert mean == 1.0 and math.isnan(low) and math.isnan(high)
    assert all(math.isnan(v) for v in interval([math.nan]))


def test_differences_are_paired():
    found = made({"b": {"x": (0.5, 0.6, 0.9)}, "a": {"x": (0.6, 0.7, 1.0)}})
    # The arms vary by 0.2, but their difference is 0.1 in every seed.
    assert found.difference("a", "b", "accuracy", "x") == pytest.approx((0.1, 0.1, 0.1))
    assert found.interval("a", "accuracy", "x").low < 0.5


def test_the_mean_over_clients_pairs_clients_too():
    nan = math.nan
    found = made({"b": {"x": (0.5,), "y": (nan,)}, "a": {"x": (0.6,), "y": (0.9,)}}, seeds=1)
    assert found.over_seeds("a", "accuracy") == pytest.approx((0.75,))
    # y has no baseline, so that only x tells what changed.
    assert found.difference("a", "b", "accuracy").mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("values", "better", "kind", "words"),
    [
        ((0.60, 0.61, 0.62), 1, "better", "a is better than b: accuracy +0.110"),
        ((0.60, 0.61, 0.62), -1, "worse", "a is worse than b: accuracy +0.110"),
        ((0.40, 0.39, 0.41), 1, "worse", "a is worse than b: accuracy −0.100"),
        ((0.40, 0.60, 0.52), 1, "open", "a brought nothing over b that can be told from chance: accuracy +0.007"),
        ((math.nan,) * 3, 1, "open", "accuracy is undefined there"),
        ((0.9, math.nan, math.nan), 1, "open", "accuracy +0.400, from too few runs to tell it from chance"),
    ],
)
def test_words_claim_no_more_than_the_interval(values, better, kind, words):
    found = made({"b": {"x": (0.5, 0.5, 0.5)}, "a": {"x": values}}, better=better)
    verdict = found.verdicts("a", "b")[0]
    assert verdict.kind == kind
    assert verdict.text.startswith("x: ")
    assert words in verdict.text


def test_overlapping_cuts_widen_what_chance_can_do():
    values = {"b": {"x": (0.5, 0.5, 0.5)}, "a": {"x": (0.54, 0.55, 0.58)}}
    assert made(values).verdicts("a", "b")[0].kind == "better"
    assert made(values, overlap=0.5).verdicts("a", "b")[0].kind == "open"
    assert "Nadeau" in " ".join(made(values, overlap=0.5).cautions())
    assert "share one division" in " ".join(made(values).cautions())
    assert "One seed" in made({"a": {"x": (0.5,)}}, seeds=1).cautions()[0]


def test_a_mixed_verdict_says_both():
    found = made({"b": {"x": (0.5, 0.5, 0.5)}, "a": {"x": (0.6, 0.61, 0.62)}})
    values = {arm: {**of, "brier": of["accuracy"]} for arm, of in found.values.items()}
    both = Study(
        found.arms,
        found.clients,
        ("accuracy", "brier"),
        found.seeds,
        values,
        {"accuracy": 1, "brier": -1},
        0.95,
        0.0,
        {},
    )
    verdict = both.verdicts("a", "b")[0]
    assert verdict.kind == "mixed"
    assert "better than b: accuracy" in verdict.text and "worse than b: brier" in verdict.text


def test_names_are_checked():
    found = made({"a": {"x": (0.5, 0.5, 0.5)}})
    for call, match in (
        (lambda: found.interval("z", "accuracy"), "arm='z' is unknown"),
        (lambda: found.interval("a", "auc"), "metric='auc' is unknown"),
        (lambda: found.interval("a", "accuracy", "y"), "client='y' is unknown"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            call()


def test_a_study_survives_a_file(tmp_path):
    found = made({"a": {"x": (0.5, math.nan, 0.7)}})
    again = Study.load(found.save(tmp_path / "deep" / "study.json"))
    assert repr(again) == repr(found)  # nan is not equal to itself, but reads the same
    assert json.loads((tmp_path / "deep" / "study.json").read_text())["values"]["a"]["accuracy"]["x"] == [
        0.5,
        None,
        0.7,
    ]
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(RunError, match="is not a study"):
        Study.load(tmp_path / "x.json")


def make(*, seed, method="federated", cut=None, test=0.25):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    y = (x[:, 0] > 0).long()
    cut = seed if cut is None else cut
    data = atoll.FederatedDataset.from_arrays({"p": (x, y), "q": (x, 1 - y)}, test=test, seed=cut)
    model = atoll.Model(nn.Linear(2, 1), loss="binary_cross_entropy", metrics=("accuracy",))
    algorithm = {"federated": atoll.fedavg, "alone": atoll.local_only, "pooled": atoll.pooled}[method]
    return atoll.Experiment(
        model=model, data=data, algorithm=algorithm(atoll.local_sgd(lr=0.5)), rounds=3, initial=model.init(seed)
    )


def test_running_a_study():
    seen = []
    arms = {"federated": {}, "alone": {"method": "alone"}, "pooled": {"method": "pooled"}}
    found = study(make, arms, [3, 4], on_run=lambda arm, seed, result: seen.append((arm, seed, len(result.history))))
    assert seen == [(arm, seed, 3) for seed in (3, 4) for arm in arms]
    assert found.clients == ("p", "q")
    assert found.metrics == ("loss", "accuracy")
    assert found.better == {"loss": -1, "accuracy": 1}
    assert found.overlap == pytest.approx(1 / 3)
    # The clients' labels contradict each other: alone is far better, and its personal models are what counts.
    assert min(found.over_seeds("alone", "accuracy", "p")) > 0.8
    assert found.interval("federated", "accuracy").mean < 0.7
    alone = make(seed=4, method="alone").simulate(progress=False)
    assert found.values["alone"]["accuracy"]["q"][1] == alone.clients["personal"]["q"]["accuracy"]
    assert len(found.to_frame()) == 3 * 2 * 2 * 2


def test_one_cut_for_all_seeds_needs_no_widening():
    assert study(make, {"a": {"cut": 1}}, [0, 1]).overlap == 0.0


def test_bad_studies_are_refused():
    for call, match in (
        (lambda: study(make, {}, [0]), "arms"),
        (lambda: study(make, {"a": {}}, []), "seeds"),
        (lambda: study(make, {"a": {}}, [1, 1]), "seeds"),
        (lambda: study(make, {"a": {}}, [1], confidence=95), "confidence=95"),
        (lambda: study(make, {"a": {"test": None}}, [1]), "no test examples"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            call()
