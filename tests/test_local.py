"""The plan of local training: its arithmetic and what it refuses."""

import math
from typing import Any

import numpy as np
import pytest

from atoll import rate
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.privacy import example_level

SIZES = np.array([1, 3, 4, 9])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 1, "batch_size": 4}, [1, 1, 1, 3]),
        ({"epochs": 3, "batch_size": 4}, [3, 3, 3, 9]),
        ({"epochs": 0, "batch_size": 4}, [0, 0, 0, 0]),
        ({"steps": 5, "batch_size": 4}, [5, 5, 5, 5]),
        ({"epochs": 2, "batch_size": None}, [2, 2, 2, 2]),
        ({"batch_size": 1}, [1, 3, 4, 9]),
        ({"batch_size": 100}, [1, 1, 1, 1]),
    ],
)
def test_steps_of_clients(options: dict[str, Any], steps: list[int]) -> None:
    assert local_sgd(0.1, **options).total_steps(SIZES).tolist() == steps


def test_one_pass_with_batches_of_32_by_default() -> None:
    plan = local_sgd(0.1)
    assert plan.epochs == 1 and plan.steps is None and plan.batch_size == 32 and plan.shuffle and plan.plain


def test_rates_by_round_and_step() -> None:
    assert local_sgd(0.2).rate(3, np.arange(3)).tolist() == [0.2] * 3
    plan = local_sgd(0.2, schedule=lambda round, step: (1 + round) * (step + 1.0))
    np.testing.assert_allclose(plan.rate(1, np.arange(3)), [0.4, 0.8, 1.2])
    by_round = local_sgd(0.2, schedule=rate.exponential(0.5))
    assert by_round.rate(2, np.arange(2)).tolist() == [0.05, 0.05]
    constant = local_sgd(0.2, schedule=lambda round, step: 0.5)
    assert constant.rate(0, np.arange(2)).shape == (2,)


def test_plain_means_plain_steps() -> None:
    assert local_sgd(0.1, schedule=rate.cosine(4)).plain
    for options in (
        {"momentum": 0.1}, {"weight_decay": 0.1}, {"clip": 0.1}, {"optimizer": "adam"}, {"optimizer": "adamw"}
    ):  # fmt: skip
        assert not local_sgd(0.1, **options).plain  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": -1}, "lr=-1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": True}, "lr=True"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"epochs": 1, "steps": 1}, "epochs= or steps=, not both"),
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 1.0}, "epochs=1.0"),
        ({"steps": -1}, "steps=-1"),
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"batch_size": True}, "batch_size=True"),
        ({"optimizer": "rmsprop"}, "optimizer='rmsprop'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": 0.5, "optimizer": "adam"}, "momentum=0.5.*betas"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"betas": (0.9,)}, "betas="),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": 0.0}, "eps=0.0"),
        ({"schedule": 0.5}, "schedule=0.5"),
        ({"schedule": lambda round: 1.0}, r"schedule=.* callable\(round, step\)"),
        ({"work": 0.5}, "work=0.5"),
        ({"clip": 0.0}, "clip=0.0.*Leave it out"),
        ({"clip": True}, "clip=True"),
        ({"clip": math.inf}, "clip=inf"),
        ({"work": lambda client: 1.0}, r"work=.* callable\(client, round\)"),
    ],
)
def test_arguments_outside_their_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        local_sgd(**({"lr": 0.1} | options))


@pytest.mark.parametrize("share", [None, "x", "0.5", 1.5, -0.1, math.nan])
def test_shares_of_work_that_are_none(share: Any) -> None:
    plan = local_sgd(0.1, work=lambda client, round: share if client == "b" else 1.0)
    with pytest.raises(InvalidArgument, match=rf"work={share!r} .* share in \[0, 1\].* client 'b' in round 3"):
        plan.steps_of(SIZES[:2], ["a", "b"], 2)


def test_numbers_of_numpy_are_numbers() -> None:
    plan = local_sgd(
        np.float32(0.5), steps=np.int64(4), batch_size=np.int32(2), momentum=np.float32(0.25),  # type: ignore[arg-type]
        work=lambda client, round: np.float32(0.5), schedule=max,
    )  # fmt: skip
    assert plan == local_sgd(
        0.5, steps=4, batch_size=2, momentum=0.25, work=plan.work, schedule=plan.schedule
    ) and isinstance(plan.steps, int)  # fmt: skip
    assert plan.steps_of(SIZES, list("abcd"), 0).tolist() == [2, 2, 2, 2]


def test_the_spec_says_everything() -> None:
    base = local_sgd(0.1).spec
    assert base["name"] == "local_sgd" and base == local_sgd(0.1).spec
    changed = (
        {"lr": 0.2}, {"epochs": 2}, {"steps": 1}, {"batch_size": 8}, {"shuffle": False}, {"optimizer": "adam"},
        {"momentum": 0.5}, {"weight_decay": 0.5}, {"betas": (0.5, 0.5)}, {"eps": 1e-3}, {"schedule": rate.cosine(3)},
        {"clip": 0.5},
    )  # fmt: skip
    specs = [local_sgd(**({"lr": 0.1} | options)).spec for options in changed]  # type: ignore[arg-type]
    assert all(s != base for s in specs) and len({str(s) for s in specs}) == len(specs)
    assert local_sgd(0.1, schedule=rate.cosine(3)).spec != local_sgd(0.1, schedule=rate.cosine(4)).spec


def test_clipped_steps_are_refused_where_single_examples_are_clipped() -> None:
    private = example_level(clip=1.0, noise_multiplier=1.0)
    with pytest.raises(InvalidArgument, match=r"clip=5.0 .*left out with privacy="):
        local_sgd(0.1, clip=5.0, privacy=private)
