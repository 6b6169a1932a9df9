"""Clipping of a whole row: exact, joint, and never a lengthening."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import quadratics, scalar_model

from atoll import aggregators, random
from atoll.algorithms import scaffold
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import Transform, clip_norm
from atoll.transforms.base import Keys


def clip(stage: Transform, rows: torch.Tensor) -> torch.Tensor:
    keys = Keys(0, "transforms/0", 0, random.client_keys([f"c{i}" for i in range(len(rows))]))
    return stage.encode(rows, {}, None, keys)[0]  # type: ignore[return-value]


def test_long_rows_are_scaled_and_short_ones_left_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-30.0, 40.0]], dtype=torch.float64)
    found = clip(clip_norm(1.0), rows)
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert torch.equal(found[1:3], rows[1:3]), "rows within the bound keep their bits"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_the_bound_holds_and_the_direction_stays(values: list[float], bound: float) -> None:
    row = torch.tensor([values], dtype=torch.float64)
    found = clip(clip_norm(bound), row)
    assert float(found.norm()) <= bound * (1 + 1e-12)
    assert (
        abs(float((found * row).sum()) - float(found.norm() * row.norm())) <= 1e-9 * float(row.norm() * bound) + 1e-300
    )


def test_huge_rows_in_single_precision_are_clipped_not_lost() -> None:
    found = clip(clip_norm(1.0), torch.full((1, 4), 1e30))
    torch.testing.assert_close(found, torch.full((1, 4), 0.5))


def test_the_averaged_part_and_the_sums_are_clipped_together() -> None:
    data = quadratics((2.0,), (3.0,))
    plan = scaffold(local_sgd(0.1, steps=1, batch_size=None))
    free = Process(scalar_model(), plan)
    state, _ = free.next(free.init(), data)
    moved, variate = float(free.vector(state)), float(state.algorithm.variate)
    assert moved == pytest.approx(0.6) and variate == pytest.approx(-6.0)
    bound = Process(scalar_model(), plan, transforms=(clip_norm(1.5),))
    state, _ = bound.next(bound.init(), data)
    factor = 1.5 / math.hypot(moved, variate)
    assert float(bound.vector(state)) == pytest.approx(moved * factor, abs=1e-12)
    assert float(state.algorithm.variate) == pytest.approx(variate * factor, abs=1e-12)


def test_one_client_moves_the_uniform_mean_by_at_most_the_bound() -> None:
    data = quadratics((1.0, 1.0), (0.0, 1e6))
    process = Process(
        scalar_model(), scaffold(local_sgd(0.5, steps=1, batch_size=None)), transforms=(clip_norm(0.2),),
        aggregator=aggregators.mean(weights="uniform"),
    )  # fmt: skip
    state, _ = process.next(process.init(), data)
    assert 0 < float(process.vector(state)) <= 0.1 + 1e-12


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan, True])
def test_bounds_outside_their_range(norm: Any) -> None:
    with pytest.raises(InvalidArgument, match="norm="):
        clip_norm(norm)
