"""Noise of each client alone: its law, how far apart two clipped rows are, what it costs, and what leaves a client."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from problems import quadratics, scalar_model
from scipy import stats
from torch import Tensor

import atoll
from atoll import aggregators, attacks
from atoll.errors import CompositionError, InvalidArgument, NonFiniteError
from atoll.privacy.client_noise import decide, laplace_scale
from atoll.privacy.noise import deviation
from atoll.rounds import Process
from atoll.secret import Source, grid
from atoll.transforms import Transform, clip_norm, grouped, local_noise, plain, quantize, secure_sum, skellam, top_k
from atoll.transforms.base import Keys
from atoll.transforms.chain import compose, keys_of

LAWS = ("gaussian", "laplace")
laws = pytest.mark.parametrize("law", LAWS)
UNIFORM = aggregators.mean(weights="uniform")


def keys(count: int, round: int = 0, seed: int = 0) -> Keys:
    return keys_of(seed, round, np.arange(count, dtype=np.uint64), 1)


def encoded(stage: Transform, rows: Tensor, **options: int) -> Tensor:
    return compose((stage,), plain()).encode(rows, {}, (None,), keys(len(rows), **options))[0]  # type: ignore[return-value]


def process(*stages: Transform, **options: Any) -> Process:
    given: dict[str, Any] = {"aggregator": UNIFORM, "engine": "loop"} | options
    algorithm = given.pop("algorithm", None) or atoll.fedavg(atoll.local_sgd(1.0, steps=1, batch_size=None))
    return Process(scalar_model(), algorithm, transforms=stages, **given)


# --- the noise --------------------------------------------------------------------------------------------------------


@laws
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_noise_that_is_applied_has_the_stated_law(law: Any, seed: int | None, dtype: torch.dtype) -> None:
    size, multiplier, clip = 30_000, 1.7, 0.3
    noise = encoded(local_noise(multiplier, clip=clip, mechanism=law, seed=seed), torch.zeros(2, size, dtype=dtype))
    assert noise.dtype == dtype
    std = multiplier * clip
    exact = stats.norm(0, std) if law == "gaussian" else stats.laplace(0, std / math.sqrt(2))
    for row in noise.double().numpy():
        assert stats.kstest(row, exact.cdf).pvalue > 1e-6
        assert abs(row.std() / std - 1) < 12 / math.sqrt(2 * size)
    assert abs(stats.pearsonr(*noise.double().numpy()).statistic) < 6 / math.sqrt(size), (
        "no client's noise is another's"
    )


def test_noise_is_new_for_every_client_round_and_run() -> None:
    nought = torch.zeros(3, 20)
    for seed, runs in ((None, 2), (5, 1)):
        drawn = [
            row
            for round, run in itertools.product(range(2), range(runs))
            for row in encoded(local_noise(1.0, clip=1.0, seed=seed), nought, round=round, seed=run)
        ]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    again = [encoded(local_noise(1.0, clip=1.0, seed=5), nought) for _ in range(2)]
    assert torch.equal(*again)


@laws
def test_as_it_vanishes_the_mean_of_the_clipped_rows_is_left(law: Any) -> None:
    run = process(local_noise(1e-4, clip=1.0, mechanism=law))
    state, _ = run.next(run.init(), quadratics((1.0, 1.0, 1.0, 1.0), (0.2, -0.1, 30.0, -50.0)))
    assert float(run.vector(state)) == pytest.approx((0.2 - 0.1 + 1.0 - 1.0) / 4, abs=1e-3)


# --- what it hides ----------------------------------------------------------------------------------------------------


@laws
def test_any_two_rows_are_at_most_as_far_apart_as_the_noise_is_sized_for(
    law: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adversarial pairs, rounded to the grid that the noise lies on, before noise is added."""
    seen: list[tuple[Tensor, float]] = []

    def capture(self: Source, values: Tensor, size: float, *, within: float = math.inf) -> Tensor:
        seen.append((values.clamp(-within, within).div(grid(size)).round() * grid(size), size))
        return values

    monkeypatch.setattr(Source, "add_normal" if law == "gaussian" else "add_laplace", capture)
    length, clip, multiplier = 500, 0.7, 3.0
    draw = torch.Generator().manual_seed(0)
    corner = torch.eye(length)[0]
    rows = [
        1e6 * corner, -1e6 * corner, torch.zeros(length), torch.ones(length), -torch.ones(length), 1e-3 * corner,
        torch.full((length,), 1e30), torch.full((length,), torch.nan), torch.full((length,), torch.inf),
        *(3 * torch.randn(20, length, generator=draw)),
    ]  # fmt: skip
    encoded(local_noise(multiplier, clip=clip, mechanism=law), torch.stack(rows))
    order, sizes = (2 if law == "gaussian" else 1), {size for _, size in seen}
    assert len(seen) == len(rows) and len(sizes) == 1, "one size of noise whatever the data"
    apart = [
        float(torch.linalg.vector_norm(a - b, order)) for (a, _), (b, _) in itertools.combinations(seen, 2)
    ]  # fmt: skip
    assert 1.999 * clip < max(apart)
    if law == "gaussian":
        assert max(apart) <= 2 * sizes.pop() / multiplier
    else:
        assert max(apart) / sizes.pop() <= 2 * math.sqrt(2) / multiplier


