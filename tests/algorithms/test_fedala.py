"""FedALA against its recursion with scalars, in its degenerate cases, and in what it refuses."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from problems import points, quadratics, scalar_model, train
from registry import ENGINES, MODELS, on

from atoll.algorithms import fedala, fedavg
from atoll.engines import Engine
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process

A, B, SIZES = (1.0, 2.0, 3.5), (-1.0, 0.5, 4.0), (2, 4, 6)
START, LR, NEAR = 0.75, 0.1, 1e-12
engines = on("loop", "rows", "single")


def by_hand(
    rounds: int, steps: int, eta: float, first: int, settled: float, cohorts: Sequence[Sequence[int]], batches: int
) -> tuple[list[float], list[float], list[int]]:
    """Global models, what clients would use after the last round, and passes that were taken, with scalars."""
    x, own, weights, begun = START, [START] * 3, [1.0] * 3, [False] * 3
    path, passes = [], []

    def mixed(i: int, weight: float, learnt: bool) -> tuple[float, float, int]:
        away, losses, number = x - own[i], [], 0
        if away == 0:
            return x, weight, 0
        for number in range(1, (1 if learnt else first) + 1):
            total = 0.0
            for _ in range(batches):
                p = own[i] + away * weight
                total += A[i] / 2 * (p - B[i]) ** 2 / batches
                weight = min(1.0, max(0.0, weight - eta * A[i] * (p - B[i]) * away))
            losses.append(total)
            if len(losses) >= 10 and np.std(losses[-10:]) < settled:
                break
        return own[i] + away * weight, weight, number

    for t in range(rounds):
        members = cohorts[t % len(cohorts)]
        ends = {}
        for i in members:
            y, weights[i], count = mixed(i, weights[i], begun[i])
            begun[i] = begun[i] or count > 0
            passes.append(count)
            for _ in range(steps):
                y -= LR * A[i] * (y - B[i])
            ends[i] = y
        for i, y in ends.items():
            own[i] = y
        x = float(np.average(list(ends.values()), weights=[SIZES[i] for i in ends]))
        path.append(x)
    return path, [mixed(i, weights[i], begun[i])[0] for i in range(3)], passes


COHORTS = [[0, 1, 2], [0, 2], [1, 2]]


@engines
@pytest.mark.parametrize(("eta", "settled"), [(0.2, 1e-3), (0.02, 0.0), (5.0, 0.0)])
def test_fedala_follows_the_paper(engine: Callable[[], Engine], eta: float, settled: float) -> None:
    data = points(A, B, SIZES)
    plan = local_sgd(LR, steps=2, batch_size=2, shuffle=False)
    process = Process(
        scalar_model(START), fedala(plan, eta=eta, sample=0.01, first=30, settled=settled), engine=engine()
    )
    state, found = train(process, data, 6, [[f"c{i}" for i in c] for c in COHORTS])
    path, used, passes = by_hand(6, 2, eta, 30, settled, COHORTS, 1)
    np.testing.assert_allclose([float(v) for v in found], path, rtol=0, atol=NEAR)
    np.testing.assert_allclose(process.personal(state, data, list(data.clients)).rows[:, 0], used, rtol=0, atol=NEAR)
    assert {0, 1} < set(passes) and (max(passes) < 30) == (settled > 0), "every branch is taken"
    kept = state.memory.rows(list(data.clients), torch.zeros(3, dtype=torch.float64))
    assert bool(((kept[:, 1] >= 0) & (kept[:, 1] <= 1)).all()) and float(kept[:, 1].min()) < 1


@engines
def test_the_sample_is_a_share_of_the_batches(engine: Callable[[], Engine]) -> None:
    """A client of six examples has three batches of two: all of them step on the weight, or two, or one."""
    data = points(A[2:], B[2:], (6,))
    two = points((A[2], 1.0), (B[2], -3.0), (6, 6))
    for share, batches in ((1.0, 3), (0.6, 2), (0.1, 1)):
        plan = local_sgd(LR, steps=1, batch_size=2)
        process = Process(scalar_model(START), fedala(plan, eta=0.1, sample=share, first=1), engine=engine())
        state, path = train(process, two, 1)
        own = state.memory.rows(["c0"], torch.zeros(3, dtype=torch.float64))[0, 0]
        x, weight = float(path[0]), 1.0
        for _ in range(batches):
            p = float(own) + (x - float(own)) * weight
            weight = min(1.0, max(0.0, weight - 0.1 * A[2] * (p - B[2]) * (x - float(own))))
        state, _ = process.next(state, two)
        kept = state.memory.rows(["c0"], torch.zeros(3, dtype=torch.float64))[0]
        assert float(kept[1]) == pytest.approx(weight, abs=NEAR) and weight < 1
    assert len(data) == 1


@pytest.mark.parametrize("engine", ["loop", "rows", "auto"])
def test_a_first_round_is_federated_averaging_bit_for_bit(engine: str) -> None:
    kind, plan = MODELS["batch norm, mean"], local_sgd(0.05, epochs=2, batch_size=4)
    data, found = kind.data((6, 2, 7)), []
    for algorithm in (fedavg(plan), fedala(plan)):
        found.append(train(Process(kind.model(), algorithm, engine=ENGINES[engine]()), data, 1))
    assert torch.equal(found[0][1][-1], found[1][1][-1])
    assert torch.equal(found[0][0].buffers, found[1][0].buffers)


def test_what_is_not_adapted_is_the_global_models() -> None:
    kind, plan = MODELS["layer norm"], local_sgd(0.3, epochs=2, batch_size=4)
    data = kind.data((6, 2, 7))
    process = Process(kind.model(), fedala(plan, adapt=("head.*",), eta=5.0))
    state, path = train(process, data, 3)
    rows = process.personal(state, data, list(data.clients)).rows
    head = process.model.layout.mask(["head.weight", "head.bias"])
    assert torch.equal(rows[:, ~head], path[-1][~head].expand(3, -1))
    assert not torch.allclose(rows[:, head], path[-1][head].expand(3, -1))


def test_a_client_never_seen_uses_the_global_model() -> None:
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), fedala(local_sgd(LR, steps=2, batch_size=None)))
    state, path = train(process, data, 3, [["c0", "c1"]])
    assert float(process.personal(state, data, ["c2"]).rows[0]) == float(path[-1])


def test_what_fedala_refuses() -> None:
    plan = local_sgd(0.1)
    for options in ({"eta": 0.0}, {"sample": 0.0}, {"sample": 1.5}, {"first": 0}, {"settled": -1.0}, {"adapt": "head"}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            fedala(plan, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"adapt='neck\.\*'.*matches parameters"):
        Process(MODELS["perceptron"].model(), fedala(plan, adapt=("head.*", "neck.*")))
