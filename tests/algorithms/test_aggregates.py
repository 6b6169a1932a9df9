"""What methods make of aggregates: the model they are judged by, expected denominators, rules and channels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import quadratics, scalar_model
from registry import ALGORITHMS, MODELS, Method

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import Algorithm, feddyn, fedexp, fednova, ifca, qfedavg
from atoll.engines import Vectorized, Workers
from atoll.errors import CompositionError
from atoll.local import local_sgd
from atoll.rounds import Process

PLAN = local_sgd(0.1, steps=3, batch_size=None)
EXPECTED = aggregators.mean(weights="uniform", denominator="expected")


@pytest.mark.parametrize("method", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_history_evaluation_and_result_speak_of_the_same_global_model(method: Method) -> None:
    kind = MODELS["batch norm, mean" if method.norms else "perceptron"]
    base = kind.data((6, 4, 8))
    clients = {c: tuple(base[c].train.values()) for c in base.clients}
    data = atoll.FederatedDataset.from_arrays(clients, test=clients)
    algorithm = method.build(method.plan(epochs=1, batch_size=4))
    result = atoll.simulate(kind.model(), data, algorithm=algorithm, rounds=2, progress=False)
    told = result.history[-1].test["loss"]
    assert told == pytest.approx(result.evaluate(data).metrics["loss"], rel=1e-9)


def test_the_global_model_of_clusters_is_the_largest_wherever_it_is_evaluated() -> None:
    data = quadratics([1.0] * 5, [0.0, 10.0, 10.0, 10.0, 10.0])
    ends = []
    for engine in (Vectorized(tile=2), Workers(Vectorized(tile=2), 2)):
        starts = [torch.tensor([v], dtype=torch.float64) for v in (1.0, 9.0)]
        process = Process(scalar_model(), ifca(PLAN, clusters=2, starts=starts), engine=engine)
        state = process.init()
        for _ in range(3):
            state, _ = process.next(state, data)
        found = process.evaluate(state, data, split="train")
        alone = atoll.evaluate(process.model, process.vector(state), data, split="train")
        assert torch.equal(found.values, alone.values) and float(process.vector(state)) > 5
        ends.append(found.values)
        engine.stop()
    assert torch.equal(*ends)


COHORTS = [["c0", "c1"], ["c2", "c3", "c0"], ["c1", "c2", "c3"]]


def test_feddyn_reaches_the_optimum_under_an_expected_denominator_too() -> None:
    data = quadratics([1.0] * 4, [1.0, 2.0, 3.0, 4.0])
    for aggregator in (aggregators.mean(), EXPECTED):
        process = Process(scalar_model(), feddyn(PLAN, alpha=0.5), aggregator=aggregator)
        state = process.init()
        for number in range(900):
            state, _ = process.next(state, data, COHORTS[number % 3], expected=4.0)
        assert float(process.vector(state)) == pytest.approx(2.5, abs=0.02), aggregator.spec


def test_fedexp_under_an_expected_denominator_extrapolates_what_clients_disagree_alone() -> None:
    data = quadratics([1.0], [2.5])
    step = 2.5 * (1 - 0.9**3)
    for aggregator, share in ((aggregators.mean(), 1.0), (EXPECTED, 0.25)):
        process = Process(scalar_model(), fedexp(PLAN, average=False), aggregator=aggregator)
        state, _ = process.next(process.init(), data, expected=4.0)
        np.testing.assert_allclose(process.vector(state).numpy(), [share * step], rtol=1e-12)


@pytest.mark.parametrize("make", [lambda: fednova(PLAN), lambda: qfedavg(PLAN, q=1.0), lambda: fedexp(PLAN)])
def test_numbers_of_other_units_are_not_cut_by_a_channel(make: Callable[[], Algorithm]) -> None:
    with pytest.raises(CompositionError, match=r'secure_sum cuts every number at one clip.*use channel="plain"'):
        Process(scalar_model(), make(), channel=transforms.secure_sum(clip=1.0, weight_cap=20.0))


def test_clusters_are_refused_under_a_rule_that_chooses_among_clients() -> None:
    with pytest.raises(CompositionError, match=r"ifca is only right when it is added up.*median.*Use aggregators.mean"):
        Process(scalar_model(), ifca(PLAN, clusters=3), aggregator=aggregators.median())
