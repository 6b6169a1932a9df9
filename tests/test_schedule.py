"""Schedules: events worked out by hand, the degenerate cases that are synchronous, and what cannot be asynchronous."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import quadratics, scalar_model
from registry import ALGORITHMS, ENGINES, MODELS

import atoll
from atoll import aggregators, sampling, schedule, transforms
from atoll.errors import CompositionError, InvalidArgument

A, B, SIZES = np.array((1.0, 2.0, 3.5)), np.array((-1.0, 0.5, 4.0)), (2, 4, 6)
START, LR, NEAR = 0.75, 0.1, 1e-12
SECONDS = {"c0": 1.0, "c1": 2.0, "c2": 5.0}
PLAN = atoll.local_sgd(LR, steps=2, batch_size=None)

KINDS = ("loop", "rows", "single")
engines = pytest.mark.parametrize("engine", [ENGINES[n] for n in KINDS], ids=KINDS)


def seconds(client: str, round: int) -> float:
    return SECONDS[client]


def simulate(rounds: int, **options: Any) -> tuple[list[float], atoll.Result]:
    """Models after each round."""
    path: list[float] = []
    results: list[atoll.Result] = []
    for number in range(1, rounds + 1):
        result = atoll.simulate(
            scalar_model(START), quadratics(A, B, SIZES), rounds=number, progress=False, evaluate_every=0,
            **{"algorithm": atoll.fedavg(PLAN), **options},
        )  # fmt: skip
        path.append(float(result.vector))
        results.append(result)
    return path, results[-1]


def moved(i: int, x: float) -> float:
    """What client i's two steps change from x."""
    return float((B[i] - x) * (1 - (1 - LR * A[i]) ** 2))


@engines
def test_every_update_alone_by_hand(engine: Callable[[], Any]) -> None:
    """Three clients that take 1, 2 and 5 seconds, always at work; a step for each update."""
    x = [START]

    def s(tau: int) -> float:
        return 1 / math.sqrt(1 + tau)

    x.append(x[0] + moved(0, x[0]))  # 1 s: c0 is done, gets x1
    x.append(x[1] + s(1) * moved(1, x[0]))  # 2 s: c1, asked first, then c0
    x.append(x[2] + s(1) * moved(0, x[1]))  # both get x3
    x.append(x[3] + moved(0, x[3]))  # 3 s: c0, gets x4
    x.append(x[4] + s(1) * moved(1, x[3]))  # 4 s: c1, then c0; both get x6
    x.append(x[5] + s(1) * moved(0, x[4]))
    x.append(x[6] + s(6) * moved(2, x[0]))  # 5 s: c2 at last, then c0
    x.append(x[7] + s(1) * moved(0, x[6]))
    found, result = simulate(8, schedule=schedule.buffered(1, 3, durations=seconds), engine=engine())
    np.testing.assert_allclose(found, x[1:], rtol=0, atol=NEAR)
    assert [r.simulated for r in result.history] == [1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 5.0]
    assert [r.notes[0].split()[2] for r in result.history] == ["0", "1", "1", "0", "1", "1", "6", "1"]
    assert all(r.clients == 1 for r in result.history)


@engines
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_stale_updates_count_less_and_weights_do_not(engine: Callable[[], Any], kind: str) -> None:
    w = np.array(SIZES if kind == "examples" else (1, 1, 1), dtype=float)
    x0 = START
    x1 = x0 + (w[0] * moved(0, x0) + w[1] * moved(1, x0)) / (w[0] + w[1])  # 2 s
    x2 = x1 + (w[0] * moved(0, x1) + w[1] * moved(1, x1)) / (w[0] + w[1])  # 4 s
    x3 = x2 + (w[2] * 3**-2.0 * moved(2, x0) + w[0] * moved(0, x2)) / (w[2] + w[0])  # 5 s
    plan = schedule.buffered(2, 3, 2.0, durations=seconds)
    found, _ = simulate(3, schedule=plan, engine=engine(), aggregator=aggregators.mean(weights=kind))
    np.testing.assert_allclose(found, [x1, x2, x3], rtol=0, atol=NEAR)
    called = schedule.buffered(2, 3, lambda tau: 1 / (1 + tau) ** 2, durations=seconds)
    assert simulate(3, schedule=called, engine=engine(), aggregator=aggregators.mean(weights=kind))[0] == found


def equal(client: str, round: int) -> float:
    return 3.0


