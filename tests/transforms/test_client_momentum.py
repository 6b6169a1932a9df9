"""Client momentum: the average over a client's rounds, by hand; what is added up goes through."""

from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model

from atoll import aggregators
from atoll.algorithms import fedavg, scaffold
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import client_momentum

ONE_STEP = local_sgd(0.5, steps=1, batch_size=None)
engines = pytest.mark.parametrize("engine", ["loop", "auto"])


@engines
def test_momenta_by_hand(engine: str) -> None:
    """One client, x <- x + m, update (4 - x) / 2, beta 3/4: m is 2, then 3/2 + 1/4, then 21/16 + 1/32."""
    process = Process(scalar_model(), fedavg(ONE_STEP), transforms=(client_momentum(0.75),), engine=engine)
    state, data, path = process.init(), quadratics((1.0,), (4.0,)), []
    for _ in range(3):
        state, _ = process.next(state, data)
        path.append(float(process.vector(state)))
    assert path == pytest.approx([2.0, 3.75, 3.75 + 21 / 16 + 1 / 32], rel=1e-15)


@engines
def test_a_client_goes_on_from_its_last_visit(engine: str) -> None:
    process = Process(scalar_model(), fedavg(ONE_STEP), transforms=(client_momentum(0.5),), engine=engine,
                      aggregator=aggregators.mean(weights="uniform"))  # fmt: skip
    data, state = quadratics((1.0, 1.0), (4.0, 8.0)), process.init()
    state, _ = process.next(state, data, ["c0"])  # x = 2, m_0 = 2
    state, _ = process.next(state, data, ["c1"])  # m_1 = 3, x = 5
    state, _ = process.next(state, data)  # m_0 = (2 - 1/2) / 2, m_1 = (3 + 3/2) / 2
    assert float(process.vector(state)) == pytest.approx(5 + (0.75 + 2.25) / 2, rel=1e-15)


@engines
def test_what_is_added_up_goes_through_as_it_is(engine: str) -> None:
    """SCAFFOLD's c stays the mean of the clients' own variates."""
    process = Process(scalar_model(), scaffold(ONE_STEP), transforms=(client_momentum(0.9),), engine=engine)
    state, data = process.init(), quadratics((1.0, 2.0, 1.5), (4.0, 8.0, 1.0))
    for cohort in (["c0", "c1"], ["c1", "c2"], ["c0", "c2"], None):
        state, _ = process.next(state, data, cohort)
    layout = state.memory.layout
    kept = layout.view(state.memory.rows(list(data.clients), torch.zeros(layout.size, dtype=torch.float64)))
    own = next(t for n, t in kept.items() if n.startswith("algorithm/"))
    assert float(state.algorithm.variate) == pytest.approx(float(own.mean()), rel=1e-12)
    assert not bool(kept["transforms/0/momentum"][:, 1:].any())


@engines
def test_without_a_past_it_is_not_there(engine: str) -> None:
    vectors = []
    for stages in ((), (client_momentum(0.0),)):
        process = Process(scalar_model(), fedavg(ONE_STEP), transforms=stages, engine=engine)
        state = process.init()
        for _ in range(3):
            state, _ = process.next(state, quadratics((1.0, 2.0), (4.0, 8.0)))
        vectors.append(float(process.vector(state)))
    assert vectors[0] == pytest.approx(vectors[1], rel=1e-15)


@engines
def test_a_refused_client_keeps_the_momentum_it_had(engine: str) -> None:
    process = Process(scalar_model(), fedavg(ONE_STEP), transforms=(client_momentum(0.5),), engine=engine,
                      aggregator=aggregators.multi_krum(byzantine=1))  # fmt: skip
    state, _ = process.next(process.init(), quadratics((1.0,) * 5, (1.0, 1.1, 1.2, 1.3, 90.0)))
    assert "c4" not in state.memory and "c0" in state.memory


def test_noise_that_differs_from_round_to_round_is_averaged_out() -> None:
    """The variance of independent updates falls to (1 - beta) / (1 + beta) of itself."""
    stage, beta = client_momentum(0.8), 0.8
    draw, memory = torch.Generator().manual_seed(0), {"momentum": torch.zeros(200, 50), "visited": torch.zeros(200, 1)}
    keys: Any = type("K", (), {"split": None})()
    sent = torch.empty(0)
    for _ in range(60):
        sent, memory = stage.encode(torch.randn(200, 50, generator=draw), memory, None, keys)  # type: ignore[assignment]
    assert float(sent.var()) == pytest.approx((1 - beta) / (1 + beta), rel=0.05)


@pytest.mark.parametrize("beta", [1.0, -0.1, True, "0.9", float("nan")])
def test_what_is_no_weight_of_the_past(beta: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"beta=.*number in \[0, 1\)"):
        client_momentum(beta)
