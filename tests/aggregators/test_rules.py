"""Rules on plain matrices, and what every rule must do."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from problems import quadratics, scalar_model
from registry import AGGREGATORS

from atoll import aggregators
from atoll.algorithms import fedavg, scaffold
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process

matrices = st.integers(1, 9).flatmap(
    lambda n: arrays(np.float64, (n, 4), elements=st.floats(-1e6, 1e6, allow_subnormal=False))
)
rules = pytest.mark.parametrize("name", AGGREGATORS)
STREAMED = ("mean", "uniform mean")


@rules
def test_identical_rows_give_that_row(name: str) -> None:
    row = torch.tensor([0.25, -0.375, 0.125])
    found = AGGREGATORS[name]()(row.repeat(8, 1))
    assert torch.equal(found, row) and found.dtype == torch.float32


@rules
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, order = torch.randn(13, 9, generator=draw, dtype=torch.float64), torch.randperm(13, generator=draw)
    rows[3], rows[5, 0] = rows[8], rows[1, 0]
    found, other = AGGREGATORS[name]()(rows), AGGREGATORS[name]()(rows[order])
    if name in STREAMED:
        torch.testing.assert_close(found, other, rtol=0, atol=1e-14)
    else:
        assert torch.equal(found, other), "a rule that sees all rows has the same bits for any order"


@rules
def test_one_row_is_itself_and_none_is_refused(name: str) -> None:
    row = 0.1 * torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    if AGGREGATORS[name]().least(1) == 1:
        assert torch.equal(AGGREGATORS[name]()(row), row[0])
    with pytest.raises(InvalidArgument, match="rows="):
        AGGREGATORS[name]()(torch.empty(0, 4))
    with pytest.raises(InvalidArgument, match="rows="):
        AGGREGATORS[name]()(torch.zeros(4))
    with pytest.raises(InvalidArgument, match=r"weights=\(3,\).*9 rows"):
        AGGREGATORS[name]()(torch.zeros(9, 4), torch.ones(3))


@given(matrices)
def test_the_median_is_numpys(rows: np.ndarray) -> None:
    found = aggregators.median()(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, np.median(rows, axis=0), rtol=1e-15, atol=0)
    if len(rows) % 2:
        assert (found == torch.from_numpy(rows).median(dim=0).values.numpy()).all()


def test_the_median_of_an_even_number_is_the_midpoint() -> None:
    rows = torch.tensor([[1.0, 10.0], [4.0, -3.0], [2.0, 0.0], [100.0, 1.0]])
    assert aggregators.median()(rows).tolist() == [3.0, 0.5]
    huge = torch.tensor([[3e38], [3.2e38]])
    assert float(aggregators.median()(huge)) == pytest.approx(3.1e38)


def test_fewer_than_half_cannot_move_the_median_far() -> None:
    rows = torch.tensor([[1.0], [1.1], [0.9], [1e30], [-1e30], [1e30], [1.05]])
    assert 0.9 <= float(aggregators.median()(rows)) <= 1.1


def test_the_median_pays_no_heed_to_weights() -> None:
    rows = torch.tensor([[1.0], [2.0], [30.0]])
    assert aggregators.median()(rows, torch.tensor([1.0, 1.0, 100.0])).tolist() == [2.0]


@given(matrices, st.data())
def test_the_mean_is_numpys_average(rows: np.ndarray, data: Any) -> None:
    weights = data.draw(arrays(np.float64, len(rows), elements=st.floats(0.01, 100)))
    found = aggregators.mean()(torch.from_numpy(rows), torch.from_numpy(weights)).numpy()
    np.testing.assert_allclose(found, np.average(rows, axis=0, weights=weights), rtol=1e-12, atol=1e-6)
    np.testing.assert_allclose(aggregators.mean()(torch.from_numpy(rows)).numpy(), rows.mean(0), rtol=1e-12, atol=1e-6)


def test_thousands_of_rows_do_not_drown_each_other() -> None:
    rows = torch.full((20_001, 1), 1e-4)
    rows[0] = 1e4
    assert float(aggregators.mean()(rows)) == pytest.approx((1e4 + 2.0) / 20_001, rel=1e-7)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_by_examples_uniform_and_by_a_callable() -> None:
    examples, clients = torch.tensor([[3.0], [5.0]]), ["a", "b"]
    assert aggregators.mean().weigh(examples, clients).tolist() == [[3.0], [5.0]]
    assert aggregators.mean(weights="uniform").weigh(examples, clients).tolist() == [[1.0], [1.0]]
    seen: list[Any] = []

    def roots(given: torch.Tensor, names: Any) -> torch.Tensor:
        seen.append(list(names))
        return given.sqrt()

    found = aggregators.mean(weights=roots).weigh(examples, clients)
    assert found.dtype == torch.float64 and found[:, 0].tolist() == pytest.approx([3**0.5, 5**0.5])
    assert seen == [["a"], ["b"]], "a weight depends on its client alone, whoever shares its tile"


@pytest.mark.parametrize(
    "weights", [lambda e, c: -e, lambda e, c: e * torch.nan, lambda e, c: e[:, 0], lambda e, c: e / 0],
    ids=["negative", "nan", "another shape", "infinite"],
)  # fmt: skip
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"weights=.*finite weights of at least 0, of shape \((2|1), 1\)"):
        aggregators.mean(weights=weights).weigh(torch.ones(2, 1), ["a", "b"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "example"}, "weights='example'"),
        ({"weights": 1}, "weights=1"),
        ({"denominator": "n"}, "denominator='n'"),
        ({"cap": 0.0}, "cap=0.0"),
        ({"cap": float("inf")}, "cap=inf.*finite"),
        ({"cap": True}, "cap=True"),
        ({"cap": 5.0, "clip": 2.0}, "cap=5.0.*left out with clip="),
        ({"denominator": "expected"}, 'denominator=.expected.*weights="uniform"'),
    ],
)
def test_wrong_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        aggregators.mean(**options)


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_a_callable_weighs_a_round(engine: str) -> None:
    weights = {"c0": 3.0, "c1": 0.0, "c2": 1.0}

    def by_name(examples: torch.Tensor, clients: Any) -> torch.Tensor:
        return torch.tensor([[weights[c]] for c in clients])

    process = Process(
        scalar_model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), engine=engine,
        aggregator=aggregators.mean(weights=by_name),
    )  # fmt: skip
    state, _ = process.next(process.init(), quadratics((1.0, 1.0, 1.0), (1.0, 50.0, 5.0)))
    assert float(process.vector(state)) == pytest.approx(0.1 * (3 * 1 + 5) / 4, abs=1e-12)
    with pytest.raises(InvalidArgument, match=r"round 1: all 1 clients of the cohort have weight 0"):
        process.next(process.init(), quadratics((1.0, 1.0, 1.0), (1.0, 50.0, 5.0)), ["c1"])


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("weights", ["examples", lambda examples, clients: examples], ids=["examples", "callable"])
def test_a_client_above_the_cap_is_named_before_it_counts(engine: str, weights: Any) -> None:
    data, plan = quadratics((1.0,) * 3, (1.0, 2.0, 3.0), sizes=(2, 8, 4)), local_sgd(0.1, steps=1, batch_size=None)
    rule = aggregators.mean(weights=weights, cap=7.5)
    process = Process(scalar_model(), fedavg(plan), engine=engine, aggregator=rule)
    with pytest.raises(CompositionError, match=r"c1 has a weight of 8, above the cap of 7\.5.*mean\(cap=\.\.\.\)"):
        process.next(process.init(), data)
    process = Process(scalar_model(), fedavg(plan), engine=engine, aggregator=aggregators.mean(weights=weights, cap=8))
    state, _ = process.next(process.init(), data)
    assert float(process.vector(state)) == pytest.approx(0.1 * (2 + 16 + 12) / 14)


@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("count", [3, 4])
def test_scaffold_under_the_median(engine: str, count: int) -> None:
    """The rule acts on both parts: x moves by the median, c by count / population times the median."""
    a, b = (1.0, 2.0, 3.0, 1.5)[:count], (1.0, -1.0, 4.0, 2.0)[:count]
    process = Process(
        scalar_model(),
        scaffold(local_sgd(0.1, steps=2, batch_size=None)),
        engine=engine,
        aggregator=aggregators.median(),
    )
    state, _ = process.next(process.init(), quadratics(a, b))
    ends = [bi * (1 - (1 - 0.1 * ai) ** 2) for ai, bi in zip(a, b, strict=True)]
    assert float(process.vector(state)) == pytest.approx(np.median(ends), abs=1e-12)
    assert float(state.algorithm.variate) == pytest.approx(np.median([-e / 0.2 for e in ends]), abs=1e-12)
    part = ["c0", "c2"]
    state, _ = process.next(process.init(), quadratics(a, b), part)
    both = [ends[0], ends[2]]
    assert float(state.algorithm.variate) == pytest.approx(2 / count * np.median([-e / 0.2 for e in both]), abs=1e-12)
