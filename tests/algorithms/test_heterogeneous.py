"""Methods for clients that differ: FedProx, FedNova, FedDyn, FedExP and q-FedAvg against answers worked out by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems import Scalar, parabola, points, quadratics, scalar_model, scalars, train
from registry import ENGINES, MODELS, on

import atoll
from atoll import aggregators, rate, server
from atoll.algorithms import (
    Algorithm,
    apfl,
    ditto,
    fedavg,
    feddyn,
    fedexp,
    fednova,
    fedprox,
    ifca,
    per_fedavg,
    pfedme,
    qfedavg,
)
from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.errors import DataError, InvalidArgument, NonFiniteError
from atoll.local import Plan, local_sgd
from atoll.rounds import Process

A, B, SIZES = (1.0, 2.0, 3.5), (-1.0, 0.5, 4.0), (2, 4, 6)
CURVES, CENTRES = np.array(A), np.array(B)
START, LR, NEAR = 0.75, 0.1, 1e-12
OPTIMUM = float(CURVES @ CENTRES / CURVES.sum())
COHORTS = [[0], [1, 2], [2, 0], [1]]

engines = on("loop", "rows", "single")
long_on_engines = on("rows", "loop", "single", long=True)


def shares(kind: str = "examples") -> np.ndarray:
    values = np.array(SIZES if kind == "examples" else (1, 1, 1), dtype=np.float64)
    return values / values.sum()


def full(steps: int, lr: float = LR, **options: Any) -> Plan:
    return local_sgd(lr, steps=steps, batch_size=None, **options)


def names(cohorts: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[f"c{i}" for i in members] for members in cohorts]


# --- FedProx ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["loop", "rows", "single", "auto"])
@pytest.mark.parametrize("method", [fedprox, fednova])
def test_without_a_pull_it_is_fedavg_bit_for_bit(engine: str, method: Callable[..., Algorithm]) -> None:
    kind = MODELS["batch norm, mean"]
    data, plan = kind.data((6, 2, 7)), local_sgd(0.1, epochs=2, batch_size=4, momentum=0.5)
    if method is fednova:
        # A common amount of work multiplies and divides: equal to rounding, and only for equal steps.
        plan = local_sgd(0.1, steps=3, batch_size=4, momentum=0.5)
    paths = []
    for algorithm in (fedavg(plan), method(plan, mu=0.0)):
        process = Process(kind.model(), algorithm, engine=ENGINES[engine]())
        paths.append(train(process, data, 3)[1])
    for found, expected in zip(*paths, strict=True):
        if method is fedprox:
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=NEAR)


@engines
def test_fedprox_has_a_known_iterate_and_a_known_biased_fixed_point(engine: Callable[[], Engine]) -> None:
    mu, steps, w, x = 0.7, 4, shares(), START
    solved = 1 - (1 - LR * (CURVES + mu)) ** steps
    pull = w * solved * CURVES / (CURVES + mu)
    expected = []
    for _ in range(60):
        x -= float(pull @ (x - CENTRES))
        expected.append(x)
    found = scalars(fedprox(full(steps), mu=mu), engine(), quadratics(A, B, SIZES), 60, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)
    fixed = float(pull @ CENTRES / pull.sum())
    assert abs(found[-1] - fixed) < 1e-9
    assert abs(fixed - float(w * CURVES @ CENTRES / (w @ CURVES))) > 1e-2, "the test would not see a missing bias"


@long_on_engines
def test_exact_local_solutions_of_fedprox(engine: Callable[[], Engine]) -> None:
    mu, w = 0.7, shares()
    exact = w * CURVES / (CURVES + mu)
    found = scalars(fedprox(full(40, lr=0.3), mu=mu), engine(), quadratics(A, B, SIZES), 40, start=START)
    assert found[-1] == pytest.approx(float(exact @ CENTRES / exact.sum()), abs=1e-9)


@engines
def test_the_pull_is_towards_the_received_model_not_the_current_one(engine: Callable[[], Engine]) -> None:
    x = y = START
    for _ in range(3):
        y -= LR * (A[0] * (y - B[0]) + 2.0 * (y - x))
    found = scalars(fedprox(full(3), mu=2.0), engine(), quadratics(A[:1], B[:1]), 1, start=START)
    assert found[0] == pytest.approx(y, abs=NEAR)
    assert abs(y - START) < abs(scalars(fedavg(full(3)), engine(), quadratics(A[:1], B[:1]), 1, start=START)[0] - START)


@engines
def test_slow_clients_do_a_part_of_the_work(engine: Callable[[], Engine]) -> None:
    def work(client: str, round: int) -> float:
        return {"c0": 1.0, "c1": 0.5, "c2": 0.0 if round == 0 else 0.1}[client]

    mu, x, expected = 0.3, START, []
    for t in range(4):
        steps = np.array([4, 2, 0 if t == 0 else 1])
        solved = 1 - (1 - LR * (CURVES + mu)) ** steps
        x -= float(shares() * solved * CURVES / (CURVES + mu) @ (x - CENTRES))
        expected.append(x)
    found = scalars(fedprox(full(4, work=work), mu=mu), engine(), quadratics(A, B, SIZES), 4, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


def test_shares_of_work_are_checked() -> None:
    with pytest.raises(InvalidArgument, match=r"work=0\.5 is not allowed.*callable"):
        local_sgd(LR, work=0.5)  # type: ignore[arg-type]
    plan = full(10, work=lambda client, round: 1.5)
    with pytest.raises(InvalidArgument, match=r"work=1\.5.*share in \[0, 1\] for client 'a' in round 3"):
        plan.steps_of(np.array([4]), ["a"], 2)
    for share, steps in ((0.1, 1), (0.3, 3), (0.31, 4), (1.0, 10), (0.0, 0)):
        plan = full(10, work=lambda client, round, share=share: share)
        assert plan.steps_of(np.array([4]), ["a"], 0).tolist() == [steps]


# --- FedNova ----------------------------------------------------------------------------------------------------------


def by_hand(steps: Sequence[int], rounds: int, *, momentum: float, mu: float, w: np.ndarray) -> list[float]:
    """FedNova with the paper's vectors a_i written out; the constant rate is not a part of them, as in the paper."""
    x, path = START, []
    for _ in range(rounds):
        normalised, amounts = [], []
        for i, count in enumerate(steps):
            y, v = x, 0.0
            for _ in range(count):
                v = momentum * v + A[i] * (y - B[i]) + mu * (y - x)
                y -= LR * v
            if momentum:
                amount = (count - momentum * (1 - momentum**count) / (1 - momentum)) / (1 - momentum)
            elif mu:
                amount = (1 - (1 - LR * mu) ** count) / (LR * mu)
            else:
                amount = float(count)
            amounts.append(amount)
            normalised.append((y - x) / amount if amount else 0.0)
        x += float(w @ amounts) * float(w @ normalised)
        path.append(x)
    return path


