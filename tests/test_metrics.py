"""Metrics against scikit-learn, brute force and values by hand; sums of parts against the sums of the whole."""

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from atoll import metrics
from atoll.errors import AtollError, InvalidArgument


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _classes(n: int, *, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = _generator(seed)
    target = torch.randint(classes, (n,), generator=generator)
    output = torch.randn(n, classes, generator=generator)
    output[torch.arange(n), target] += 1.0
    return output, target


def _binary(n: int, *, seed: int = 0, spread: float = 2.0, lift: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = _generator(seed)
    target = (torch.rand(n, generator=generator) < 0.3).long()
    return spread * torch.randn(n, generator=generator) + lift * target, target


def _numbers(n: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = _generator(seed)
    target = 3.0 + torch.randn(n, *shape, generator=generator)
    return target + 0.5 * torch.randn(n, *shape, generator=generator), target


def _sums(metric: metrics.Metric, output: Tensor, target: Tensor) -> Tensor:
    metric.check(output, target)
    sums = metric.accumulate(output, target, torch.zeros(len(output), dtype=torch.int64), 1)
    assert sums.shape == (1, metric.size)
    assert sums.dtype == torch.float64
    return sums[0]


def _value(metric: metrics.Metric, output: Tensor, target: Tensor) -> float:
    return float(metric.finish(_sums(metric, output, target)))


def _examples(metric: metrics.Metric, n: int, seed: int) -> tuple[Tensor, Tensor]:
    if metric.kind == "classes":
        return _classes(n, seed=seed)
    return _binary(n, seed=seed) if metric.kind == "scores" else _numbers(n, seed=seed)


ALL = [metrics.get(name, outputs=1 if name == "r2" else 7) for name in metrics.names()]
IDS = [metric.name for metric in ALL]


# --- every metric -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ALL, ids=IDS)
@settings(max_examples=15, deadline=None)
@given(clients=st.integers(1, 5), n=st.integers(0, 40), seed=st.integers(0, 10_000))
def test_sums_of_parts_add_up_to_the_sums_of_all(metric: metrics.Metric, clients: int, n: int, seed: int):
    output, target = _examples(metric, n, seed)
    client = torch.randint(clients, (n,), generator=_generator(seed + 1))
    whole = _sums(metric, output, target)
    rows = metric.accumulate(output, target, client, clients)
    torch.testing.assert_close(rows.sum(0), whole)
    batches = [
        metric.accumulate(output[i : i + 9], target[i : i + 9], client[i : i + 9], clients) for i in range(0, n, 9)
    ]
    torch.testing.assert_close(sum(batches, torch.zeros(clients, metric.size, dtype=torch.float64)), rows)
    for row in range(clients):
        mine = client == row
        torch.testing.assert_close(rows[row], _sums(metric, output[mine], target[mine]))
    values = metric.finish(rows)
    assert values.shape == (clients,)
    assert values.dtype == torch.float64
    for row, value in zip(rows, values, strict=True):
        assert (metric.undefined(row) is None) == (not math.isnan(float(value)))


@pytest.mark.parametrize("metric", ALL, ids=IDS)
def test_finish_works_on_every_leading_axis(metric: metrics.Metric):
    output, target = _examples(metric, 60, 3)
    rows = metric.accumulate(output, target, torch.arange(60) % 6, 6)
    values = metric.finish(rows)
    torch.testing.assert_close(metric.finish(rows.reshape(2, 3, -1)), values.reshape(2, 3), equal_nan=True)


@pytest.mark.parametrize("metric", ALL, ids=IDS)
def test_few_examples_are_defined_or_nan_with_the_reason(metric: metrics.Metric):
    output, target = _examples(metric, 30, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = _sums(metric, output[:0], target[:0])
        assert math.isnan(float(metric.finish(empty)))
        assert metric.undefined(empty) == "no examples"
        one = _sums(metric, output[:1], target[:1])
        assert (metric.undefined(one) is None) == math.isfinite(float(metric.finish(one)))


@pytest.mark.parametrize("metric", ALL, ids=IDS)
def test_a_nan_output_makes_its_client_alone_undefined(metric: metrics.Metric):
    output, target = _examples(metric, 40, 5)
    output[7] = math.nan
    rows = metric.accumulate(output, target, torch.arange(40) // 20, 2)
    values = metric.finish(rows)
    assert values.isnan().tolist() == [True, False]
    assert metric.undefined(rows[0]) == "NaN or infinite outputs"
    assert metric.undefined(rows[1]) is None


@pytest.mark.parametrize("metric", ALL, ids=IDS)
def test_metrics_satisfy_the_protocol(metric: metrics.Metric):
    assert isinstance(metric, metrics.Metric)
    assert metrics.get(metric) is metric
    assert metric.spec["name"] == metric.name  # type: ignore[attr-defined]
    assert metric.higher_is_better == (metric.name not in ("brier", "calibration_error", "mse", "rmse", "mae"))


@pytest.mark.parametrize("metric", ALL, ids=IDS)
def test_float32_outputs_are_summed_in_float64(metric: metrics.Metric):
    output, target = _examples(metric, 50, 6)
    assert _value(metric, output, target) == pytest.approx(_value(metric, output.double(), target), abs=1e-6)


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_decisions_against_scikit_learn(seed: int):
    output, target = _classes(80, seed=seed)
    chosen = output.argmax(1)
    assert _value(metrics.accuracy(), output, target) == pytest.approx(sklearn_metrics.accuracy_score(target, chosen))
    wanted = sklearn_metrics.balanced_accuracy_score(target, chosen)
    assert _value(metrics.balanced_accuracy(7), output, target) == pytest.approx(wanted)
    for k in (1, 3, 5):
        wanted = sklearn_metrics.top_k_accuracy_score(target, output, k=k, labels=range(7))
        assert _value(metrics.get(f"top{k}"), output, target) == pytest.approx(wanted)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_single_outputs_decide_by_the_threshold(shape: tuple[int, ...]):
    output, target = _binary(70)
    chosen = (output > 0).long()
    wanted = sklearn_metrics.accuracy_score(target, chosen)
    for truth in (target, target.bool(), target.float().reshape(-1, 1)):
        assert _value(metrics.accuracy(), output.reshape(shape), truth) == pytest.approx(wanted)
        assert _value(metrics.accuracy(threshold=0.5), output.sigmoid().reshape(shape), truth) == pytest.approx(wanted)
        assert _value(metrics.balanced_accuracy(1), output.reshape(shape), truth) == pytest.approx(
            sklearn_metrics.balanced_accuracy_score(target, chosen)
        )


def test_balanced_accuracy_leaves_absent_classes_out():
    output = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert _value(metrics.balanced_accuracy(3), output, torch.tensor([0, 0, 0])) == pytest.approx(2 / 3)
    assert _value(metrics.balanced_accuracy(3), output, torch.tensor([0, 1, 1])) == pytest.approx(0.75)


def test_equal_outputs_are_no_gift_to_top_k():
    output, target = torch.zeros(6, 6), torch.arange(6)
    assert _value(metrics.top_k(2), output, target) == pytest.approx(2 / 6)
    assert _value(metrics.top_k(1), output, target) == _value(metrics.accuracy(), output, target)


def test_further_axes_are_averaged_per_example():
    output, target = _classes(24, classes=4)
    deep, truth = output.reshape(6, 4, 4).transpose(1, 2), target.reshape(6, 4)
    for metric in (metrics.accuracy(), metrics.top_k(2)):
        sums = _sums(metric, deep, truth)
        assert float(sums[1]) == 6.0
        assert float(metric.finish(sums)) == pytest.approx(_value(metric, output, target))


# --- rankings ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(4, 300), seed=st.integers(0, 10_000), bins=st.sampled_from([2, 8, 64, 1024]), far=st.booleans())
def test_auc_is_within_its_bound_of_scikit_learn(n: int, seed: int, bins: int, far: bool):
    output, target = _binary(n, seed=seed, spread=30.0 if far else 2.0)
    target[0], target[1] = 0, 1
    metric = metrics.auc(bins=bins)
    sums = _sums(metric, output, target)
    bound = float(metric.bound(sums))
    assert abs(float(metric.finish(sums)) - sklearn_metrics.roc_auc_score(target, output)) <= bound + 1e-12
    precision = metrics.average_precision(bins=bins)
    truly = sklearn_metrics.average_precision_score(target, output)
    assert abs(float(precision.finish(sums)) - truly) <= float(precision.bound(sums)) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_bins_are_fine_enough(seed: int):
    output, target = _binary(4000, seed=seed)
    area, precision = metrics.auc(), metrics.average_precision()
    sums = _sums(area, output, target)
    assert float(area.bound(sums)) < 3e-3
    assert abs(float(area.finish(sums)) - sklearn_metrics.roc_auc_score(target, output)) < 2e-4
    assert abs(float(precision.finish(sums)) - sklearn_metrics.average_precision_score(target, output)) < 2e-3


@pytest.mark.parametrize("seed", range(4))
def test_scores_on_the_grid_are_exact(seed: int):
    output, target = _binary(200, seed=seed)
    output = output.round()
    assert _value(metrics.auc(), output, target) == pytest.approx(sklearn_metrics.roc_auc_score(target, output))
    wanted = sklearn_metrics.average_precision_score(target, output)
    assert _value(metrics.average_precision(), output, target) == pytest.approx(wanted)


def test_the_bounds_are_reached():
    # Three bins of every small make-up; within a bin the examples may come in any order, tied or not.
    made = [(2, 1), (0, 2), (1, 2)]
    target = torch.tensor([label for p, m in made for label in [1] * p + [0] * m])
    place = torch.tensor([float(bin) for bin, (p, m) in enumerate(made) for _ in range(p + m)])
    areas, precisions = [], []
    for ranks in itertools.product(range(3), repeat=len(target)):
        score = place + 0.1 * torch.tensor(ranks)
        areas.append(_mann_whitney(score, target))
        precisions.append(_stepwise_precision(score, target))
    for metric, values in (
        (metrics.auc(low=0.0, high=3.0, bins=3), areas),
        (metrics.average_precision(low=0.0, high=3.0, bins=3), precisions),
    ):
        sums = _sums(metric, place, target)
        worst = max(abs(value - float(metric.finish(sums))) for value in values)
        assert float(metric.bound(sums)) == pytest.approx(worst, abs=1e-6)


def _mann_whitney(score: Tensor, target: Tensor) -> float:
    gap = score[target == 1].unsqueeze(1) - score[target == 0].unsqueeze(0)
    return float(((gap > 1e-6).double() + 0.5 * (gap.abs() <= 1e-6).double()).mean())


def _stepwise_precision(score: Tensor, target: Tensor) -> float:
    chosen = score.unsqueeze(0) >= score[target == 1].unsqueeze(1) - 1e-6
    return float(((chosen & (target == 1)).sum(1) / chosen.sum(1)).mean())


def test_two_outputs_score_by_their_difference():
    output, target = _binary(100)
    pair = torch.stack([0.3 * output + 1.0, 1.3 * output + 1.0], 1).double()
    for metric in (metrics.auc(), metrics.average_precision(), metrics.brier(), metrics.calibration_error()):
        assert _value(metric, pair, target) == pytest.approx(_value(metric, output.double(), target), abs=1e-3)


@pytest.mark.parametrize("build", [metrics.auc, metrics.average_precision])
def test_probabilities_fill_the_unit_interval(build: type[metrics.Auc]):
    output, target = _binary(500)
    chance = output.sigmoid()
    metric = build(scores="probability")
    sums = _sums(metric, chance, target)
    logit = build()
    assert float(metric.finish(sums)) == pytest.approx(_value(logit, output, target), abs=5e-3)
    torch.testing.assert_close(_sums(metric, torch.stack([1 - chance, chance], 1), target), sums)
    with pytest.raises(InvalidArgument, match="scores='logit'"):
        metric.check(output, target)


def test_extremes_fall_in_the_outer_bins():
    metric = metrics.auc(bins=4)
    output = torch.tensor([-math.inf, -1e9, -16.0, 16.0, 1e9, math.inf])
    sums = _sums(metric, output, torch.tensor([0, 0, 1, 0, 1, 1]))
    assert sums.tolist() == [2, 0, 0, 1, 1, 0, 0, 2]


def test_one_class_is_undefined_with_the_reason():
    output = torch.randn(5, generator=_generator(0))
    for target in (torch.zeros(5), torch.ones(5)):
        sums = _sums(metrics.auc(), output, target)
        assert math.isnan(float(metrics.auc().finish(sums)))
        assert math.isnan(float(metrics.auc().bound(sums)))
        assert metrics.auc().undefined(sums) == "only one class among the examples"
    metric = metrics.average_precision()
    assert metric.undefined(_sums(metric, output, torch.zeros(5))) == "no positive among the examples"
    assert _value(metric, output, torch.ones(5)) == 1.0


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_brier_against_scikit_learn(seed: int):
    output, target = _binary(90, seed=seed)
    wanted = sklearn_metrics.brier_score_loss(target, output.double().sigmoid())
    assert _value(metrics.brier(), output, target) == pytest.approx(wanted)
    assert _value(metrics.brier(scores="probability"), output.double().sigmoid(), target) == pytest.approx(wanted)
    output, target = _classes(90, seed=seed)
    chances = output.double().softmax(1)
    wanted = float((chances - torch.nn.functional.one_hot(target, 7)).square().sum(1).mean())
    assert _value(metrics.brier(), output, target) == pytest.approx(wanted)
    assert _value(metrics.brier(scores="probability"), chances, target) == pytest.approx(wanted)


def _calibration(confidence: Tensor, hit: Tensor, bins: int) -> float:
    places = np.minimum((confidence.numpy() * bins).astype(int), bins - 1)
    total = 0.0
    for place in range(bins):
        mine = torch.from_numpy(places == place)
        if mine.any():
            total += abs(float(confidence[mine].mean()) - float(hit[mine].double().mean())) * int(mine.sum())
    return total / len(confidence)


@pytest.mark.parametrize("bins", [15, 40])
def test_calibration_error_against_its_definition(bins: int):
    metric = metrics.calibration_error(bins=bins)
    output, target = _binary(200)
    wanted = _calibration(output.double().sigmoid(), target, bins)
    assert _value(metric, output, target) == pytest.approx(wanted)
    assert _value(metric, output.reshape(-1, 1), target.float().reshape(-1, 1)) == pytest.approx(wanted)
    output, target = _classes(200)
    confidence, chosen = output.double().softmax(1).max(1)
    assert _value(metric, output, target) == pytest.approx(_calibration(confidence, chosen == target, bins))


def test_calibration_error_by_hand():
    metric = metrics.calibration_error(scores="probability")
    chance = torch.tensor([1.0, 1.0, 0.0, 0.5])
    assert _value(metric, chance, torch.tensor([1, 0, 0, 1])) == pytest.approx((1.0 + 0.0 + 0.5) / 4)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("seed", range(3))
def test_errors_against_scikit_learn(shape: tuple[int, ...], seed: int):
    output, target = _numbers(60, *shape, seed=seed)
    for name, wanted in (
        ("mse", sklearn_metrics.mean_squared_error(target, output)),
        ("mae", sklearn_metrics.mean_absolute_error(target, output)),
        ("rmse", math.sqrt(sklearn_metrics.mean_squared_error(target, output))),
        ("r2", sklearn_metrics.r2_score(target, output)),
    ):
        metric = metrics.get(name, outputs=math.prod(shape))
        assert _value(metric, output, target) == pytest.approx(wanted, rel=1e-5)
        if shape == (1,):
            assert _value(metric, output, target.squeeze(1)) == pytest.approx(wanted, rel=1e-5)


def test_r2_far_from_zero_keeps_its_digits_with_a_center():
    target = 1e9 + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    output = target + torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    assert _value(metrics.r2(center=1e9), output, target) == pytest.approx(0.8)
    assert metrics.r2().undefined(_sums(metrics.r2(), output, target)) == "the targets do not vary"


def test_r2_without_variance_is_undefined():
    metric = metrics.r2()
    constant = _sums(metric, torch.ones(7), torch.full((7,), 0.1))
    assert metric.undefined(constant) == "the targets do not vary"
    assert metric.undefined(_sums(metric, torch.ones(1), torch.ones(1))) == "only one example"


# --- refusals ---------------------------------------------------------------------------------------------------------


REFUSED = {
    "accuracy rows": ("accuracy", torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64), r"accuracy.*\[5\]"),
    "accuracy labels": ("accuracy", torch.zeros(2, 3), torch.tensor([0, 3]), r"3 \(1 of 2\).*0\.\.2"),
    "balanced outputs": ("balanced_accuracy", torch.zeros(2, 3), torch.tensor([0, 1]), r"outputs=3"),
    "top5 of five": ("top5", torch.zeros(2, 5), torch.tensor([0, 1]), r"more than 5 classes"),
    "auc of three": ("auc", torch.zeros(2, 3), torch.tensor([0, 1]), r"\(2, 3\).*balanced_accuracy"),
    "auc labels": ("auc", torch.zeros(2), torch.tensor([1, 2]), r"2 \(1 of 2\).*0 and 1"),
    "auc pair of floats": ("auc", torch.zeros(2, 2), torch.zeros(2), r"float32.*long"),
    "brier images": ("brier", torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64), r"\(2, 3, 4\)"),
    "mse shapes": ("mse", torch.zeros(4, 2), torch.zeros(4), r"\(4, 2\).*\[4\]"),
    "r2 outputs": ("r2", torch.zeros(4, 2), torch.zeros(4, 2), r"outputs=2"),
    "mae of decisions": ("mae", torch.zeros(4, dtype=torch.int64), torch.zeros(4), r"float dtype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_with_the_reason(case: str):
    name, output, target, message = REFUSED[case]
    with pytest.raises(AtollError, match=message):
        metrics.get(name, outputs=1).check(output, target)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: metrics.get("acuracy"), "Did you mean 'accuracy'"),
        (lambda: metrics.get("top0"), "unknown"),
        (lambda: metrics.get(3), "a name or a metric object"),
        (lambda: metrics.get("balanced_accuracy"), "number of outputs"),
        (lambda: metrics.balanced_accuracy(0), "outputs=0"),
        (lambda: metrics.top_k(0), "k=0"),
        (lambda: metrics.auc(low=1.0, high=1.0), "above low=1.0"),
        (lambda: metrics.auc(low=math.nan), "finite"),
        (lambda: metrics.auc(bins=1), "2 or more"),
        (lambda: metrics.average_precision(scores="odds"), "'logit' or 'probability'"),
        (lambda: metrics.calibration_error(bins=10), "15 or more"),
        (lambda: metrics.accuracy(threshold=math.inf), "threshold=inf"),
        (lambda: metrics.r2(outputs=True), "outputs=True"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], object], message: str):
    with pytest.raises(InvalidArgument, match=message):
        build()


# --- several metrics, many clients ------------------------------------------------------------------------------------


def test_sums_of_several_metrics_lie_side_by_side():
    output, target = _binary(50)
    client = torch.arange(50) % 4
    chosen = [metrics.get(name) for name in ("accuracy", "auc", "brier")]
    rows = metrics.evaluate_sums(chosen, output, target, client, 5)
    assert rows.shape == (5, 2 + 2048 + 2)
    for metric, sums in zip(chosen, metrics.split_sums(chosen, rows), strict=True):
        torch.testing.assert_close(sums, metric.accumulate(output, target, client, 5))
        assert metric.undefined(sums[4]) == "no examples"
    assert [sums.shape for sums in metrics.split_sums(chosen, rows.sum(0))] == [(2,), (2048,), (2,)]
    assert metrics.evaluate_sums((), output, target, client, 5).shape == (5, 0)
    with pytest.raises(InvalidArgument, match="2052 columns"):
        metrics.split_sums(chosen, rows[:, 1:])
    with pytest.raises(InvalidArgument, match="client"):
        metrics.evaluate_sums(chosen, output, target, client[1:], 5)


def test_spread_by_hand():
    values = torch.tensor([0.5, math.nan, 0.9, 0.7], dtype=torch.float64)
    weights = torch.tensor([1.0, 50.0, 1.0, 2.0])
    found = metrics.spread(values, weights)
    assert found == pytest.approx(
        {"mean": 0.7, "weighted": 0.7, "worst_decile": 0.5, "std": math.sqrt(0.08 / 3), "undefined": 1.0}
    )
    assert metrics.spread(values, weights, higher_is_better=False)["worst_decile"] == pytest.approx(0.9)
    assert metrics.spread(values, torch.tensor([3.0, 0.0, 1.0, 0.0]))["weighted"] == pytest.approx(0.6)


def test_the_worst_decile_is_a_tenth_of_the_clients():
    values = torch.randperm(35, generator=_generator(1)).double()
    assert metrics.spread(values, torch.ones(35))["worst_decile"] == 1.0
    assert metrics.spread(values, torch.ones(35), higher_is_better=False)["worst_decile"] == 33.0


def test_spread_of_nothing_is_nan():
    for values in (torch.zeros(0), torch.full((3,), math.nan)):
        found = metrics.spread(values, torch.ones_like(values))
        assert found.pop("undefined") == float(len(values))
        assert all(math.isnan(value) for value in found.values())
    one = metrics.spread(torch.tensor([2.0]), torch.tensor([0.0]))
    assert (one["mean"], one["std"], one["worst_decile"]) == (2.0, 0.0, 2.0)
    assert math.isnan(one["weighted"])


def test_spread_refuses_bad_weights():
    values = torch.ones(3)
    for weights, message in (
        (torch.ones(2), "shape"),
        (torch.tensor([1.0, -2.0, 1.0]), r"weights=-2\.0"),
        (torch.tensor([1.0, math.nan, 1.0]), "weights=nan"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            metrics.spread(values, weights)