def test_noise_is_larger_by_what_rounding_to_the_grid_adds() -> None:
    """The worst two rows of length d are 2 c apart, and d g (in L1) or sqrt(d) g (in L2) more once they are rounded."""
    length, clip = 50_000_000, 0.01
    for multiplier in (0.5, 5.0, 40.0):
        std, scale = deviation(multiplier, clip, length), laplace_scale(multiplier, clip, length)
        assert (2 * clip + math.sqrt(length) * grid(std)) / std <= 2 / multiplier
        assert (2 * clip + length * grid(scale)) / scale <= 2 * math.sqrt(2) / multiplier
    assert laplace_scale(2.0, clip, 1000) == pytest.approx(2.0 * clip / math.sqrt(2), rel=1e-5)
    with pytest.raises(InvalidArgument, match=r"50,000,000 numbers would have to hide more rounding"):
        laplace_scale(400.0, clip, length)


# --- what it costs ----------------------------------------------------------------------------------------------------


def spent(stage: Transform, count: int) -> float:
    assert stage.client_noise is not None
    return decide(stage.client_noise, 10, 10, population=100, rounds=9, releases=9).spent(count)


@pytest.mark.parametrize(("multiplier", "count"), [(2.0, 1), (6.0, 4), (20.0, 30)])
def test_epsilons_are_those_of_dp_accounting(multiplier: float, count: int) -> None:
    own = spent(local_noise(multiplier, clip=0.3, delta=1e-4), count)
    one = privacy_loss_distribution.from_gaussian_mechanism(multiplier, sensitivity=2.0)
    assert own == pytest.approx(one.self_compose(count).get_epsilon_for_delta(1e-4), rel=2e-3)
    own = spent(local_noise(multiplier, clip=0.3, mechanism="laplace"), count)
    one = privacy_loss_distribution.from_laplace_mechanism(multiplier / math.sqrt(2), sensitivity=2.0)
    assert own == pytest.approx(count * one.get_epsilon_for_delta(0.0), rel=1e-3), "basic composition"


@laws
def test_a_multiplier_for_an_epsilon_is_the_least_that_will_do(law: Any) -> None:
    stage = local_noise(clip=1.0, epsilon=4.0, mechanism=law)
    assert stage.client_noise is not None
    terms = decide(stage.client_noise, 10, 10, population=100, rounds=6, releases=6)
    assert 3.99 <= terms.spent(6) <= 4.0 and terms.budget == 4.0 and terms.most == 6
    if law == "laplace":
        assert terms.noise_multiplier == pytest.approx(6 * 2 * math.sqrt(2) / 4, rel=2e-3) and terms.delta == 0


# --- what leaves a client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["plain", "secure_sum"])
@pytest.mark.parametrize("engine", ["loop", "vectorized"])
def test_nothing_leaves_a_client_beside_its_noised_row(channel: str, engine: str) -> None:
    """Numbers of examples, losses, weights, and whether training broke."""
    told: list[str] = []
    for sizes, (curve, centre) in (((2, 4, 6), (3.0, 1.0)), ((8, 2, 2), (1.0, -7.0)), ((2, 4, 20), (1e300, 1e300))):
        run = process(
            local_noise(1.0, clip=1.0), algorithm=atoll.scaffold(atoll.local_sgd(0.1, steps=1, batch_size=None)),
            channel=plain() if channel == "plain" else secure_sum(clip=9.0), engine=engine,
        )  # fmt: skip
        data = quadratics((1.0, 2.0, curve), (0.2, 5.0, centre), sizes=sizes)
        run.engine.prepare(run, data)
        state = run.init()
        task = run.open(state, data.clients, 3)
        for cohort, remembered in run.engine.tiles(run, task, data, state.memory):
            report = run.work(task, cohort, remembered)
            assert bool(report.finite.all()) and not bool(report.metrics.any()) and bool((report.weight == 1).all())
        state, metrics = run.next(run.init(), data)
        told.append(str({n: v for n, v in metrics.items() if n not in ("summed", "saturated")}))
        assert math.isnan(metrics["loss"]) and math.isnan(metrics["examples"]) and metrics["clients"] == 3.0
        assert math.isfinite(float(run.vector(state)))
        kept = state.memory.rows(["c2"], torch.full((1,), 9.0, dtype=torch.float64))
        assert bool(torch.isfinite(kept).all()), "a client whose training broke keeps what it had"
    assert len(set(told)) == 1


