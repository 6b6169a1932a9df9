"""Noise on the sum: its law, what one client can move, who is told what, and what is refused by name."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import quadratics, scalar_model, silent, wide
from scipy import stats
from torch import Tensor, nn

import atoll
from atoll import aggregators, privacy, sampling, transforms
from atoll.errors import BudgetSpent, CompositionError, InvalidArgument
from atoll.messages import Scaled
from atoll.privacy.noise import deviation
from atoll.rounds import Process
from atoll.transforms import clip_norm, ef21, error_feedback, gaussian_noise, quantize, rand_k, rotate, top_k
from atoll.vectors import lengths

MEAN = aggregators.mean(weights="uniform", denominator="expected")


def process(*stages: Any, **options: Any) -> Process:
    given: dict[str, Any] = {"aggregator": MEAN, "engine": "loop"} | options
    model = given.pop("model", None) or scalar_model()
    algorithm = given.pop("algorithm", None) or atoll.fedavg(atoll.local_sgd(1.0, steps=1, batch_size=None))
    return Process(model, algorithm, transforms=stages or (clip_norm(1.0), gaussian_noise(1.0)), **given)


def capture(sums: list[Tensor]) -> Any:
    """A release without noise that keeps what it is shown."""

    def release(total: Tensor, bound: float) -> Tensor:
        sums.append(total.clone())
        return total

    return release


# --- the sum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_rows_that_are_scaled_as_they_are_added_up_give_the_sum_of_clipped_rows(
    kind: torch.dtype, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(30, 40, generator=draw, dtype=kind) * torch.logspace(-2, 1, 30)[:, None]
    parts = {f"c{i}": (x[3 * i : 3 * i + 3 - i % 2], torch.arange(3 - i % 2)) for i in range(10)}
    data, model = atoll.FederatedDataset.from_arrays(parts), atoll.Model(nn.Linear(40, 10).to(kind), "cross_entropy")
    mean = aggregators.mean(weights=weights, denominator="expected", **({} if weights == "uniform" else {"clip": 3}))
    sums = list[Tensor]()
    algorithm = atoll.scaffold(atoll.local_sgd(0.3, steps=2, batch_size=None))  # which has a summed part
    for stages in ((clip_norm(0.1), clip_norm(0.08), gaussian_noise(1.0)),) * 2:
        run = process(*stages, model=model, algorithm=algorithm, aggregator=mean, engine="auto")
        run.next(run.init(), data, expected=10.0, release=capture(sums))
        monkeypatch.setattr("atoll.transforms.chain.Chain.scaled", lambda chain, sizes: None)
    assert float(sums[0].norm()) > 0.05
    tolerance = 1e-12 if kind == torch.float64 else 1e-6
    torch.testing.assert_close(*sums, rtol=tolerance, atol=tolerance * 0.08)


@pytest.mark.parametrize("broken", ["loss", "row"])
def test_a_client_that_breaks_adds_nothing_to_the_sum_of_scaled_rows(broken: str) -> None:
    base = atoll.fedavg(atoll.local_sgd(1.0, steps=1, batch_size=None))

    def local(message: Any, memory: Any, cohort: Any) -> Any:
        update, memory = base.local(message, memory, cohort)
        at = torch.tensor([[c == "c1"] for c in cohort.clients])
        if broken == "loss":
            return update.replace(metrics=torch.where(at, torch.nan, update.metrics)), memory
        return update.replace(mean=torch.where(at, torch.nan, update.mean)), memory

    sums, data = list[Tensor](), quadratics((1.0, 1.0, 1.0), (0.5, 7.0, -0.2))
    run = process(algorithm=replace(base, local=local), engine="auto")
    run.next(run.init(), data, expected=3.0, release=capture(sums))
    run = process(engine="auto")
    run.next(run.init(), data, [c for c in data.clients if c != "c1"], expected=3.0, release=capture(sums))
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=1e-12)


def test_rows_to_be_scaled_are_no_longer_than_the_bound_when_they_are_sent() -> None:
    rows = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 200)[:, None]
    run = process(clip_norm(0.7), gaussian_noise(1.0))
    factor = run.chain.scaled(lengths(rows))
    assert factor is not None
    sent = Scaled(rows, factor).rows
    assert float(sent.double().norm(dim=1).max()) <= 0.7
    assert torch.equal(sent[:20], rows[:20]) and float(sent[-1].double().norm()) > 0.69999


# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 7])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_noise_that_is_applied_is_normal_with_the_stated_deviation(clients: int, seed: int | None) -> None:
    size, multiplier, clip, expected = 40_000, 1.7, 0.3, 4.0
    run = process(clip_norm(clip), gaussian_noise(multiplier, seed=seed), model=wide(size))
    state, _ = run.next(run.init(), silent(size, clients), expected=expected)
    noise = (run.vector(state) * expected).numpy()
    std = multiplier * clip
    assert deviation(multiplier, clip, size) == pytest.approx(std, rel=2e-5)
    assert stats.kstest(noise, "norm", args=(0.0, std)).pvalue > 1e-6
    assert abs(noise.std() / std - 1) < 6 / math.sqrt(2 * size)
    half = size // 2
    assert abs(stats.pearsonr(noise[:half], noise[half:]).statistic) < 6 / math.sqrt(half), "no coordinate is another's"


def test_noise_is_new_in_every_round_and_every_run() -> None:
    run, found = process(model=wide(100)), list[Tensor]()
    for _ in range(2):
        state = run.init()
        for _ in range(2):
            before = run.vector(state)
            state, _ = run.next(state, silent(100, 2))
            found.append(run.vector(state) - before)
    assert len({f.numpy().tobytes() for f in found}) == 4
    seeded = process(clip_norm(1.0), gaussian_noise(1.0, seed=3), model=wide(100))
    ends = [seeded.vector(seeded.next(seeded.init(), silent(100, 2))[0]) for _ in range(2)]
    assert torch.equal(*ends)


def test_every_released_sum_is_a_point_of_a_public_grid() -> None:
    from atoll.secret import grid

    kept: list[Tensor] = []
    result = atoll.simulate(
        wide(50), silent(50, 3), rounds=1, algorithm=atoll.fedavg(atoll.local_sgd(0.1)), aggregator=MEAN,
        transforms=(clip_norm(1.0), gaussian_noise(1.0)), progress=False,
        callbacks=(lambda record: kept.append(torch.tensor(record.epsilon)),),
    )  # fmt: skip
    spacing = grid(deviation(1.0, 1.0, 50))
    points = result.vector * 3 / spacing
    assert float((points - points.round()).abs().max()) < 1e-3 and kept


def test_noise_tends_to_the_clipped_mean_as_it_vanishes() -> None:
    data = quadratics((1.0, 1.0, 1.0, 1.0), (0.2, -0.1, 30.0, -50.0))
    run = process(clip_norm(1.0), gaussian_noise(1e-4))
    state, _ = run.next(run.init(), data)
    assert float(run.vector(state)) == pytest.approx((0.2 - 0.1 + 1.0 - 1.0) / 4, abs=1e-3)
    state, _ = run.next(run.init(), data, ["c0", "c2"], expected=8.0)
    assert float(run.vector(state)) == pytest.approx((0.2 + 1.0) / 8, abs=1e-3)


@pytest.mark.parametrize("before", [(rotate(),), (rand_k(0.5),), ()])
def test_stages_before_and_after_the_noise_are_undone(before: tuple[Any, ...]) -> None:
    model = atoll.Model(nn.Linear(6, 4, bias=False).double(), "mse")
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 8, 6, generator=draw).double(), torch.randn(3, 8, 4, generator=draw).double()
    data = atoll.FederatedDataset.from_arrays({f"c{i}": (x[i], y[i]) for i in range(3)})
    front = (clip_norm(0.5), *before, gaussian_noise(1e-4))
    back = (clip_norm(0.5), gaussian_noise(1e-4), *before)
    noisy, other = process(*front, model=model), process(*back, model=model)
    plain = process(*front[:-1], model=model)
    behind = other.next(other.init(), data, release=capture([]))
    pairs = [(noisy.next(noisy.init(), data), plain.next(plain.init(), data)), (other.next(other.init(), data), behind)]
    for (found, _), (expected, _) in pairs:
        torch.testing.assert_close(noisy.vector(found), noisy.vector(expected), rtol=0, atol=1e-3)


# --- what one client can move -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([1e300, -1e300, 1e150])), min_size=1, max_size=4),
    st.sampled_from([0.1, 1.0, 7.0]),
)  # fmt: skip
def test_adding_or_removing_a_client_moves_the_sum_by_at_most_the_clip_norm(centres: list[float], clip: float) -> None:
    others = [0.3, -2.0, 1e6]
    data = quadratics((1.0,) * (3 + len(centres)), [*others, *centres])
    run = process(clip_norm(clip), gaussian_noise(1.0))
    names, sums = list(data.clients), list[Tensor]()
    for cohort in (names, *([n for n in names if n != gone] for gone in names)):
        run.next(run.init(), data, cohort, expected=3.0, release=capture(sums))
    for without in sums[1:]:
        assert bool(torch.isfinite(without).all())
        assert float((sums[0] - without).norm()) <= clip * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipped_rows_are_not_longer_than_the_norm_in_any_precision(dtype: torch.dtype) -> None:
    rows = (torch.randn(200, 999, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    clipped = clip_norm(1.0).encode(rows, {}, None, None)[0]  # type: ignore[arg-type]
    norms = torch.linalg.vector_norm(clipped.double(), dim=1)  # type: ignore[union-attr]
    assert float(norms.max()) <= 1.0 + 1e-15 and float(norms.min()) > 0.98


def test_weights_count_up_to_their_cap() -> None:
    data = quadratics((1.0, 1.0), (1.0, 1.0), sizes=(4, 400))
    capped = aggregators.mean(weights="examples", clip=8.0, denominator="expected")
    run, sums = process(clip_norm(1.0), gaussian_noise(1.0), aggregator=capped), list[Tensor]()
    for cohort in (["c0"], ["c1"], ["c0", "c1"]):
        run.next(run.init(), data, cohort, expected=2.0, release=capture(sums))
    assert [float(s) for s in sums] == pytest.approx([0.5, 1.0, 1.5])


def test_a_weight_that_an_algorithm_makes_up_counts_one_at_most() -> None:
    base = atoll.fedavg(atoll.local_sgd(1.0, steps=1, batch_size=None))

    def local(message: Any, memory: Any, cohort: Any) -> Any:
        update, memory = base.local(message, memory, cohort)
        return update.replace(weight=torch.full_like(update.weight, 1e6)), memory

    capped = aggregators.mean(weights="examples", clip=8.0, denominator="expected")
    run, sums = process(algorithm=replace(base, local=local), aggregator=capped), list[Tensor]()
    run.next(run.init(), quadratics((1.0,), (5.0,)), expected=1.0, release=capture(sums))
    assert float(sums[0]) == pytest.approx(1.0)


def test_everything_a_client_sends_is_clipped_and_noised_together() -> None:
    run, sums = process(algorithm=atoll.scaffold(atoll.local_sgd(0.1, steps=1, batch_size=None))), list[Tensor]()
    state, _ = run.next(run.init(), quadratics((2.0,), (1e5,)), release=capture(sums))
    assert sums[0].shape == (2,) and float(sums[0].norm()) == pytest.approx(1.0)
    assert float(run.vector(state)) == pytest.approx(float(sums[0][0]))
    assert float(state.algorithm.variate) == pytest.approx(float(sums[0][1]))


def test_a_client_whose_training_breaks_adds_nothing_and_keeps_what_it_had() -> None:
    data = quadratics((1.0, 1e300), (0.5, 1e300))
    plan = atoll.local_sgd(0.1, steps=1, batch_size=None)
    for engine in ("loop", "vectorized"):
        run, sums = process(algorithm=atoll.scaffold(plan), engine=engine), list[Tensor]()
        state, told = run.next(run.init(), data, release=capture(sums))
        assert bool(torch.isfinite(sums[0]).all())
        assert "c0" in state.memory and "c1" not in state.memory
        assert told["refused"] == {} and told["refusals"] == 0.0, "nobody is told"


# --- what is told -----------------------------------------------------------------------------------------------------


def test_what_is_told_of_a_round_does_not_depend_on_who_took_part() -> None:
    data = quadratics((1.0, 2.0, 3.0), (0.2, 5.0, -1.0), sizes=(2, 8, 20))
    run = process()
    told = [
        run.next(run.init(), data, cohort, expected=1.5, release=capture([]))[1]
        for cohort in ([], ["c0"], ["c1"], ["c0", "c1", "c2"])
    ]
    for other in told[1:]:
        assert str(other) == str(told[0])
    assert math.isnan(told[0]["loss"]) and told[0]["clients"] == 2.0


def test_the_same_sum_gives_the_same_model_whatever_the_cohort() -> None:
    run = process()
    fixed = torch.tensor([0.7], dtype=torch.float64)
    data = quadratics((1.0, 2.0, 3.0), (0.2, 5.0, -1.0), sizes=(2, 8, 20))
    ends = {
        float(run.vector(run.next(run.init(), data, c, expected=2.0, release=lambda total, bound: fixed)[0]))
        for c in ([], ["c0"], ["c0", "c1", "c2"])
    }
    assert ends == {0.35}


def test_an_empty_cohort_releases_noise() -> None:
    run, shown = process(clip_norm(1.0), rotate(), gaussian_noise(1.0), model=wide(64)), list[Tensor]()
    data = silent(64, 3)
    state, _ = run.next(run.init(), data, [], expected=1.0, release=capture(shown))
    assert shown[0].shape == (64,) and not bool(shown[0].any()) and state.round == 1
    state, told = run.next(run.init(), data, [], expected=1.0)
    assert bool((run.vector(state) != 0).all()) and told["epsilon"] > 0


def test_round_by_round_every_round_counts_for_everybody() -> None:
    run = process(clip_norm(1.0), gaussian_noise(3.0, delta=1e-4))
    data, state = quadratics((1.0, 2.0), (0.2, 5.0)), None
    state = run.init()
    for steps in (1, 2, 3):
        state, told = run.next(state, data)
        expected = privacy.epsilon(noise_multiplier=3.0, steps=steps, delta=1e-4, sampling="none")
        assert told["epsilon"] == pytest.approx(expected)
    with pytest.raises(InvalidArgument, match=r"expected=None.*expected cohort size in a run with noise"):
        run.next(state, data, ["c0"])


def test_a_budget_ends_the_rounds_before_it_is_exceeded() -> None:
    budget = privacy.epsilon(noise_multiplier=3.0, steps=2, delta=1e-4, sampling="none")
    run = process(clip_norm(1.0), gaussian_noise(3.0, delta=1e-4, budget=budget))
    state, data = run.init(), quadratics((1.0, 2.0), (0.2, 5.0))
    for _ in range(2):
        state, _ = run.next(state, data)
    with pytest.raises(BudgetSpent, match="budget is spent: 2 releases"):
        run.next(state, data)


# --- what is refused --------------------------------------------------------------------------------------------------


def batch_norm(rule: Any) -> atoll.Model:
    return atoll.Model(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "cross_entropy", buffers=rule)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transforms": (gaussian_noise(1.0),)}, r"gaussian_noise needs clipped rows before it.*clip_norm\(1.0\)"),
        ({"transforms": (gaussian_noise(1.0), clip_norm(1.0))}, r"gaussian_noise needs clipped rows before it"),
        (
            {"transforms": (clip_norm(1.0), gaussian_noise(1.0), gaussian_noise(1.0))},
            r"noised twice and counted once",
        ),
        (
            {"transforms": (clip_norm(1.0), gaussian_noise(1.0), error_feedback(top_k(0.5)))},
            r"error_feedback cannot stand in one pipeline with gaussian_noise.*later rounds.*rand_k",
        ),
        ({"transforms": (clip_norm(1.0), error_feedback(top_k(0.5)), gaussian_noise(1.0))}, r"error_feedback"),
        ({"transforms": (clip_norm(1.0), gaussian_noise(1.0), ef21(top_k(0.5)))}, r"ef21"),
        (
            {"transforms": (clip_norm(1.0), gaussian_noise(1.0), quantize(8))},
            r"quantize cannot stand in one pipeline with gaussian_noise.*undone on each row",
        ),
        ({"transforms": (clip_norm(1.0), top_k(0.5), gaussian_noise(1.0))}, r"top_k"),
        (
            {"aggregator": aggregators.mean()},
            r'weights that are not clipped.*weights="uniform", denominator="expected"',
        ),
        ({"aggregator": aggregators.mean(weights="uniform")}, r'divides by what came.*denominator="expected"'),
        ({"aggregator": aggregators.mean(weights="examples", clip=5)}, r"divides by what came"),
        ({"aggregator": aggregators.median()}, r"aggregator median: noise protects a sum"),
        ({"aggregator": aggregators.krum(byzantine=1)}, r"aggregator krum: noise protects a sum"),
        ({"channel": transforms.secure_sum(clip=1.0)}, r'channel secure_sum.*Use channel="plain"'),
        ({"model": batch_norm("mean")}, r"running statistics of BatchNorm.*GroupNorm"),
        ({"algorithm": atoll.pooled(atoll.local_sgd(0.1))}, r"pooled, which puts all their examples in one place"),
        ({"algorithm": atoll.fedexp(atoll.local_sgd(0.1))}, r"fedexp sends numbers of other units"),
        ({"algorithm": atoll.fednova(atoll.local_sgd(0.1))}, r"fednova sends numbers of other units"),
        ({"algorithm": atoll.ifca(atoll.local_sgd(0.1), clusters=2)}, r"ifca sends numbers of other units"),
    ],
)
def test_what_noise_cannot_protect_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {
        "model": batch_norm("local"),
        "algorithm": atoll.fedavg(atoll.local_sgd(0.1)),
        "transforms": (clip_norm(1.0), gaussian_noise(1.0)),
        "aggregator": MEAN,
    } | options
    with pytest.raises(CompositionError, match=said):
        Process(given.pop("model"), given.pop("algorithm"), **given)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, r"noise_multiplier= or epsilon=, and not both"),
        ({"noise_multiplier": 1.0, "epsilon": 3.0}, r"and not both"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier=0.0"),
        ({"epsilon": -1.0}, r"epsilon=-1.0"),
        ({"epsilon": 1.0, "budget": 2.0}, r"budget=2.0.*left out with epsilon"),
        ({"noise_multiplier": 1.0, "budget": 0.0}, r"budget=0.0"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, r"delta=1.0"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, r"accountant='moments'"),
        ({"noise_multiplier": 1.0, "seed": 1.5}, r"seed=1.5"),
    ],
)
def test_arguments_outside_their_range(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        gaussian_noise(**wrong)


def test_an_epsilon_cannot_calibrate_itself_round_by_round() -> None:
    run = process(clip_norm(1.0), gaussian_noise(epsilon=3.0))
    with pytest.raises(CompositionError, match=r"gaussian_noise\(epsilon=3\).*privacy\.calibrate.*atoll\.simulate"):
        run.next(run.init(), quadratics((1.0,), (2.0,)))


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan, True])
def test_caps_outside_their_range(cap: Any) -> None:
    with pytest.raises(InvalidArgument, match="clip="):
        aggregators.mean(weights="examples", clip=cap)
    with pytest.raises(InvalidArgument, match=r"clip=1.0.*left out"):
        aggregators.mean(weights="uniform", clip=1.0)


def test_a_sampler_of_one_s_own_must_say_how_it_is_counted() -> None:
    own = replace(sampling.fixed(2), spec={"name": "mine"}, chance=None)
    given: Any = {
        "algorithm": atoll.fedavg(atoll.local_sgd(0.1)), "rounds": 2, "aggregator": MEAN, "progress": False,
        "transforms": (clip_norm(1.0), gaussian_noise(1.0)),
    }  # fmt: skip
    data = quadratics((1.0,) * 4, (0.0,) * 4)
    with pytest.raises(InvalidArgument, match=r"cohort='mine'.*poisson\(rate\).*chance="):
        atoll.simulate(scalar_model(), data, cohort=own, **given)
    known = replace(own, chance=lambda population: ("none", 1.0))
    result = atoll.simulate(scalar_model(), data, cohort=known, **given)
    assert result.privacy[0]["events"][0]["sampling"] == "none"
