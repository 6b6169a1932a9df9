"""Gradients and curvature on the minibatches of a plan: the slow path that methods with steps of their own take."""

import pytest
import torch
from registry import ENGINES, MODELS
from torch import Tensor

from atoll.algorithms import fedavg
from atoll.cohort import Cohort
from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.local import Plan, local_sgd
from atoll.rounds import Process

SIZES = (6, 2, 7, 4, 11)
PLANS = {
    "passes": local_sgd(0.1, epochs=2, batch_size=4),
    "steps": local_sgd(0.1, steps=5, batch_size=3, shuffle=False),
    "whole": local_sgd(0.1, steps=3, batch_size=None),
    "part": local_sgd(0.1, epochs=2, batch_size=4, work=lambda client, round: 0.5 if client == "c2" else 1.0),
}
FAST = ("rows", "rows, tile of 3", "single")


def tiles(name: str, engine: Engine, plan: Plan, data: FederatedDataset) -> list[Cohort]:
    process = Process(MODELS[name].model(), fedavg(plan), engine=engine)
    state = process.init(seed=3)
    process.engine.prepare(process, data)
    task = process.open(state, data.clients, len(data))
    return [cohort for cohort, _ in process.engine.tiles(process, task, data, state.memory)]


def by_client(cohorts: list[Cohort], rows: dict[str, Tensor], plan: Plan, step: int) -> dict[str, list[Tensor]]:
    """Everything a step says, for each client."""
    out: dict[str, list[Tensor]] = {}
    for cohort in cohorts:
        at = torch.stack([rows[c] for c in cohort.clients])
        said = cohort.minibatch(at, plan, step, purpose="mine")
        curved = cohort.curvature(at, at.flip(1).cos(), plan, step, purpose="mine")
        for i, client in enumerate(cohort.clients):
            out[client] = [*(t[i].clone() for t in said), curved[i].clone()]
    return out


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["perceptron", "dropout", "batch norm, mean", "convolution", "recurrent", "embedding"])
def test_engines_agree_on_a_minibatch(name: str, plan: Plan) -> None:
    kind = MODELS[name]
    data = kind.data((6, 3, 7, 4, 11) if plan.batch_size == 3 else SIZES)
    if kind.pairs and plan.batch_size == 3:
        plan = local_sgd(0.1, steps=5, batch_size=2, shuffle=False)
        data = kind.data((6, 2, 8, 4, 12))
    draw = torch.Generator().manual_seed(5)
    rows = {
        c: kind.model().init() + 0.1 * torch.randn(kind.model().size, generator=draw).double() for c in data.clients
    }
    for step in (0, 1, 4):
        expected = by_client(tiles(name, ENGINES["loop"](), plan, data), rows, plan, step)
        if step == 0:
            assert all(float(said[0].abs().max()) > 0 for said in expected.values())
            assert any(float(said[4].abs().max()) > 0 for said in expected.values())
        for engine in FAST:
            found = by_client(tiles(name, ENGINES[engine](), plan, data), rows, plan, step)
            for client in data.clients:
                for one, other in zip(found[client], expected[client], strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("engine", ["loop", *FAST])
@pytest.mark.parametrize("name", ["dropout", "batch norm, local"])
def test_steps_by_hand_are_those_of_sgd(name: str, engine: str, plan: Plan) -> None:
    kind = MODELS[name]
    if kind.pairs and plan.batch_size == 3:
        pytest.skip("leaves batches of one")
    for cohort in tiles(name, ENGINES[engine](), plan, kind.data(SIZES)):
        start = cohort.rows(kind.model().init())
        trained = cohort.sgd(start, plan)
        y, buffers = start.clone(), cohort.buffers
        loss, seen = torch.zeros(len(start), 1).double(), torch.zeros(len(start), 1).double()
        for step in range(int(cohort.steps(plan).max())):
            said = cohort.minibatch(y, plan, step, buffers=buffers)
            y, buffers = y - 0.1 * said.gradient, said.buffers
            loss, seen = loss + said.loss * said.examples, seen + said.examples
        for found, expected in ((y, trained.rows), (buffers, trained.buffers), (loss, trained.loss)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert torch.equal(seen, trained.examples) and torch.equal(cohort.steps(plan).double(), trained.steps.double())


@pytest.mark.parametrize("engine", ["loop", *FAST])
def test_curvature_is_the_change_of_the_gradient(engine: str) -> None:
    kind, plan = MODELS["perceptron"], local_sgd(0.1, epochs=1, batch_size=4)
    for cohort in tiles("perceptron", ENGINES[engine](), plan, kind.data(SIZES)):
        at = cohort.rows(kind.model().init()).clone()
        way = torch.linspace(-1, 1, at.shape[1]).double().expand_as(at)
        sides = [cohort.minibatch(at + h * way, plan, 0).gradient for h in (1e-5, -1e-5)]
        torch.testing.assert_close(
            cohort.curvature(at, way, plan, 0), (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_curvature(name: str) -> None:
    kind, plan = MODELS[name], local_sgd(0.1, epochs=1, batch_size=None)
    found = []
    for engine in ("loop", "auto"):
        for cohort in tiles(name, ENGINES[engine](), plan, kind.data((6,))):
            at = cohort.rows(kind.model().init()).clone()
            found.append(cohort.curvature(at, at.flip(1).cos(), plan, 0))
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_other_purposes_give_other_minibatches() -> None:
    kind, plan = MODELS["perceptron"], local_sgd(0.1, epochs=1, batch_size=2)
    (cohort,) = tiles("perceptron", ENGINES["rows"](), plan, kind.data((12,)))
    at = cohort.rows(kind.model().init())
    said = [cohort.minibatch(at, plan, 0, purpose=p).gradient for p in ("one", "two", "one")]
    assert torch.equal(said[0], said[2]) and not torch.allclose(said[0], said[1])
