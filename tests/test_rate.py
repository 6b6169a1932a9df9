"""Schedules against closed values, for integers and for arrays."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from atoll import rate
from atoll.errors import InvalidArgument

SCHEDULES = {
    "constant": rate.constant(),
    "exponential": rate.exponential(0.5, 2),
    "exponential by step": rate.exponential(0.5, by="step"),
    "cosine": rate.cosine(10, 0.1),
    "cosine by step": rate.cosine(4, by="step"),
    "warmup": rate.warmup(3),
    "warmup by step": rate.warmup(3, rate.exponential(0.9), by="step"),
    "inverse_sqrt": rate.inverse_sqrt(4, by="step"),
    "piecewise": rate.piecewise({5: 0.5, 2: 2.0}, by="step"),
}


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (rate.constant(), {0: 1.0, 1000: 1.0}),
        (rate.exponential(0.5), {0: 1.0, 1: 0.5, 3: 0.125}),
        (rate.exponential(0.5, 3), {0: 1.0, 2: 1.0, 3: 0.5, 5: 0.5, 6: 0.25}),
        (rate.cosine(4), {0: 1.0, 1: (2 + math.sqrt(2)) / 4, 2: 0.5, 4: 0.0, 9: 0.0}),
        (rate.cosine(6, 0.2), {0: 1.0, 2: 0.8, 3: 0.6, 6: 0.2, 7: 0.2}),
        (rate.warmup(4), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 50: 1.0}),
        (rate.warmup(1), {0: 1.0, 1: 1.0}),
        (rate.warmup(2, rate.exponential(0.5)), {0: 0.5, 1: 1.0, 2: 1.0, 3: 0.5, 4: 0.25}),
        (rate.inverse_sqrt(), {0: 1.0, 3: 0.5, 8: 1 / 3}),
        (rate.inverse_sqrt(5.0), {0: 1.0, 15: 0.5}),
        (rate.piecewise({10: 0.1, 20: 0.01}), {0: 1.0, 9: 1.0, 10: 0.1, 19: 0.1, 20: 0.01, 99: 0.01}),
        (rate.piecewise({0: 0.0, 2: 3.0}), {0: 0.0, 1: 0.0, 2: 3.0}),
    ],
)
def test_closed_values_by_round(schedule: rate.Schedule, values: dict[int, float]):
    for position, value in values.items():
        for step in (0, 17):
            assert schedule(position, step) == pytest.approx(value, abs=1e-15)


def test_by_step_the_round_does_not_matter():
    schedule = rate.exponential(0.5, by="step")
    assert [schedule(round, 2) for round in range(3)] == [0.25, 0.25, 0.25]


def test_warmup_by_step_and_then_by_round():
    schedule = rate.warmup(2, rate.exponential(0.5, by="round"), by="step")
    assert [[schedule(round, step) for step in range(3)] for round in range(2)] == [[0.5, 1.0, 1.0], [0.25, 0.5, 0.5]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_arrays_give_what_integers_give(name: str):
    schedule = SCHEDULES[name]
    steps = np.arange(12).reshape(4, 3)
    for round in (0, 3, 11):
        wanted = [[schedule(round, int(step)) for step in row] for row in steps]
        values = schedule(round, steps)
        assert values.dtype == np.float64
        assert values.tolist() == wanted
        column = schedule(round, torch.from_numpy(steps))
        assert column.dtype == torch.float64
        assert column.tolist() == wanted
        assert schedule(round, torch.tensor(3)).item() == schedule(round, 3)
        assert schedule(round, steps[:0]).shape == (0, 3)
    assert isinstance(schedule(np.int64(2), np.int32(3)), float)  # type: ignore[arg-type]


def test_a_schedule_of_ones_own_may_follow():
    class Halves:
        @property
        def spec(self) -> dict[str, Any]:
            return {"name": "halves"}

        def __call__(self, round: int, step: Any) -> Any:
            return 0.5**round * np.ones_like(step, dtype=float)

    schedule = rate.warmup(2, Halves())
    assert [schedule(round, 0) for round in range(5)] == [0.5, 1.0, 1.0, 0.5, 0.25]
    assert schedule.spec["then"] == {"name": "halves"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_values_with_a_spec(name: str):
    schedule = SCHEDULES[name]
    assert isinstance(schedule, rate.Schedule)
    assert json.loads(json.dumps(schedule.spec)) == schedule.spec
    assert schedule.spec["name"] == name.split()[0]
    assert hash(schedule) == hash(schedule)
    with pytest.raises((AttributeError, TypeError)):
        schedule.by = "round"  # type: ignore[attr-defined]


def test_specs_tell_the_arguments():
    assert rate.warmup(2, rate.piecewise({9: 3}), by="step").spec == {
        "name": "warmup",
        "total": 2,
        "then": {"name": "piecewise", "pieces": [[9, 3.0]], "by": "round"},
        "by": "step",
    }
    assert rate.exponential(np.float64(0.5), np.int64(2)) == rate.exponential(0.5, 2)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: rate.exponential(0.0), "decay"),
        (lambda: rate.exponential(1.5), "decay"),
        (lambda: rate.exponential(math.nan), "decay"),
        (lambda: rate.exponential("0.5"), "decay"),
        (lambda: rate.exponential(0.5, 0), "every"),
        (lambda: rate.exponential(0.5, 1.5), "every"),
        (lambda: rate.exponential(0.5, by="epoch"), "by"),
        (lambda: rate.cosine(0), "total"),
        (lambda: rate.cosine(True), "total"),
        (lambda: rate.cosine(5, -0.1), "floor"),
        (lambda: rate.cosine(5, 1.1), "floor"),
        (lambda: rate.warmup(-3), "total"),
        (lambda: rate.warmup(3, 0.5), "then"),
        (lambda: rate.inverse_sqrt(0), "offset"),
        (lambda: rate.inverse_sqrt(math.inf), "offset"),
        (lambda: rate.piecewise({}), "factors"),
        (lambda: rate.piecewise([(1, 0.5)]), "factors"),
        (lambda: rate.piecewise({-1: 0.5}), "boundary"),
        (lambda: rate.piecewise({1.5: 0.5}), "boundary"),
        (lambda: rate.piecewise({1: -0.5}), "factor"),
        (lambda: rate.constant()(-1, 0), "round"),
        (lambda: rate.constant()(0, -1), "step"),
        (lambda: rate.constant()(0, 1.0), "step"),
        (lambda: rate.constant()(0, np.ones(3)), "step"),
        (lambda: rate.constant()(0, torch.ones(3)), "step"),
    ],
)
def test_bad_arguments_are_named(build: Any, argument: str):
    with pytest.raises(InvalidArgument, match=f"^{argument}="):
        build()