SYNCHRONOUS = {
    "fedavg": atoll.fedavg,
    "fedprox": lambda p: atoll.fedprox(p, mu=0.1),
    "fedadam": lambda p: atoll.fedadam(p, lr=0.1),
    "fedper": lambda p: atoll.fedper(p, private=("head.*",)),
}


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_equal_durations_are_synchronous_bit_for_bit(name: str, engine: str) -> None:
    kind = MODELS["batch norm, mean"]
    data, build = kind.data((6, 2, 7, 4, 11, 6)), SYNCHRONOUS[name]
    for size in (3, 6):
        options: dict[str, Any] = {
            "algorithm": build(atoll.local_sgd(0.05, epochs=2, batch_size=4)),
            "rounds": 4, "seed": 5, "progress": False, "evaluate_every": 0,
        }  # fmt: skip
        expected = atoll.simulate(kind.model(), data, cohort=size, engine=ENGINES[engine](), **options)
        plan = schedule.buffered(size, size, durations=equal)
        found = atoll.simulate(kind.model(), data, schedule=plan, engine=ENGINES[engine](), **options)
        assert torch.equal(found.vector, expected.vector) and torch.equal(found.buffers, expected.buffers)
        assert all(torch.equal(found.personal(c), expected.personal(c)) for c in data.clients)
        assert [r.bytes_up for r in found.history] == [r.bytes_up for r in expected.history]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_runs_asynchronously_or_is_refused_by_name(name: str) -> None:
    method = ALGORITHMS[name]
    kind = MODELS["layer norm"]
    algorithm = method.build(method.plan(0.05))
    paths = []
    for engine in ("loop", "rows"):
        options: dict[str, Any] = {"schedule": schedule.buffered(2, 4), "rounds": 5, "progress": False}
        try:
            result = atoll.simulate(
                kind.model(), kind.data((6, 2, 7, 4, 11)), algorithm=algorithm, engine=ENGINES[engine](), **options
            )
        except CompositionError as error:
            assert str(error).startswith(f"{algorithm.name} cannot run asynchronously")
            assert name not in ("fedavg", "fedprox", "fedadam", "fedsgd", "fedper"), "says that it may"
            return
        paths.append(result.vector)
    assert not name.startswith(("scaffold", "feddyn", "fednova", "ditto", "qfedavg", "cyclic", "pooled"))
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-9)


def test_the_same_seed_gives_the_same_events() -> None:
    runs = [simulate(6, schedule=schedule.buffered(2, 2), seed=seed) for seed in (1, 1, 2)]
    assert runs[0][0] == runs[1][0] != runs[2][0]
    clocks = [[r.simulated for r in run.history] for _, run in runs]
    assert clocks[0] == clocks[1] != clocks[2] and clocks[0] == sorted(clocks[0])


def test_durations_are_half_normal_by_default() -> None:
    plan = schedule.buffered(1, 1)
    took = np.array([plan.took(0, f"c{i}", r) for i in range(40) for r in range(50)])
    assert took.min() >= 0 and abs(took.mean() - math.sqrt(2 / math.pi)) < 0.05 and abs((took**2).mean() - 1) < 0.1
    assert plan.took(0, "c1", 3) == plan.took(0, "c1", 3) != plan.took(1, "c1", 3)