@engines
@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.8)])
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_fednova_follows_the_paper(engine: Callable[[], Engine], momentum: float, mu: float, kind: str) -> None:
    plan = local_sgd(LR, epochs=1, batch_size=2, momentum=momentum)
    found = scalars(
        fednova(plan, mu=mu), engine(), points(A, B, SIZES), 30, start=START,
        aggregator=aggregators.mean(weights=kind),
    )  # fmt: skip
    expected = by_hand((1, 2, 3), 30, momentum=momentum, mu=mu, w=shares(kind))
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
def test_the_fixed_point_of_fednova(engine: Callable[[], Engine]) -> None:
    steps, w = np.array([1, 2, 3]), shares()
    found = scalars(fednova(local_sgd(LR, epochs=1, batch_size=2)), engine(), points(A, B, SIZES), 80, start=START)
    pull = w * (1 - (1 - LR * CURVES) ** steps) / steps
    assert found[-1] == pytest.approx(float(pull @ CENTRES / pull.sum()), abs=1e-9)


@long_on_engines
def test_as_rates_go_to_zero_fednova_finds_the_optimum_and_fedavg_does_not(engine: Callable[[], Engine]) -> None:
    w, steps = shares(), np.array([1, 2, 3])
    optimum = float(w * CURVES @ CENTRES / (w @ CURVES))
    plan, data = local_sgd(0.002, epochs=1, batch_size=2), points(A, B, SIZES)
    faster = server.sgd(20.0)  # the rate is small; the server makes up for it
    found = scalars(fednova(plan, server=faster), engine(), data, 200, start=START)[-1]
    averaged = scalars(fedavg(plan, server=faster), engine(), data, 200, start=START)[-1]
    assert found == pytest.approx(optimum, abs=1e-2)
    assert averaged == pytest.approx(float(w * steps * CURVES @ CENTRES / (w * steps @ CURVES)), abs=1e-2)
    assert abs(averaged - optimum) > 0.1


