"""Training on another device: everything in its place, the same results, and no waiting within a tile's steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import train
from registry import AGGREGATORS, ALGORITHMS, MODELS, TRANSFORMS, Kind
from standin import DEVICE, NAME, Waits, standin
from torch import Tensor

from atoll import simulation
from atoll.algorithms import Algorithm, fedavg, moon
from atoll.data import FederatedDataset
from atoll.engines import Ray, Vectorized, Workers, placing, resolve
from atoll.errors import CompositionError, InvalidArgument, RunError
from atoll.local import local_sgd
from atoll.privacy import example_level
from atoll.rounds import Process, State

SIZES = (6, 2, 7, 4, 11)
PLAN = local_sgd(0.05, epochs=2, batch_size=4)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    monkeypatch.setitem(placing.KINDS, NAME, lambda: True)
    with standin() as waits:
        yield waits


def run(
    kind: Kind, algorithm: Algorithm, engine: Vectorized, data: FederatedDataset | None = None, **options: Any
) -> tuple[Process, State, Tensor]:
    process = Process(kind.model(), algorithm, engine=engine, **options)
    data = kind.data(SIZES) if data is None else data
    few = list(data.clients)[::2] if len(data.clients) < 10 else list(data.clients)[1:]  # rules need many
    state, _ = train(process, data, 2, [list(data.clients), few])
    return process, state, process.vector(state)


def same(kind: Kind, algorithm: Algorithm, sizes: tuple[int, ...] = SIZES, **options: Any) -> None:
    """The CPU's result, by the same operations in the same place."""
    _, before, expected = run(kind, algorithm, Vectorized(), kind.data(sizes), **options)
    process, state, found = run(kind, algorithm, Vectorized(device=DEVICE), kind.data(sizes), **options)
    assert process.engine.describe()["device"] == str(DEVICE)
    # Factors and products of patches are for CPUs: the same sums in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert type(found) is Tensor and found.device.type == "cpu" and state.buffers.device.type == "cpu"
    names = list(kind.data(sizes).clients)
    nothing = torch.zeros(state.memory.layout.size, dtype=torch.float64)
    kept, others = state.memory.rows(names, nothing), before.memory.rows(names, nothing)
    torch.testing.assert_close(kept, others, rtol=0, atol=1e-9)


FIXED = ("frozen body", "batch norm, frozen", "frozen layers")
"""Models with constants, which are refused."""

UNSEEN = ("recurrent, with projections", "recurrent, dropout")
"""Models whose kernel the stand-in lacks: torch's own LSTM, one client at a time."""


def _kinds() -> list[Any]:
    quick = ("dropout",)
    return [
        pytest.param(name, marks=[] if name in quick else [pytest.mark.slow])
        for name in MODELS
        if name not in (*FIXED, *UNSEEN)
    ]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", _kinds())
def test_every_model_trains_there_as_on_the_cpu(name: str) -> None:
    same(MODELS[name], fedavg(PLAN))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "scaffold" else [pytest.mark.slow]) for n, m in ALGORITHMS.items()]
)
def test_every_algorithm_trains_there_as_on_the_cpu(name: str) -> None:
    method = ALGORITHMS[name]
    kind = MODELS["batch norm, mean" if method.norms else "perceptron"]
    plan = local_sgd(0.05, steps=1, batch_size=None) if method.whole else local_sgd(0.05, epochs=1, batch_size=4)
    algorithm = method.build(plan)
    if algorithm.pooled or algorithm.sampler is not None:
        pytest.skip("its clients are those of another algorithm")
    same(kind, algorithm)


@pytest.mark.slow
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(local_sgd(0.05, optimizer="adam", clip=0.1, epochs=1, batch_size=4), id="whole gradients"),
        pytest.param(local_sgd(0.05, momentum=0.5, weight_decay=0.1, epochs=1, batch_size=4), id="momentum"),
    ],
)
def test_every_rule_steps_there(plan: Any) -> None:
    same(MODELS["perceptron"], fedavg(plan))


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_a_term_through_features_is_gathered_there() -> None:
    same(MODELS["perceptron"], moon(PLAN))


@pytest.mark.slow
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_stage_encodes_there(name: str) -> None:
    stage = TRANSFORMS[name]()
    if stage.client_noise is not None or name == "correlated_noise":
        pytest.skip("its noise is secret: no two runs are the same")
    same(MODELS["perceptron"], fedavg(PLAN), transforms=[stage])


@pytest.mark.slow
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_rule_takes_rows_from_there(name: str) -> None:
    same(MODELS["perceptron"], fedavg(PLAN), (6, 2, 7, 4, 11, 3, 5, 6, 4, 8), aggregator=AGGREGATORS[name]())