def test_what_cannot_be_asynchronous_is_refused() -> None:
    plan = schedule.buffered(2, 2)
    for options, said in (
        ({"transforms": (transforms.clip_norm(1.0),)}, "clip_norm cannot run asynchronously.*no transforms"),
        ({"channel": transforms.secure_sum(clip=1.0, weight_cap=9.0)}, "secure_sum cannot run asynchronously.*plain"),
        ({"downlink": (transforms.quantize(8),)}, r"downlink cannot run asynchronously.*downlink=\(\)"),
        ({"aggregator": aggregators.median()}, r"median cannot run asynchronously.*aggregators\.mean\(\)"),
    ):
        with pytest.raises(CompositionError, match=said):
            simulate(1, schedule=plan, **options)
    with pytest.raises(InvalidArgument, match=r"cohort=2 .*concurrency="):
        simulate(1, schedule=plan, cohort=2)
    with pytest.raises(InvalidArgument, match=r"size=4 .*population of 3"):
        simulate(1, schedule=schedule.buffered(4, 2))
    with pytest.raises(InvalidArgument, match=r"concurrency=4 .*population of 3"):
        simulate(1, schedule=schedule.buffered(2, 4))
    with pytest.raises(InvalidArgument, match="schedule=3"):
        simulate(1, schedule=3)
    with pytest.raises(InvalidArgument, match=r"staleness=-1\.0 .*tau=0"):
        simulate(1, schedule=schedule.buffered(1, 1, lambda tau: -1.0))
    with pytest.raises(InvalidArgument, match=r"durations=nan .*client 'c"):
        simulate(1, schedule=schedule.buffered(1, 1, durations=lambda client, round: math.nan))
    for build, said in (
        (lambda: schedule.buffered(0, 1), "size=0"),
        (lambda: schedule.buffered(1, True), "concurrency=True"),
        (lambda: schedule.buffered(1, 1, -0.5), "staleness=-0.5"),
        (lambda: schedule.buffered(1, 1, durations=3.0), "durations=3.0"),  # type: ignore[arg-type]
        (lambda: schedule.rounds(over=0.5), "over=0.5"),
        (lambda: schedule.rounds(quorum=0), "quorum=0"),
        (lambda: schedule.rounds(quorum=1.5), "quorum=1.5"),
        (lambda: schedule.rounds(deadline=0.0), "deadline=0.0"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            build()


def test_a_buffered_run_in_a_directory_is_not_resumed(tmp_path: Path) -> None:
    plan = schedule.buffered(1, 2)
    first = simulate(1, schedule=plan, directory=tmp_path / "run")
    assert first[1].spec["experiment"]["schedule"]["name"] == "buffered"
    with pytest.raises(InvalidArgument, match=r"resume=True .*same seed"):
        simulate(1, schedule=plan, directory=tmp_path / "run", resume=True)


# --- synchronous rounds -----------------------------------------------------------------------------------------------


def clients(count: int) -> atoll.FederatedDataset:
    return quadratics([1.0] * count, list(np.linspace(-2, 2, count)), [2] * count)


def run(data: atoll.FederatedDataset, **options: Any) -> atoll.Result:
    return atoll.simulate(
        scalar_model(START), data, algorithm=atoll.fedavg(PLAN), rounds=5, progress=False, evaluate_every=0, **options
    )


def test_rounds_that_wait_for_everybody_change_nothing() -> None:
    plain, waiting = run(clients(6), cohort=3), run(clients(6), cohort=3, schedule=schedule.rounds())
    assert torch.equal(plain.vector, waiting.vector) and plain.spec == waiting.spec


def test_more_are_asked_and_the_first_count() -> None:
    def slow(client: str, round: int) -> float:
        return float((int(client[1:]) * 7 + round * 5) % 11)

    data = clients(8)
    found = run(data, cohort=3, schedule=schedule.rounds(over=1.5, durations=slow))
    cohorts, lengths = [], []
    for t in range(5):
        asked = sampling.fixed(5).cohort(0, t, data.clients)  # 1.5 times 3, rounded up
        first = sorted(asked, key=lambda c, t=t: slow(c, t))[:3]
        cohorts.append([c for c in asked if c in first])
        lengths.append(slow(first[-1], t))
    expected = run(data, cohort=sampling.sequence(cohorts))
    assert torch.equal(found.vector, expected.vector)
    assert [r.simulated for r in found.history] == lengths
    assert all(r.clients == 3 for r in found.history)


@pytest.mark.parametrize(("quorum", "steps"), [(None, 5), (2, 5), (3, 2), (0.5, 2), (0.4, 5)])
def test_a_deadline_and_a_quorum(quorum: Any, steps: int) -> None:
    """Of five clients three are in time in even rounds but the fourth, else two."""

    def slow(client: str, round: int) -> float:
        return 1.0 if int(client[1:]) < (3 if round in (0, 2) else 2) else 9.0

    data = clients(5)
    found = run(data, schedule=schedule.rounds(deadline=4.0, quorum=quorum, durations=slow))
    came = [[f"c{i}" for i in range(3 if t in (0, 2) else 2)] for t in range(5)]
    made = [c if quorum is None or len(c) >= (quorum if isinstance(quorum, int) else quorum * 5) else [] for c in came]
    assert sum(bool(c) for c in made) == steps
    assert torch.equal(found.vector, run(data, cohort=sampling.sequence(made)).vector)
    assert [r.simulated for r in found.history] == [4.0] * 5
    assert [bool(r.notes) for r in found.history] == [not c for c in made]
    if steps < 5:
        assert "fewer than the quorum of 3" in found.history[1].notes[0]


def test_rounds_that_are_refused_before_any_work() -> None:
    with pytest.raises(InvalidArgument, match=r"over=2\.0 .*1 with poisson"):
        run(clients(4), cohort=sampling.poisson(0.5), schedule=schedule.rounds(over=2.0))
    with pytest.raises(InvalidArgument, match=r"over=3\.0 .*at most 2"):
        run(clients(4), cohort=2, schedule=schedule.rounds(over=3.0))
    with pytest.raises(InvalidArgument, match=r"quorum=3 .*at most 2"):
        run(clients(4), cohort=2, schedule=schedule.rounds(quorum=3))


def test_a_quorum_that_the_rule_or_the_channel_cannot_do_with_is_refused() -> None:
    data = quadratics((1.0,) * 8, (0.5,) * 8, (4,) * 8)

    def late(client: str, round: int) -> float:
        return 1.0 + data.index(client)

    def run(quorum: int, **options: Any) -> atoll.Result:
        return atoll.simulate(
            scalar_model(START), data, algorithm=atoll.fedavg(PLAN), rounds=2, progress=False,
            schedule=schedule.rounds(deadline=2.0, quorum=quorum, durations=late), **options,
        )  # fmt: skip

    uniform = aggregators.mean(weights="uniform")
    summing = {"channel": transforms.secure_sum(clip=1.0), "aggregator": uniform}
    with pytest.raises(CompositionError, match=r"makes a step of 2 updates.*needs 3 clients.*raise quorum"):
        run(2, **summing)
    with pytest.raises(CompositionError, match=r"makes a step of 4 updates.*needs at least 5.*raise quorum"):
        run(4, aggregator=aggregators.krum(byzantine=1))
    for options in (summing, {"aggregator": aggregators.krum(byzantine=1)}):
        found = run(5, **options)
        assert [r.clients for r in found.history] == [0, 0] and float(found.vector) == START
        assert "fewer than the quorum of 5" in found.history[0].notes[0]