@engines
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}, {"mu": 0.5}, {"momentum": 0.5, "mu": 0.5}])
def test_equal_steps_make_fednova_fedavg(engine: Callable[[], Engine], options: dict[str, float]) -> None:
    mu = options.get("mu", 0.0)
    plan = full(3, momentum=options.get("momentum", 0.0), schedule=lambda round, step: 1.0 / (1 + step))
    expected = scalars(fedprox(plan, mu=mu), engine(), quadratics(A, B, SIZES), 5, start=START)
    found = scalars(fednova(plan, mu=mu), engine(), quadratics(A, B, SIZES), 5, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
def test_clients_without_a_step_count_with_no_change(engine: Callable[[], Engine]) -> None:
    plan = full(2, work=lambda client, round: 0.0 if client == "c1" else 1.0)
    moved = [LR * a * (START - b) for a, b in zip(A, B, strict=True)]
    ends = [START - m - LR * a * (START - m - b) for m, a, b in zip(moved, A, B, strict=True)]
    w = shares()
    common = 2 * (w[0] + w[2])
    expected = START + common * (w[0] * (ends[0] - START) + w[2] * (ends[2] - START)) / 2
    found = scalars(fednova(plan), engine(), quadratics(A, B, SIZES), 1, start=START)
    assert found[0] == pytest.approx(float(expected), abs=NEAR)


# --- FedDyn -----------------------------------------------------------------------------------------------------------


def dynamic(steps: int, rounds: int, cohorts: Sequence[Sequence[int]], alpha: float, lr: float) -> list[float]:
    """FedDyn as the paper writes it, with scalars."""
    x, h, own, path = START, 0.0, np.zeros(3), []
    for t in range(rounds):
        members, ends = cohorts[t % len(cohorts)], []
        for i in members:
            y = x
            for _ in range(steps):
                y -= lr * (A[i] * (y - B[i]) - own[i] + alpha * (y - x))
            own[i] -= alpha * (y - x)
            ends.append(y)
        h -= alpha / 3 * sum(y - x for y in ends)
        x = float(np.mean(ends)) - h / alpha
        path.append(x)
    return path


@long_on_engines
@pytest.mark.parametrize(
    ("steps", "cohorts", "rounds"), [(3, [[0, 1, 2]], 80), (30, [[0, 1, 2]], 40), (3, COHORTS, 400)]
)
def test_feddyn_follows_the_paper_and_reaches_the_optimum(
    engine: Callable[[], Engine], steps: int, cohorts: list[list[int]], rounds: int
) -> None:
    algorithm = feddyn(full(steps), alpha=2.0)
    found = scalars(algorithm, engine(), quadratics(A, B, SIZES), rounds, start=START, cohorts=names(cohorts))
    np.testing.assert_allclose(found[:20], dynamic(steps, 20, cohorts, 2.0, LR), rtol=0, atol=1e-11)
    assert found[-1] == pytest.approx(OPTIMUM, abs=1e-4)


@long_on_engines
def test_the_terms_of_feddyn_end_as_the_gradients_at_the_optimum(engine: Callable[[], Engine]) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), feddyn(full(10), alpha=2.0), engine=engine())
    state, path = train(process, data, 100)
    rows = state.memory.rows(list(data.clients), torch.zeros(1, dtype=torch.float64))[:, 0]
    np.testing.assert_allclose(rows, CURVES * (OPTIMUM - CENTRES), rtol=0, atol=1e-8)
    assert float(state.algorithm.term) == pytest.approx(float(rows.mean()), abs=1e-12), "h is the mean of the terms"
    assert float(path[-1]) == pytest.approx(OPTIMUM, abs=1e-8)


@engines
def test_weights_of_the_aggregator_do_not_turn_feddyn(engine: Callable[[], Engine]) -> None:
    paths = [
        scalars(
            feddyn(full(3), alpha=1.0), engine(), quadratics(A, B, SIZES), 5, start=START,
            aggregator=aggregators.mean(weights=kind),
        )
        for kind in ("examples", "uniform")
    ]  # fmt: skip
    assert paths[0] == paths[1]