@pytest.mark.parametrize("broken", [False, True])
def test_a_client_that_is_called_server_is_protected_like_others(broken: bool) -> None:
    """Without data of the server's own the name is anybody's."""
    far = 1e300 if broken else 3.0
    data = quadratics((1.0, 2.0, far), (1.0, 2.0, far), names=("a", "b", "server"))
    run = process(local_noise(1.0, clip=1.0))
    run.engine.prepare(run, data)
    state = run.init()
    task = run.open(state, data.clients, 3)
    for cohort, remembered in run.engine.tiles(run, task, data, state.memory):
        report = run.work(task, cohort, remembered)
        assert bool(report.finite.all()) and not bool(report.metrics.any()) and bool((report.weight == 1).all())
    run.next(state, data)


def test_the_servers_own_broken_training_is_told_as_ever() -> None:
    run = process(
        local_noise(1.0, clip=1.0), aggregator=aggregators.fltrust(root="server"),
        server_data=(torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 2), 1e300, dtype=torch.float64)),
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="training on server_data became non-finite"):
        run.next(run.init(), quadratics((1.0, 1.0, 1.0), (1.0, 2.0, 3.0)))


@pytest.mark.parametrize(
    "rule",
    [
        aggregators.median(), aggregators.krum(byzantine=1), aggregators.geometric_median(),
        attacks.apply(aggregators.median(), attacks.sign_flip(), fraction=0.2),
    ],
    ids=lambda rule: rule.name,
)  # fmt: skip
def test_rules_and_stages_that_follow_are_free(rule: Any) -> None:
    data = quadratics((1.0,) * 6, (0.5,) * 6)
    run = process(clip_norm(2.0), local_noise(1e-4, clip=1.0), quantize(8), aggregator=rule)
    state, _ = run.next(run.init(), data)
    assert float(run.vector(state)) == pytest.approx(0.5, abs=0.01)


def test_a_rule_over_groups_under_a_secure_sum() -> None:
    channel = grouped(secure_sum(clip=1.0), aggregators.median(), size=3)
    run = process(local_noise(1e-4, clip=1.0), channel=channel)
    state, _ = run.next(run.init(), quadratics((1.0,) * 9, (0.5,) * 9))
    assert float(run.vector(state)) == pytest.approx(0.5, abs=0.01)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "noise_multiplier= or epsilon="), ({"noise_multiplier": 1.0, "epsilon": 1.0}, "and not both"),
        ({"noise_multiplier": 0.0}, "^noise_multiplier=0.0"),
        ({"noise_multiplier": 1.0, "clip": -1.0}, "^clip=-1.0.* above 0.$"),
        ({"noise_multiplier": 1.0, "mechanism": "uniform"}, "^mechanism='uniform'"),
        ({"noise_multiplier": 1.0, "mechanism": "laplace", "delta": 1e-5}, "^delta=1e-05.*holds at delta 0"),
        ({"epsilon": 1.0, "budget": 1.0}, "^budget=1.0"), ({"noise_multiplier": 1.0, "seed": 1.5}, "^seed=1.5"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "^delta=1.0"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        local_noise(**({"clip": 1.0} | options))


def test_what_it_does_not_protect_is_refused_by_name() -> None:
    own = local_noise(1.0, clip=1.0)
    for stages, options, said in (
        ((own,), {"aggregator": aggregators.mean()}, "local_noise cannot stand before the aggregator mean with wei"),
        ((top_k(0.1), own), {}, "local_noise cannot stand after top_k: .*Put top_k after local_noise"),
        ((own, own), {}, "local_noise cannot stand in one pipeline with local_noise"),
        ((own, skellam(clip=1.0, noise_multiplier=1.0, survivors=3, clients=3)), {"channel": secure_sum(clip=1.0)},
         "skellam cannot stand in one pipeline with local_noise"),
        ((own,), {"algorithm": atoll.algorithms.pooled(atoll.local_sgd(0.1))}, "cannot protect clients under pooled"),
    ):  # fmt: skip
        with pytest.raises(CompositionError, match=said):
            process(*stages, **options)
    run = process(local_noise(clip=1.0, epsilon=1.0))
    with pytest.raises(CompositionError, match=r"local_noise\(epsilon=1\) cannot calibrate itself here"):
        run.next(run.init(), quadratics((1.0,), (1.0,)))