def test_waiting_does_not_grow_with_steps_nor_copies_with_rounds(device: Waits) -> None:
    kind = MODELS["dropout"]
    seen: list[tuple[int, int]] = []
    for epochs in (1, 4):
        device.looked = device.copied = 0
        process, _, _ = run(kind, fedavg(local_sgd(0.05, epochs=epochs, batch_size=2)), Vectorized(device=DEVICE))
        seen.append((device.looked, device.copied))
    assert seen[0] == seen[1] and sum(seen[0]) <= 2 * 8, seen
    placed = process.engine._placed  # type: ignore[attr-defined]
    data = kind.data(SIZES)
    assert placed.data(data) is placed.data(data) and placed.data(data).train.fields["x"].device == DEVICE


@pytest.mark.usefixtures("device")
def test_the_stand_in_refuses_what_a_device_refuses() -> None:
    here = torch.ones(3)
    there = here.to(DEVICE)
    assert float((there * 2.0).sum()) == 6.0 and torch.equal(there.cpu(), here)
    with pytest.raises(RuntimeError, match="tensors of the CPU"):
        there + here
    with pytest.raises(TypeError):
        there.numpy()


def test_products_there_are_not_rounded_unasked(device: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, bool, bool]] = set()
    plain = Process.work

    def work(self: Process, *given: Any) -> Any:
        own = torch.backends.cudnn
        seen.add((own.allow_tf32, own.deterministic, own.benchmark))
        return plain(self, *given)

    monkeypatch.setattr(Process, "work", work)
    before = torch.backends.cudnn.allow_tf32
    run(MODELS["perceptron"], fedavg(local_sgd(0.1, steps=1)), Vectorized(device=DEVICE))
    assert seen == {(False, True, False)} and torch.backends.cudnn.allow_tf32 == before


def test_data_that_do_not_fit_say_so(device: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    kind = MODELS["perceptron"]
    data = kind.data(SIZES)
    monkeypatch.setattr(type(data.train), "to", full)
    with pytest.raises(RunError, match=r'do not fit into the memory of standin:0.*device="cpu"'):
        run(kind, fedavg(PLAN), Vectorized(device=DEVICE), data)


@pytest.mark.parametrize("name", FIXED)
def test_models_with_constants_are_refused(name: str, device: Waits) -> None:
    with pytest.raises(CompositionError, match=r'frozen parameters or fixed buffers yet \(.*device="cpu"'):
        run(MODELS[name], fedavg(PLAN), Vectorized(device=DEVICE))


def test_noise_on_examples_is_refused(device: Waits) -> None:
    plan = local_sgd(0.1, privacy=example_level(clip=1.0, noise_multiplier=1.0))
    with pytest.raises(CompositionError, match=r'example-level privacy yet.*device="cpu"'):
        run(MODELS["perceptron"], fedavg(plan), Vectorized(device=DEVICE))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, r"device='tpu' is not allowed.*\"cuda:N\""),
        ({"device": "mps"}, r"device='mps' is not allowed.*\"cuda:N\""),
        ({"device": "cuda", "here": False}, r"device='cuda' is not allowed.*torch finds no such device"),
        ({"device": "cuda", "engine": "loop"}, r"device='cuda' is not allowed.*engine='loop'"),
        ({"device": "cuda", "workers": 2}, r"workers=2 is not allowed.*1 or \"auto\" with device='cuda'"),
        ({"device": "cpu", "engine": Vectorized()}, r"left out with an engine.*Vectorized\(device='cpu'\)"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(placing.KINDS, "cuda", lambda: options.pop("here", True))
    with pytest.raises(InvalidArgument, match=said):
        Process(MODELS["perceptron"].model(), fedavg(PLAN), **{n: v for n, v in options.items() if n != "here"})


@pytest.mark.parametrize("spread", [lambda e: Workers(e, 2), lambda e: Ray(e, 2), lambda e: resolve(e, 2)])
def test_workers_do_not_train_on_the_cpu_in_silence(spread: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(placing.KINDS, "cuda", lambda: True)
    engine = Vectorized(device="cuda")
    assert resolve(engine) is engine
    with pytest.raises(InvalidArgument, match=r"left out with an engine that trains on cuda"):
        spread(engine)


def test_the_cpu_is_what_it_was() -> None:
    kind = MODELS["perceptron"]
    results = [
        simulation.simulate(
            kind.model(), kind.data(SIZES), algorithm=fedavg(PLAN), rounds=1, progress=False, evaluate_every=0, **more
        )
        for more in ({}, {"device": "cpu"})
    ]
    assert torch.equal(results[0].vector, results[1].vector) and "device" not in results[1].engine