# --- FedExP -----------------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_fedexp_takes_the_papers_step(engine: Callable[[], Engine], average: bool, kind: str) -> None:
    w, x, before, expected, etas = shares(kind), START, START, [], []
    for _ in range(12):
        moved = -(1 - (1 - LR * CURVES) ** 2) * (x - CENTRES)
        mean = float(w @ moved)
        etas.append(max(1.0, float(w @ moved**2) / (2 * (mean**2 + 0.01))))
        before, x = x, x + etas[-1] * mean
        expected.append((x + before) / 2 if average else x)
    assert max(etas) > 1.5, "the step would be that of fedavg"
    found = scalars(
        fedexp(full(2), epsilon=0.01, average=average), engine(), quadratics(A, B, SIZES), 12, start=START,
        aggregator=aggregators.mean(weights=kind),
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@engines
def test_clients_that_agree_make_fedexp_fedavg(engine: Callable[[], Engine]) -> None:
    data = quadratics((2.0,) * 3, (1.5,) * 3)
    found = scalars(fedexp(full(2), average=False), engine(), data, 5, start=START)
    assert found == scalars(fedavg(full(2)), engine(), data, 5, start=START)


# --- q-FedAvg ---------------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_q_of_nought_is_fedavg(engine: Callable[[], Engine], kind: str) -> None:
    options = {"start": START, "aggregator": aggregators.mean(weights=kind)}
    for lipschitz in (None, 3.0):  # without fairness the constant cancels
        found = scalars(
            qfedavg(full(3), q=0.0, lipschitz=lipschitz), engine(), quadratics(A, B, SIZES), 5, **options
        )  # fmt: skip
        expected = scalars(fedavg(full(3)), engine(), quadratics(A, B, SIZES), 5, **options)
        np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
@pytest.mark.parametrize("q", [0.5, 2.0])
def test_qfedavg_follows_the_paper(engine: Callable[[], Engine], q: float) -> None:
    w, x, expected, constant = shares(), START, [], 1 / LR
    # The examples of a client lie around b: the mean of their squared distances adds to the loss.
    spread = np.array([np.mean((np.arange(1, n // 2 + 1) / 4) ** 2) for n in SIZES])
    for _ in range(8):
        losses = CURVES / 2 * ((x - CENTRES) ** 2 + spread)
        d = constant * (1 - (1 - LR * CURVES) ** 3) * (x - CENTRES)
        h = q * losses ** (q - 1) * d**2 + constant * losses**q
        x -= float(w @ (losses**q * d)) / float(w @ h)
        expected.append(x)
    found = scalars(qfedavg(full(3), q=q), engine(), quadratics(A, B, SIZES), 8, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@engines
def test_qfedavg_with_one_step_ends_where_the_fair_objective_is_least(engine: Callable[[], Engine]) -> None:
    x = scalars(qfedavg(full(1), q=1.0), engine(), points(A, B, SIZES), 60, start=START)[-1]
    losses = CURVES / 2 * (x - CENTRES) ** 2
    assert float(shares() @ (losses * CURVES * (x - CENTRES))) == pytest.approx(0.0, abs=1e-6)


@long_on_engines
def test_fairness_makes_losses_more_equal(engine: Callable[[], Engine]) -> None:
    def spread(q: float) -> float:
        x = scalars(qfedavg(full(1), q=q), engine(), quadratics(A, B), 200, start=START)[-1]
        return float(np.std(CURVES / 2 * (x - CENTRES) ** 2))

    assert spread(5.0) < spread(1.0) < spread(0.0)


@engines
def test_losses_of_nought_and_below(engine: Callable[[], Engine]) -> None:
    data = points((1.0,), (START,), (2,))
    assert scalars(qfedavg(full(1), q=0.5), engine(), data, 1, start=START) == [START]
    with pytest.raises(DataError, match=r"mean loss of client 'c0' is -.*q=2.*at least 0"):
        scalars(qfedavg(full(1), q=2.0), engine(), points((-1.0,), (0.0,), (2,)), 1, start=START)


def scaled(factor: float, start: float, dtype: torch.dtype) -> tuple[atoll.Model, FederatedDataset]:
    """The quadratics with all losses times a factor."""
    module = Scalar(start).to(dtype)
    data = quadratics(tuple(factor * a for a in A), B, SIZES)
    clients = {c: (torch.zeros(n, 1, dtype=dtype), data.train.client(i)["y"].to(dtype)) for i, (c, n) in
               enumerate(zip(data.clients, SIZES, strict=True))}  # fmt: skip
    return atoll.Model(module, parabola), FederatedDataset.from_arrays(clients)


@engines
@pytest.mark.parametrize("q", [5.0, 15.0])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 4e3])
def test_high_powers_of_small_and_large_losses(engine: Callable[[], Engine], factor: float, q: float) -> None:
    """In single precision; a factor of all losses changes nothing but that a first round may only measure."""
    lr = LR / factor
    model, data = scaled(factor, START, torch.float32)
    found = [float(v) for v in train(Process(model, qfedavg(full(1, lr), q=q), engine=engine()), data, 12)[1]]
    expected = scalars(qfedavg(full(1), q=q), engine(), quadratics(A, B, SIZES), 12, start=START)
    late = int(found[0] == START)
    assert not (late and factor == 1.0)
    np.testing.assert_allclose(found[late:], expected[: 12 - late], rtol=2e-5, atol=2e-5)
    assert abs(expected[-1] - START) > 0.1


def test_powers_that_leave_the_range_have_an_error_of_their_own() -> None:
    model, data = scaled(1.0, START, torch.float32)
    process = Process(model, qfedavg(full(1), q=400.0), engine="loop")
    state, _ = process.next(process.init(), data)
    with pytest.raises(NonFiniteError, match=r"round 2: losses raised to the power q=400 .* float32 .*Lower q"):
        process.next(state, data)


# --- numbers of NumPy -------------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[Callable[..., Algorithm], dict[str, float]]] = {
    "fedprox": (fedprox, {"mu": 0.5}),
    "fednova": (fednova, {"mu": 0.5}),
    "feddyn": (feddyn, {"alpha": 0.5}),
    "fedexp": (fedexp, {"epsilon": 0.5}),
    "qfedavg": (qfedavg, {"q": 2, "lipschitz": 4}),
    "ditto": (ditto, {"lam": 1}),
    "apfl": (apfl, {"alpha": 0.5}),
    "pfedme": (pfedme, {"lam": 1, "eta": 0.25, "inner": 2}),
    "per_fedavg": (per_fedavg, {"alpha": 0.5}),
    "ifca": (ifca, {"clusters": 2, "spread": 0.5}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_taken(name: str) -> None:
    build, given = NUMBERS[name]
    wide = {n: np.int64(v) if isinstance(v, int) else np.float32(v) for n, v in given.items()}
    found = [build(full(2), **numbers) for numbers in (given, wide)]
    assert found[0].spec == found[1].spec
    for engine in ("loop", "rows"):
        a, b = (scalars(f, ENGINES[engine](), quadratics(A, B, SIZES), 3, start=START) for f in found)
        assert a == pytest.approx(b, rel=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: fedprox(full(1), mu=-0.1), r"mu=-0\.1 .* finite number of at least 0"),
        (lambda: fedprox(full(1), mu=float("nan")), "mu=nan"),
        (lambda: fedprox(full(1), mu=20.0), r"mu=20\.0 .* below 2 \(1 \+ momentum\) / lr = 20.*Lower lr, or mu"),
        (lambda: fedprox(full(1, weight_decay=6.0), mu=15.0), r"mu=15\.0 .* / lr - weight_decay = 14"),
        (lambda: fednova(full(1, optimizer="adam")), r"optimizer='adam' .*\"sgd\" under fednova.*server\.adam"),
        (lambda: fednova(full(1), mu=True), "mu=True"),
        (lambda: fednova(full(1, clip=1.0), mu=0.1), r"clip=1\.0 .*fednova with a pull.*use mu=0"),
        (lambda: feddyn(full(1, clip=1.0), alpha=0.1), r"feddyn needs plain sgd.*clip=1\.0"),
        (lambda: feddyn(full(1), alpha=0.0), r"alpha=0\.0 .* above 0"),
        (lambda: feddyn(full(1), alpha=25.0), r"alpha=25\.0 .* overshoot"),
        (lambda: feddyn(full(1, momentum=0.9), alpha=0.1), r"feddyn needs plain sgd.*momentum=0\.9.*without these"),
        (lambda: feddyn(full(1, optimizer="adam"), alpha=0.1), r"optimizer='adam'"),
        (lambda: feddyn(full(1, weight_decay=0.1), alpha=0.1), r"weight_decay=0\.1.*Put weight decay into the loss"),
        (lambda: fedexp(full(1), epsilon=0.0), r"epsilon=0\.0 .* above 0"),
        (lambda: qfedavg(full(1), q=-1), "q=-1"),
        (lambda: qfedavg(full(1), q=1.0, lipschitz=0.0), r"lipschitz=0\.0"),
        (lambda: qfedavg(full(1, momentum=0.5), q=1.0), r"qfedavg needs plain sgd.*L = 1 / lr"),
        (lambda: qfedavg(full(1, schedule=rate.cosine(5)), q=1.0), r"schedule .*give lipschitz="),
    ],
)
def test_what_would_be_wrong_is_refused(build: Callable[[], Algorithm], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build()
