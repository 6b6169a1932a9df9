"""Algorithms against answers worked out by hand on scalar quadratics, on every engine."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from problems import points, quadratics, scalar_model, scalars, train
from registry import ALGORITHMS, ENGINES, MODELS, Method, on

import atoll
from atoll import aggregators, server
from atoll.algorithms import cyclic as passed_around
from atoll.algorithms import fedavg, fedsgd, local_only, pooled, scaffold
from atoll.engines import Engine
from atoll.local import Plan, local_sgd
from atoll.rounds import Process

A, B, SIZES = (1.0, 2.0, 3.5), (-1.0, 0.5, 4.0), (2, 4, 6)
START, LR = 0.75, 0.1
NEAR = 1e-12

engines = on("loop", "rows", "single")
"""One engine of each kind; widths and choices of engine are compared elsewhere."""


def weights(kind: str) -> np.ndarray:
    values = np.array(SIZES if kind == "examples" else (1, 1, 1), dtype=np.float64)
    return values / values.sum()


def full(steps: int, lr: float = LR) -> Plan:
    return local_sgd(lr, steps=steps, batch_size=None)


# --- federated averaging ----------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_one_local_step_is_gradient_descent(engine: Callable[[], Engine], kind: str) -> None:
    a, b, w, x = np.array(A), np.array(B), weights(kind), START
    expected = []
    for _ in range(8):
        x -= LR * float(w @ (a * (x - b)))
        expected.append(x)
    found = scalars(
        fedavg(full(1)), engine(), quadratics(A, B, SIZES), 8, start=START, aggregator=aggregators.mean(weights=kind)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
@pytest.mark.parametrize("steps", [3, 5])
def test_many_local_steps_have_a_known_iterate_and_a_known_bias(engine: Callable[[], Engine], steps: int) -> None:
    a, b, w = np.array(A), np.array(B), weights("examples")
    q, x = (1 - LR * a) ** steps, START
    expected = []
    for _ in range(25):
        x = float(w @ (b + q * (x - b)))
        expected.append(x)
    found = scalars(fedavg(full(steps)), engine(), quadratics(A, B, SIZES), 25, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)
    biased = float(w * (1 - q) @ b / (w @ (1 - q)))
    assert abs(found[-1] - biased) < 1e-8
    assert abs(biased - float(w * a @ b / (w @ a))) > 1e-2, "the test would not see a missing bias"


@engines
def test_partial_cohorts_average_over_those_that_took_part(engine: Callable[[], Engine]) -> None:
    a, b, n = np.array(A), np.array(B), np.array(SIZES, dtype=np.float64)
    cohorts = [["c0"], ["c2", "c1"], [], ["c1"]]
    q, x, expected = (1 - LR * a) ** 3, START, []
    for i in range(12):
        members = [int(c[1]) for c in cohorts[i % 4]]
        if members:
            w = n[members] / n[members].sum()
            x = float(w @ (b[members] + q[members] * (x - b[members])))
        expected.append(x)
    found = scalars(fedavg(full(3)), engine(), quadratics(A, B, SIZES), 12, start=START, cohorts=cohorts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
def test_an_expected_denominator_does_not_depend_on_who_came(engine: Callable[[], Engine]) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(
        scalar_model(START), fedavg(full(1)), engine=engine(),
        aggregator=aggregators.mean(weights="uniform", denominator="expected"),
    )  # fmt: skip
    state, _ = process.next(process.init(), data, ["c0", "c2"], expected=2.5)
    moved = -LR * (A[0] * (START - B[0]) + A[2] * (START - B[2]))
    assert float(process.vector(state)) == pytest.approx(START + moved / 2.5, abs=NEAR)


@engines
def test_server_optimisers_run_on_the_mean_update(engine: Callable[[], Engine], rounds: int = 10) -> None:
    a, b, w = np.array(A), np.array(B), weights("examples")
    x, m, v, tau, expected = START, 0.0, 0.01**2, 0.01, []
    for _ in range(rounds):
        d = float(w @ (-LR * a * (x - b)))
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d
        x += 0.05 * m / (v**0.5 + tau)
        expected.append(x)
    plan = fedavg(full(1), server=server.adam(0.05, betas=(0.9, 0.99), tau=0.01))
    found = scalars(plan, engine(), quadratics(A, B, SIZES), rounds, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
def test_a_schedule_by_round_and_step_multiplies_the_rate(engine: Callable[[], Engine]) -> None:
    def schedule(round: int, step: np.ndarray) -> np.ndarray:
        return (1.0 + round) / (2.0 + step)

    x, expected = START, []
    for t in range(4):
        y = x
        for k in range(5):
            y -= 0.2 * (1 + t) / (2 + k) * A[0] * (y - B[0])
        x = y
        expected.append(x)
    plan = local_sgd(0.2, steps=5, batch_size=None, schedule=schedule)
    found = scalars(fedavg(plan), engine(), quadratics(A[:1], B[:1]), 4, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
def test_two_batches_of_one_pass_in_the_order_of_the_data(engine: Callable[[], Engine]) -> None:
    # Examples lie at b + 1/4 and b - 1/4; batches of one, unshuffled, alternate between them.
    x, expected = START, []
    for _ in range(3):
        for _ in range(2):
            for centre in (B[1] + 0.25, B[1] - 0.25):
                x -= LR * A[1] * (x - centre)
        expected.append(x)
    plan = local_sgd(LR, epochs=2, batch_size=1, shuffle=False)
    found = scalars(fedavg(plan), engine(), quadratics(A[1:2], B[1:2]), 3, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


# --- SCAFFOLD ---------------------------------------------------------------------------------------------------------


def by_hand(
    option: int, steps: int, rounds: int, cohorts: Sequence[Sequence[int]], *, lr: float, w: np.ndarray
) -> list[float]:
    """SCAFFOLD as the paper writes it, with scalars."""
    x, c, own, path = START, 0.0, np.zeros(len(A)), []
    for t in range(rounds):
        members = cohorts[t % len(cohorts)]
        moved, total, change = 0.0, 0.0, 0.0
        for i in members:
            y = x
            for _ in range(steps):
                y -= lr * (A[i] * (y - B[i]) - own[i] + c)
            renewed = A[i] * (x - B[i]) if option == 1 else own[i] - c + (x - y) / (steps * lr)
            moved, total = moved + w[i] * (y - x), total + w[i]
            change += renewed - own[i]
            own[i] = renewed
        x, c = x + moved / total, c + change / len(A)
        path.append(x)
    return path


COHORTS: dict[str, list[list[int]]] = {"everybody": [[0, 1, 2]], "partial": [[0], [1, 2], [2, 0], [1]]}


@engines
@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize(
    ("who", "kind", "rounds"),
    [("everybody", "examples", 40), ("everybody", "uniform", 30), ("partial", "examples", 64)],
)
def test_scaffold_follows_the_paper_and_reaches_the_optimum(
    engine: Callable[[], Engine], option: int, who: str, kind: str, rounds: int
) -> None:
    names = [[f"c{i}" for i in members] for members in COHORTS[who]]
    expected = by_hand(option, 2, rounds, COHORTS[who], lr=0.2, w=weights(kind) * 3)
    found = scalars(
        scaffold(full(2, 0.2), option=option), engine(), quadratics(A, B, SIZES), rounds,
        start=START, cohorts=names, aggregator=aggregators.mean(weights=kind),
    )  # fmt: skip
    np.testing.assert_allclose(found[:20], expected[:20], rtol=0, atol=NEAR)
    assert max(abs(x - y) for x, y in zip(found, [START, *found], strict=False)) > 0.1, "the path would say nothing"
    optimum = float(np.dot(A, B) / np.sum(A))
    assert abs(found[-1] - optimum) < 1e-9


@engines
@pytest.mark.parametrize("option", [1, 2])
def test_variates_end_as_the_gradients_at_the_optimum(engine: Callable[[], Engine], option: int) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), scaffold(full(2, 0.2), option=option), engine=engine())
    state, _ = train(process, data, 40)
    optimum = np.dot(A, B) / np.sum(A)
    rows = state.memory.rows(list(data.clients), torch.zeros(1, dtype=torch.float64))[:, 0]
    np.testing.assert_allclose(rows, np.array(A) * (optimum - np.array(B)), rtol=0, atol=1e-9)
    assert abs(float(state.algorithm.variate)) < 1e-9
    assert float(state.algorithm.variate) == pytest.approx(float(rows.mean()), abs=1e-12)


@engines
def test_option_two_divides_by_the_rates_that_ran(engine: Callable[[], Engine]) -> None:
    def halving(round: int, step: np.ndarray) -> np.ndarray:
        return 0.5 ** np.asarray(step)

    plan = local_sgd(0.1, steps=3, batch_size=None, schedule=halving)
    process = Process(scalar_model(START), scaffold(plan), engine=engine())
    state, path = train(process, quadratics(A[:1], B[:1]), 1)
    variate = (START - float(path[0])) / (0.1 + 0.05 + 0.025)
    assert float(state.algorithm.variate) == pytest.approx(variate, abs=NEAR)


@engines
@pytest.mark.parametrize("option", [1, 2])
def test_a_round_at_rate_zero_leaves_model_and_option_two_variates(engine: Callable[[], Engine], option: int) -> None:
    def off(round: int, step: np.ndarray) -> np.ndarray:
        return np.zeros_like(step, dtype=np.float64) if round == 1 else np.ones_like(step, dtype=np.float64)

    data = quadratics(A, B, SIZES)
    plan = local_sgd(0.05, steps=2, batch_size=None, schedule=off)
    process = Process(scalar_model(START), scaffold(plan, option=option), engine=engine())
    zero = torch.zeros(1, dtype=torch.float64)
    first, path = train(process, data, 1)
    before = first.memory.rows(list(data.clients), zero).clone()
    second, _ = process.next(first, data)
    assert torch.equal(process.vector(second), path[0])
    if option == 2:
        # Steps of length zero say nothing about the gradient, exactly as no steps do.
        torch.testing.assert_close(second.memory.rows(list(data.clients), zero), before, rtol=0, atol=NEAR)
        torch.testing.assert_close(second.algorithm.variate, first.algorithm.variate, rtol=0, atol=NEAR)


@engines
def test_option_two_counts_steps_not_passes_or_batches(engine: Callable[[], Engine]) -> None:
    """Two passes of one, two and three batches: K is their product, for each client its own."""
    plan = local_sgd(0.05, epochs=2, batch_size=2)
    data = points(A, B, SIZES)
    process = Process(scalar_model(START), scaffold(plan), engine=engine())
    state, _ = train(process, data, 1)
    rows = state.memory.rows(list(data.clients), torch.zeros(1, dtype=torch.float64))[:, 0]
    a, b, steps = np.array(A), np.array(B), np.array([2, 4, 6])
    ends = b + (1 - 0.05 * a) ** steps * (START - b)
    np.testing.assert_allclose(rows, (START - ends) / (steps * 0.05), rtol=0, atol=NEAR)
    assert float(state.algorithm.variate) == pytest.approx(float(rows.mean()), abs=NEAR)


@pytest.mark.parametrize("name", ["batch norm, mean", "frozen body"])
@pytest.mark.parametrize("option", [1, 2])
def test_variates_belong_to_trained_parameters_and_begin_at_nought(name: str, option: int) -> None:
    """Neither running statistics nor frozen layers have one."""
    kind = MODELS[name]
    process = Process(kind.model(), scaffold(local_sgd(0.05, steps=2, batch_size=None), option=option))
    state = process.init()
    assert process.memory_layout(process.vector(state)).shapes == ((kind.model().size,),)
    assert state.algorithm.variate.shape == (kind.model().size,) and not state.algorithm.variate.any()
    state, _ = process.next(state, kind.data((4, 6)))
    trained = state.memory.rows(["c0", "c1"], torch.zeros(kind.model().size, dtype=torch.float64))
    torch.testing.assert_close(state.algorithm.variate, trained.mean(dim=0), rtol=0, atol=NEAR)


@engines
def test_the_variate_moves_by_the_population_not_the_cohort(engine: Callable[[], Engine]) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), scaffold(full(1)), engine=engine())
    state, _ = train(process, data, 1, [["c1"]])
    assert float(state.algorithm.variate) == pytest.approx(A[1] * (START - B[1]) / 3, abs=NEAR)


# --- server optimisers under their names ------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_named_server_optimisers_take_the_papers_steps(engine: Callable[[], Engine], name: str) -> None:
    """The mean update is weighted once, is added and not subtracted, and no bias is corrected."""
    a, b, w = np.array(A), np.array(B), weights("examples")
    x, m, v, tau, lr, expected = START, 0.0, 1e-3**2, 1e-3, 0.05, []
    for _ in range(6):
        d = float(w @ (((1 - LR * a) ** 2 - 1) * (x - b)))
        square = d * d
        if name == "fedavgm":
            m = 0.9 * m + d
            x += lr * m
        else:
            m = d if name == "fedadagrad" else 0.9 * m + 0.1 * d
            v = {
                "fedadagrad": v + square,
                "fedyogi": v - 0.01 * square * np.sign(v - square),
                "fedadam": 0.99 * v + 0.01 * square,
            }[name]
            x += lr * m / (np.sqrt(v) + tau)
        expected.append(x)
    found = scalars(getattr(atoll, name)(full(2), lr=lr), engine(), quadratics(A, B, SIZES), 6, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


# --- baselines --------------------------------------------------------------------------------------------------------


@engines
def test_local_only_goes_alone(engine: Callable[[], Engine]) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), local_only(full(3)), engine=engine())
    state, path = train(process, data, 4)
    a, b = np.array(A), np.array(B)
    found = process.personal(state, data, list(data.clients)).rows[:, 0]
    np.testing.assert_allclose(found, b + (1 - LR * a) ** 12 * (START - b), rtol=0, atol=NEAR)
    assert float(path[-1]) == START


@engines
def test_cyclic_passes_the_model_on_as_it_is(engine: Callable[[], Engine]) -> None:
    x, expected = START, []
    for t in range(6):
        i = t % 3
        x = B[i] + (1 - LR * A[i]) ** 2 * (x - B[i])
        expected.append(x)
    data = quadratics(A, B, SIZES)
    algorithm = passed_around(full(2))
    assert algorithm.sampler is not None
    cohorts = [algorithm.sampler.cohort(0, t, data.clients) for t in range(6)]
    found = scalars(algorithm, engine(), data, 6, start=START, cohorts=cohorts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@engines
def test_pooled_is_gradient_descent_on_all_examples(engine: Callable[[], Engine]) -> None:
    w, x, expected = weights("examples"), START, []
    for _ in range(5):
        x -= LR * float(w @ (np.array(A) * (x - np.array(B))))
        expected.append(x)
    found = scalars(pooled(full(1)), engine(), quadratics(A, B, SIZES).pooled(), 5, start=START)
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


# --- degenerate cases, for every algorithm ----------------------------------------------------------------------------

whole = {n: m for n, m in ALGORITHMS.items() if not m.norms and not m.private}
methods = pytest.mark.parametrize("method", whole.values(), ids=whole.keys())
both = pytest.mark.parametrize("engine", [ENGINES["loop"], ENGINES["rows"]], ids=["loop", "rows"])


@both
@methods
def test_one_step_on_everybody_is_gradient_descent(engine: Callable[[], Engine], method: Method) -> None:
    if not method.averages or method.build(method.plan(LR)).sampler is not None or method.build(method.plan(LR)).pooled:
        pytest.skip("says of itself that it does something else")
    x, expected = START, []
    for _ in range(5):
        x -= LR * float(np.mean(np.array(A) * (x - np.array(B))))
        expected.append(x)
    found = scalars(
        method.build(method.plan(LR, steps=1, batch_size=None)), engine(), quadratics(A, B, SIZES), 5,
        start=START, aggregator=aggregators.mean(weights="uniform"),
    )  # fmt: skip
    np.testing.assert_allclose(found[:1], expected[:1], rtol=0, atol=NEAR)
    if not method.optimum:
        np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)


@both
@methods
def test_identical_clients_behave_like_one(engine: Callable[[], Engine], method: Method) -> None:
    plan = method.plan(LR, steps=3, batch_size=None)
    many = scalars(method.build(plan), engine(), quadratics((2.0,) * 4, (1.5,) * 4), 5, start=START)
    one = scalars(method.build(plan), engine(), quadratics((2.0,), (1.5,)), 5, start=START)
    np.testing.assert_allclose(many, one, rtol=0, atol=NEAR)


@both
@methods
def test_the_order_of_clients_does_not_matter(engine: Callable[[], Engine], method: Method) -> None:
    plan = method.plan(LR, epochs=2, batch_size=2) if not method.whole else method.plan(LR)
    forward = quadratics(A, B, SIZES, names=("a", "b", "c"))
    backward = quadratics(A[::-1], B[::-1], SIZES[::-1], names=("c", "b", "a"))
    cohorts = [["a", "b", "c"], ["b", "c"]]
    turned = [list(reversed(c)) for c in cohorts]
    found = scalars(method.build(plan), engine(), forward, 4, start=START, cohorts=cohorts)
    again = scalars(method.build(plan), engine(), backward, 4, start=START, cohorts=turned)
    np.testing.assert_allclose(found, again, rtol=0, atol=NEAR)


@both
@methods
def test_no_local_steps_change_nothing(engine: Callable[[], Engine], method: Method) -> None:
    if method.whole:
        pytest.skip("always takes its one step")
    if method.several:
        pytest.skip("another of its models may be the global one")
    for nothing in ({"steps": 0}, {"epochs": 0}):
        found = scalars(
            method.build(method.plan(LR, **nothing)), engine(), quadratics(A, B, SIZES), 2, start=START
        )  # fmt: skip
        assert found == [START, START]


@both
@methods
def test_an_empty_cohort_leaves_the_model_and_counts_the_round(engine: Callable[[], Engine], method: Method) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), method.build(method.plan(LR)), engine=engine())
    state, metrics = process.next(process.init(), data, [])
    assert state.round == 1 and float(process.vector(state)) == START
    assert metrics["clients"] == 0 and np.isnan(metrics["loss"]) and metrics["bytes_up"] == metrics["bytes_down"] == 0
    state, metrics = process.next(state, data)
    assert state.round == 2 and metrics["clients"] == 3
    fresh = process.init()
    assert len(fresh.memory) == 0


@engines
def test_no_steps_leave_variates_of_option_two(engine: Callable[[], Engine]) -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), scaffold(local_sgd(LR, steps=0)), engine=engine())
    state, _ = train(process, data, 2)
    assert float(state.algorithm.variate) == 0.0


def test_fedsgd_refuses_what_is_not_one_plain_step_on_everything() -> None:
    fedsgd(local_sgd(LR, epochs=1, batch_size=None))
    for plan in (
        local_sgd(LR),
        local_sgd(LR, steps=2, batch_size=None),
        local_sgd(LR, epochs=2, batch_size=None),
        local_sgd(LR, steps=1, batch_size=None, momentum=0.5),
        local_sgd(LR, steps=1, batch_size=None, optimizer="adam"),
    ):
        with pytest.raises(ValueError, match="one plain step on all"):
            fedsgd(plan)


def test_scaffold_refuses_plans_for_which_its_formula_is_wrong() -> None:
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}, {"clip": 1.0}, {"optimizer": "adam"}):
        with pytest.raises(ValueError, match="corrects plain sgd steps"):
            scaffold(local_sgd(LR, **options))
    with pytest.raises(ValueError, match=r"option=3 .* 1 or 2"):
        scaffold(local_sgd(LR), option=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_every_algorithm_asks_for_a_plan_and_says_what_it_is(method: Method) -> None:
    algorithm = method.build(method.plan(LR))
    again, other = method.build(method.plan(LR)), method.build(method.plan(LR * 2))
    assert (
        json.loads(json.dumps(algorithm.spec)) == again.spec != other.spec and algorithm.name == algorithm.spec["name"]
    )
    with pytest.raises(ValueError, match=r"local_sgd\(lr="):
        method.build(0.1)  # type: ignore[arg-type]
