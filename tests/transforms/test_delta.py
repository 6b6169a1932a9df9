"""The downlink: clients know what the server thinks they know, and are sent as few bytes as it says."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model
from registry import ALGORITHMS, MODELS
from torch import Tensor

import atoll
from atoll import sampling
from atoll.algorithms import fedavg, ifca
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import (
    PayloadError,
    clip_norm,
    delta,
    eden,
    entropy_code,
    error_feedback,
    half,
    power_sgd,
    quantize,
    rand_k,
    top_k,
)
from atoll.transforms.delta import HEADER, WINDOW, Message, Told

PLAN = local_sgd(0.1, epochs=1, batch_size=2)


def walk(length: int, rounds: int) -> list[Tensor]:
    """Models that move."""
    draw = torch.Generator().manual_seed(0)
    return list(torch.randn(rounds, length, generator=draw).cumsum(0))


def test_the_reference_follows_the_model_by_hand() -> None:
    """One number a round: what is left out now is sent later, since it is still part of the difference."""
    link = delta(top_k(0.5))
    told, _ = link.advance(link.init(torch.zeros(2)), torch.tensor([3.0, 2.0]), 0, 1)
    assert told.reference.tolist() == [3.0, 0.0]
    told, _ = link.advance(told, torch.tensor([4.0, 2.0]), 0, 2)
    assert told.reference.tolist() == [3.0, 2.0]
    told, _ = link.advance(told, torch.tensor([4.0, 2.0]), 0, 3)
    assert told.reference.tolist() == [4.0, 2.0]


@pytest.mark.parametrize(
    "stages", [(top_k(0.1),), (quantize(4),), (eden(1),), (top_k(0.2), quantize(4), entropy_code())]
)
def test_what_clients_know_comes_near_a_model_that_rests(stages: Any) -> None:
    link, model = delta(*stages), walk(500, 1)[0]
    told, off = link.init(torch.zeros(500)), []
    for round in range(1, 40):
        told, _ = link.advance(told, model, 0, round)
        off.append(float((told.reference - model).norm() / model.norm()))
    assert off[-1] < 0.05 and all(b <= a + 1e-6 for a, b in pairwise(off))


@pytest.mark.parametrize("stages", [(quantize(4),), (top_k(0.1), half()), (eden(2), entropy_code())])
def test_clients_arrive_where_the_server_is_with_and_without_missed_rounds(stages: Any) -> None:
    link, models = delta(*stages, full_every=5), walk(300, 13)
    told, sent = link.init(models[0]), list[Message]()
    references = [told.reference]
    for round in range(1, 13):
        told, message = link.advance(told, models[round], 7, round)
        references.append(told.reference)
        sent.append(message)
        assert (message.base == -1) == (round % 5 == 0) and message.size == int(told.sizes[-1])
    for start in (0, 3, 7):
        known = references[start]
        for message in sent[start:]:
            known = link.receive(known, message, 7, known)
        assert torch.equal(known, told.reference)
    late = None
    for message in sent[9:]:  # from a whole model on nothing needs to be known
        late = link.receive(late, message, 7, models[0])
    assert late is not None and torch.equal(late, told.reference)


def test_a_client_that_is_elsewhere_notices() -> None:
    link, models = delta(quantize(4)), walk(50, 3)
    told = link.init(models[0])
    _, message = link.advance(told, models[1], 0, 1)
    with pytest.raises(PayloadError, match=r"round 2 is not the server's: its hash differs.*whole model"):
        link.receive(told.reference + 1e-6, message, 0, models[0])
    with pytest.raises(PayloadError, match=r"not the server's"):
        link.receive(told.reference, message._replace(check=bytes(32)), 0, models[0])
    with pytest.raises(PayloadError, match=r"goes on from the reference of round 1, which is not here"):
        link.receive(None, message, 0, models[0])
    with pytest.raises(PayloadError, match="another layout"):
        link.receive(torch.zeros(51), message, 0, torch.zeros(51))
    with pytest.raises(PayloadError, match="whole model of this layout"):
        link.receive(None, message._replace(base=-1, wire=torch.zeros(1, 51)), 0, models[0])


def test_bytes_of_those_who_missed_rounds() -> None:
    link = delta(quantize(4))
    step = HEADER + 500 + 4
    told = link.init(torch.zeros(1000))
    for round in range(1, 20):
        told, _ = link.advance(told, torch.ones(1000) * round, 0, round)
    whole = HEADER + 4000
    assert [link.bytes(told, 19, last) for last in (18, 17, 12, 11, 0, None)] == [
        step, 2 * step, 7 * step, whole, whole, whole,
    ]  # fmt: skip
    assert link.bytes(Told(torch.zeros(10**6), torch.ones(WINDOW, dtype=torch.int64)), 100, 100 - WINDOW) == WINDOW
    assert link.bytes(Told(torch.zeros(10**6), torch.ones(WINDOW, dtype=torch.int64)), 100, 99 - WINDOW) > 4 * 10**6


def test_history_counts_what_each_client_is_sent() -> None:
    kind = MODELS["perceptron"]
    cohorts = [["c0", "c1"], ["c0"], ["c2", "c0"], ["c1"], ["c1", "c2"]]
    result = atoll.simulate(
        kind.model(), kind.data((4, 3, 5)), algorithm=fedavg(PLAN), rounds=5, cohort=sampling.sequence(cohorts),
        downlink=delta(quantize(4), full_every=4), progress=False,
    )  # fmt: skip
    size = kind.model().size
    whole, step = HEADER + 8 * size, HEADER + -(-size // 2) + 4
    assert 3 * step < whole
    expected = [2 * whole, step, whole + step, 3 * step, min(whole, whole + step) + min(whole, whole + 2 * step)]
    expected[4] = whole + whole  # the last message was the whole model: round 5 begins with it
    assert [r.bytes_down for r in result.history] == expected


@pytest.mark.parametrize("name", [n for n, m in ALGORITHMS.items() if not m.several])
def test_a_downlink_that_loses_nothing_changes_nothing(name: str) -> None:
    method = ALGORITHMS[name]
    kind = MODELS["batch norm, mean" if method.norms else "perceptron"]
    data, vectors = kind.data((6, 5, 8)), []
    for link in ((), (top_k(1.0),)):
        process = Process(kind.model(), method.build(method.plan(epochs=1, batch_size=3)), downlink=link)
        state = process.init()
        for _ in range(3):
            state, _ = process.next(state, data)
        vectors.append(process.vector(state))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-10)


def test_clients_train_from_what_they_know_and_move_the_servers_model() -> None:
    """x <- x + q (b - w) with w behind x: by hand on one quadratic, where a step of bfloat16 is lost on the way."""
    process = Process(
        scalar_model(1.0), fedavg(local_sgd(0.5, steps=1, batch_size=None)), downlink=(half("bfloat16"),), engine="loop"
    )
    state, x, w = process.init(), 1.0, 1.0
    data = quadratics((1.0,), (10.0,))
    for _ in range(4):
        state, _ = process.next(state, data)
        x = x + 0.5 * (10.0 - w)
        w = w + float(torch.tensor(x - w, dtype=torch.float64).to(torch.bfloat16))
        assert float(process.vector(state)) == pytest.approx(x, abs=1e-12)
        assert float(state.downlink.reference) == pytest.approx(w, abs=1e-12)


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_a_resumed_run_has_the_bits_and_the_bytes_of_one(engine: str, tmp_path: Path) -> None:
    kind = MODELS["perceptron"]

    def run(rounds: int, **options: Any) -> atoll.Result:
        return atoll.simulate(
            kind.model(), kind.data((4, 3, 5, 4)), algorithm=fedavg(PLAN), cohort=2, rounds=rounds, engine=engine,
            transforms=(error_feedback(top_k(0.2)),), downlink=delta(quantize(4), entropy_code(), full_every=5),
            progress=False, **options,
        )  # fmt: skip

    whole = run(7)
    run(4, directory=tmp_path)
    resumed = run(7, directory=tmp_path, resume=True)
    assert torch.equal(resumed.vector, whole.vector)
    assert [r.bytes_down for r in resumed.history] == [r.bytes_down for r in whole.history]


def test_a_round_without_clients_still_moves_the_reference() -> None:
    kind = MODELS["perceptron"]
    process = Process(kind.model(), fedavg(PLAN), downlink=(top_k(0.1),))
    state, _ = process.next(process.init(), kind.data((4, 3)))
    model = process.vector(state)
    before = float((state.downlink.reference - model).norm())
    state, metrics = process.next(state, kind.data((4, 3)), [])
    assert metrics["bytes_down"] == 0 and float((state.downlink.reference - model).norm()) < before


def test_the_downlink_is_part_of_the_identity() -> None:
    kind = MODELS["perceptron"]
    specs = [
        str(Process(kind.model(), fedavg(PLAN), downlink=d).spec)
        for d in ((), (half(),), (quantize(8),), delta(half(), full_every=3))
    ]
    assert len(set(specs)) == 4 and "downlink" not in specs[0]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((rand_k(0.1),), r"rand_k cannot stand inside the downlink.*Use rand_k without the downlink"),
        ((quantize(2),), r"quantize cannot stand inside the downlink.*4 bits or more"),
        ((clip_norm(1.0),), r"clip_norm cannot stand inside the downlink"),
        ((error_feedback(top_k(0.1)),), r"error_feedback cannot stand inside the downlink"),
        ((power_sgd(2),), r"power_sgd cannot stand in the downlink.*bases.*Use top_k"),
        ((entropy_code(), half()), r"entropy_code cannot stand inside the downlink"),
        ((half(), top_k(0.1)), r"top_k cannot stand after half"),
    ],
)
def test_what_cannot_stand_in_the_downlink(stages: Any, said: str) -> None:
    with pytest.raises(CompositionError, match=said):
        Process(scalar_model(), fedavg(PLAN), downlink=stages)


def test_wrong_downlinks() -> None:
    plan = fedavg(PLAN)
    for given, said in (
        (half(), r"downlink='half'.*downlink=\(half\(\.\.\.\),\)"),
        ("half", "downlink='half'"),
        (3, "downlink=3"),
        (("half",), "transforms='half'"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            Process(scalar_model(), plan, downlink=given)  # type: ignore[arg-type]
    for every in (0, 1.5, True):
        with pytest.raises(InvalidArgument, match="full_every="):
            delta(half(), full_every=every)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="stages="):
        delta()
    process = Process(MODELS["perceptron"].model(), ifca(PLAN, clusters=2), downlink=(half(),))
    with pytest.raises(CompositionError, match="the downlink compresses one model, but ifca sends several"):
        process.init()
