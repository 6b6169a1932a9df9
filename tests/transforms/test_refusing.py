"""Stages that leave clients out of a round: whom, why, and what that leaves of the round."""

from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model

import atoll
from atoll import aggregators, attacks
from atoll.algorithms import Algorithm, fedavg, scaffold
from atoll.errors import CompositionError, InvalidArgument, NonFiniteError
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import Transform, clip_norm, error_feedback, half, norm_bound, quantize, reject_nonfinite

ONE_STEP = local_sgd(0.1, steps=1, batch_size=None)
engines = pytest.mark.parametrize("engine", ["loop", "auto"])


def build(stages: Any, *, algorithm: Algorithm | None = None, **options: Any) -> Process:
    return Process(scalar_model(), algorithm or fedavg(ONE_STEP), transforms=stages, **options)


@engines
@pytest.mark.parametrize("rule", [aggregators.mean(), aggregators.median(), aggregators.krum(byzantine=1)])
@pytest.mark.parametrize("method", [fedavg, scaffold])
@pytest.mark.parametrize(
    ("stage", "b", "told"),
    [
        (reject_nonfinite(), 1e200, {"reason": "the update or loss is not finite"}),
        (norm_bound(40.0), 500.0, {"reason": "above the bound of 40"}),
    ],
    ids=["reject_nonfinite", "norm_bound"],
)
def test_a_round_without_whom_a_stage_refuses_is_one_without_it(
    stage: Transform, b: float, told: dict[str, Any], method: Any, rule: aggregators.Aggregator, engine: str
) -> None:
    """Gradients of 1e200 have a norm but no finite loss; those of 500 are too long."""
    data = quadratics((1.0,) * 7, (1.0, 2.0, 3.0, b, 4.0, 5.0, 6.0), sizes=(2, 4, 2, 6, 2, 2, 2))
    others = [c for c in data.clients if c != "c3"]
    found = []
    for stages, cohort in (((stage,), None), ((), others)):
        process = build(stages, algorithm=method(ONE_STEP), aggregator=rule, engine=engine)
        if cohort is not None and rule.name == "krum":  # the refused one is the one it was told to expect
            process = build(stages, algorithm=method(ONE_STEP), aggregator=aggregators.krum(byzantine=0), engine=engine)
        state, metrics = process.next(process.init(), data, cohort)
        found.append((float(process.vector(state)), metrics["clients"], metrics["loss"]))
        if cohort is None:
            assert told["reason"] in metrics["refused"]["c3"]["reason"] and "c3" not in state.memory
            assert ("norm" in metrics["refused"]["c3"]) == (b == 500.0) or stage.name == "reject_nonfinite"
    if rule.name == "krum":
        found = [f[:1] for f in found]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@engines
def test_the_server_judges_what_it_reads(engine: str) -> None:
    """Four bits cannot make a row of 9.0 one of 3.0, and whatever is clipped to the bound is not above it."""
    data = quadratics((1.0,) * 3, (30.0, 60.0, 90.0))
    process = build((norm_bound(8.0), quantize(4)), engine=engine)
    _, metrics = process.next(process.init(), data)
    assert list(metrics["refused"]) == ["c2"] and metrics["refused"]["c2"]["norm"] == pytest.approx(9.0)
    process = build((clip_norm(3.0), norm_bound(3.0)), engine=engine)
    state, metrics = process.next(process.init(), data)
    assert not metrics["refused"] and float(process.vector(state)) == pytest.approx(3.0)


@engines
def test_who_is_refused_still_owes_what_it_owed(engine: str) -> None:
    process = build((norm_bound(5.0), error_feedback(half("bfloat16"))), engine=engine)
    state, _ = process.next(process.init(), quadratics((1.0, 1.0), (3.3, 4.1)))
    before = state.memory.rows(["c0", "c1"], torch.zeros(1, dtype=torch.float64)).clone()
    state, metrics = process.next(state, quadratics((1.0, 1.0), (3.3, 90.0)))
    after = state.memory.rows(["c0", "c1"], torch.zeros(1, dtype=torch.float64))
    assert list(metrics["refused"]) == ["c1"]
    assert float(after[1]) == float(before[1]) and float(after[0]) != float(before[0])


@pytest.mark.parametrize(
    ("stage", "b", "said"),
    [(norm_bound(0.01), (1.0, 2.0), r"all 2 updates were refused.*c0.*its norm 0\.1 is above the bound of 0\.01"),
     (reject_nonfinite(), (1e200, 1e200), r"all 2 updates were refused.*not finite.*halve lr")],
    ids=["norm_bound", "reject_nonfinite"],
)  # fmt: skip
@pytest.mark.parametrize("rule", [aggregators.mean(), aggregators.median()], ids=lambda r: r.name)
def test_a_round_in_which_everybody_is_refused_is_told(
    stage: Transform, b: Any, said: str, rule: aggregators.Aggregator
) -> None:
    process = build((stage,), aggregator=rule)
    with pytest.raises(NonFiniteError, match=said):
        process.next(process.init(), quadratics((1.0, 1.0), b))


def test_the_record_and_the_count_are_the_same_for_any_number_of_workers() -> None:
    data = quadratics((1.0,) * 6, (1.0, 2.0, 1e200, 3.0, 80.0, 4.0))
    runs = [
        atoll.simulate(
            scalar_model(), data, algorithm=fedavg(ONE_STEP), rounds=2, workers=workers, progress=False,
            transforms=(reject_nonfinite(), norm_bound(6.0)),
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert [dict(r.refused) for r in runs[0].history] == [dict(r.refused) for r in runs[1].history]
    assert torch.equal(runs[0].vector, runs[1].vector)
    record = runs[0].history[0]
    assert set(record.refused) == {"c2", "c4"} and record.refusals == 2 and record.clients == 4


def test_a_stage_that_judges_stands_before_no_attack() -> None:
    rule = attacks.apply(aggregators.mean(), attacks.non_finite(), fraction=0.5)
    with pytest.raises(CompositionError, match=r"reject_nonfinite cannot stand.*before the attack wrote over it"):
        build((reject_nonfinite(),), aggregator=rule)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan"), True, "3"])
def test_what_is_no_bound(bound: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"bound=.*finite number above 0"):
        norm_bound(bound)
