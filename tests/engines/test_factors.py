"""Weights that stand as factors are the weights themselves, whatever is done to them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import MODELS, Factored
from torch import Tensor

from atoll.algorithms import Algorithm, fedavg
from atoll.algorithms.base import Memory, Message
from atoll.algorithms.fedavg import averaging
from atoll.cohort import Cohort
from atoll.data import FederatedDataset
from atoll.engines import Loop, Vectorized, Workers
from atoll.engines.arena import Arena
from atoll.engines.factors import Factors, Use, factored, most
from atoll.engines.schedule import Members
from atoll.engines.steps import by_factors
from atoll.local import Plan, local_sgd
from atoll.model import Model
from atoll.rounds import Process
from atoll.server import sgd
from atoll.spec import record
from atoll.vectors import Layout, Update

ROWS, HIGH, WIDE = 4, 3, 5

groups = st.sampled_from([[0, 1, 2, 3], [0, 1], [1, 2, 3], [0, 2], [3]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(groups, st.integers(1, 3), st.sampled_from([1.0, 0.7])), max_size=7), st.integers(1, 9))
def test_any_sequence_of_steps_equals_the_steps_on_the_weights(
    steps: list[tuple[list[int], int, float]], room: int
) -> None:
    draw = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    base = randn(HIGH, WIDE)
    factors, dense = Factors(base, ROWS, room, Arena()), base.expand(ROWS, HIGH, WIDE).clone()
    for rows, count, beta in steps:
        whole = rows == list(range(rows[0], rows[-1] + 1))
        members: Members = slice(rows[0], rows[-1] + 1) if whole else torch.tensor(rows)
        slope, x = randn(len(rows), count, HIGH), randn(len(rows), count, WIDE)
        factors.take(members).append(slope, x, beta=beta, alpha=-0.3)
        dense[rows] = base + beta * (dense[rows] - base) - 0.3 * slope.mT @ x
        part = factors.take(members)
        torch.testing.assert_close(part.forward(x), x @ dense[rows].mT)
        torch.testing.assert_close(part.backward(slope), slope @ dense[rows])
        assert part.shape == (len(rows), HIGH, WIDE)
    weight = torch.rand(ROWS, generator=draw, dtype=torch.float64)
    factors.add_total(weight, total := randn(HIGH, WIDE).zero_())
    torch.testing.assert_close(total, torch.tensordot(weight, dense - base, 1))
    for out in (torch.empty(ROWS, HIGH, WIDE).double(), torch.empty(ROWS, HIGH * WIDE + 2).double()):
        view = out if out.ndim == 3 else out[:, 1 : 1 + HIGH * WIDE].view(ROWS, HIGH, WIDE)
        factors.changed(view)
        torch.testing.assert_close(view, dense - base)


def test_what_is_factored_follows_from_the_shape_and_the_examples() -> None:
    assert most(200, 784, below=False) == 119 and most(200, 784, below=True) == 79
    assert most(100, 100, below=False) == 0, "small weights stay in the cache"
    uses = {0: Use(1, 119), 2: Use(8, 119), 4: Use(1, 0)}
    assert factored(uses, 14) == {0: 14, 2: 112}
    assert factored(uses, 15) == {0: 15}
    assert factored(uses, 0) == {}


LAYOUT = Layout(("a", "b"), ((2, 2), (3,)))
VECTOR = torch.zeros(7)
ROWS_OF_ONE = VECTOR.expand(3, -1)


@pytest.mark.parametrize(
    ("options", "changed", "possible"),
    [
        ({}, {}, True),
        ({"momentum": 0.5}, {}, False),
        ({"weight_decay": 0.1}, {}, False),
        ({"optimizer": "adam"}, {}, False),
        ({"schedule": lambda number, step: 0.5**number}, {}, True),
        ({"schedule": lambda number, step: 0.5**step}, {}, False),
        ({}, {"rows": torch.zeros(3, 7)}, False),
        ({}, {"pull": 0.1, "anchor": VECTOR}, True),
        ({}, {"pull": 0.1, "anchor": ROWS_OF_ONE}, True),
        ({}, {"pull": 0.1, "anchor": torch.zeros(7)}, False),
        ({}, {"pull": 0.1, "anchor": torch.zeros(3, 7)}, False),
        ({}, {"shift": torch.zeros(7)}, False),
        ({}, {"train": LAYOUT.mask(["a"])}, True),
        ({}, {"train": torch.arange(7) > 2}, False),
    ],
)
def test_steps_that_can_be_taken_on_factors(options: dict[str, Any], changed: dict[str, Any], possible: bool) -> None:
    arguments: dict[str, Any] = {"rows": ROWS_OF_ONE, "anchor": None, "pull": 0.0, "shift": None, "train": None}
    assert by_factors(local_sgd(0.1, **options), 1, 3, LAYOUT, **(arguments | changed)) is possible


def variant(plan: Plan, work: Callable[[Cohort, Tensor], Any]) -> Algorithm:
    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        start = cohort.rows(message.vector)
        return cohort.update(work(cohort, start), start), memory

    return averaging(record("variant"), local, plan, sgd())


PLAN = local_sgd(0.1, epochs=2, batch_size=4)
SHORT = local_sgd(0.1, epochs=1, batch_size=3, schedule=lambda number, step: 1.0 / (1 + number))


@pytest.mark.parametrize(
    "make",
    [
        lambda: variant(PLAN, lambda c, s: c.sgd(s, PLAN, anchor=s, pull=0.4)),
        lambda: variant(PLAN, lambda c, s: c.sgd(s, PLAN, train=c.model.layout.mask(c.model.layout.names[:1]))),
        lambda: variant(PLAN, lambda c, s: c.sgd(s, PLAN, train=c.model.layout.mask(c.model.layout.names[1:]))),
        lambda: variant(SHORT, lambda c, s: c.sgd(s, SHORT)),
        lambda: variant(PLAN, lambda c, s: c.sgd(c.sgd(s, PLAN).rows, PLAN, purpose="again")),
    ],
    ids=["pulled to the start", "only the weight", "all but the weight", "rates by round", "twice"],
)
@pytest.mark.parametrize("name", ["perceptron", "attention"])
def test_rounds_on_factors_are_those_of_the_specification(make: Callable[[], Algorithm], name: str) -> None:
    kind, ends = MODELS[name], []
    data = kind.data((6, 2, 7, 4, 11))
    for engine in (Loop(), Factored(), Factored(tile=2), Factored(tile=1)):
        process = Process(kind.model(), make(), engine=engine)
        state = process.init()
        for _ in range(3):
            state, _ = process.next(state, data)
        ends.append(process.vector(state))
    for found in ends[1:]:
        torch.testing.assert_close(found, ends[0], rtol=0, atol=1e-9)


def test_memory_of_the_last_round_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors lie in memory that was used before: what was not written must not be read."""
    monkeypatch.setattr("atoll.engines.arena.ARENA_BYTES", 0)
    whole = Arena.empty

    def dirty(self: Arena, *shape: int, like: Tensor) -> Tensor:
        return whole(self, *shape, like=like).fill_(float("nan"))

    kind = MODELS["perceptron"]
    data = kind.data((6, 2, 7, 4, 11))
    expected = Process(kind.model(), fedavg(PLAN), engine=Loop())
    end, _ = expected.next(expected.init(), data)
    monkeypatch.setattr(Arena, "empty", dirty)
    process = Process(kind.model(), fedavg(PLAN), engine=Factored())
    state, _ = process.next(process.init(), data)
    torch.testing.assert_close(process.vector(state), expected.vector(end), rtol=0, atol=1e-9)


def test_many_workers_of_factors_give_the_bits_of_one() -> None:
    rng = np.random.default_rng(0)
    data = FederatedDataset.from_arrays(
        {
            f"c{i}": (rng.normal(size=(n, 256)).astype("f4"), rng.integers(0, 3, n))
            for i, n in enumerate((30, 9, 21, 60))
        }
    )
    ends = []
    for engine in (Vectorized(tile=1), Workers(Vectorized(tile=1), 2)):
        module = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 3))
        torch.manual_seed(0)
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.05)
        process = Process(Model(module, "cross_entropy"), fedavg(local_sgd(0.1, batch_size=10)), engine=engine)
        state, _ = process.next(process.init(), data)
        assert process.engine.describe()["factors"] == {"0.weight": 64}
        ends.append(process.vector(state))
        engine.stop()
    assert torch.equal(*ends)
