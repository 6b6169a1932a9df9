"""Mixed precision: products in bfloat16, everything else as before."""

from typing import Any

import pytest
import torch
from problems import train
from registry import MODELS, Kind
from torch import Tensor, nn

from atoll import simulation
from atoll.algorithms import Algorithm, fedadam, fedavg, fedncm, moon, scaffold
from atoll.data import FederatedDataset
from atoll.engines import Engine, Loop, Vectorized, Workers, operations
from atoll.engines.operations import Run
from atoll.errors import CompositionError, InvalidArgument, RunError
from atoll.experiment import Experiment
from atoll.local import local_sgd
from atoll.model import Model
from atoll.privacy import example_level
from atoll.rounds import Process

SIZES = (6, 2, 7, 4, 11)
NEAR = 0.02
"""How far `vectorized` may be from `loop`, as a part of the way that training went."""

AMPLIFIED = 0.15
"""The same where the statistics of a batch of two to four examples magnify what rounding does."""


def trained(
    kind: Kind, engine: Engine, algorithm: Algorithm | None = None, precision: str = "bfloat16", rounds: int = 2
) -> tuple[Process, Tensor]:
    algorithm = fedavg(local_sgd(0.05, epochs=2, batch_size=4)) if algorithm is None else algorithm
    process = Process(kind.model(torch.float32), algorithm, engine=engine, precision=precision)
    data = kind.data(SIZES, torch.float32)
    state, _ = train(process, data, rounds, [list(data.clients), list(data.clients)[::2]])
    return process, process.vector(state)


def apart(left: Tensor, right: Tensor, start: Tensor) -> float:
    """How far two results are from each other, as a part of the way from the start."""
    return float((left - right).norm() / (left - start).norm())


def _kinds() -> list[Any]:
    quick = ("dropout", "convolutions in a row", "attention", "tied weights")
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in MODELS]


@pytest.mark.parametrize("name", _kinds())
def test_the_fast_path_is_near_the_specification_for_every_model(name: str) -> None:
    kind = MODELS[name]
    start = kind.model(torch.float32).init()
    try:
        _, expected = trained(kind, Loop())
    except InvalidArgument as error:  # torch's LSTM has a kernel in bfloat16 on some processors only
        assert "recurrent" in name and "precision='bfloat16'" in str(error)
        with pytest.raises(InvalidArgument, match="precision='bfloat16'"):
            trained(kind, Vectorized())
        return
    process, found = trained(kind, Vectorized())
    _, full = trained(kind, Loop(), precision="full")
    near = AMPLIFIED if kind.pairs else NEAR
    assert apart(found, expected, start) < near, apart(found, expected, start)
    assert 0 < apart(full, expected, start) < (0.3 if kind.pairs else 0.1), apart(full, expected, start)
    assert found.dtype == torch.float32
    assert process.engine.describe()["precision"] == "bfloat16"
    written = kind.written and kind.single is None
    assert written == ("form on rows" in process.engine.describe()["reason"])
    assert "factors" not in process.engine.describe()


@pytest.mark.parametrize("engine", [Loop, Vectorized])
def test_a_step_is_what_the_equations_say(engine: type[Engine]) -> None:
    """dW = bf16(dz)^T bf16(x), and the step is not rounded."""
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 5, generator=draw), torch.randn(8, 3, generator=draw)
    module = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.randn(3, 5, generator=draw))
    weight = module.weight.detach().clone()
    process = Process(
        Model(module, "mse"), fedavg(local_sgd(1e-4, steps=1, batch_size=None)), engine=engine(), precision="bfloat16"
    )
    state = process.init()
    state, metrics = process.next(state, FederatedDataset.from_arrays({"a": (x, y)}))
    low = torch.bfloat16
    out = (x.to(low) @ weight.to(low).T).float()
    slope = (2 / out.numel() * (out - y)).to(low)
    step = (slope.T @ x.to(low)).float()
    torch.testing.assert_close(process.vector(state).view(3, 5), weight - 1e-4 * step, rtol=0, atol=2e-7)
    assert metrics["loss"] == pytest.approx(float((out - y).square().mean()), rel=1e-6)
    exact = 2 / out.numel() * (x @ weight.T - y).T @ x
    assert float((step - exact).abs().max()) > 1e-4, "nothing was rounded"
    # Steps are far below the spacing of bfloat16 around the weights: they would be lost in parameters of it.
    assert ((weight - 1e-4 * step).to(low) == weight.to(low)).sum() >= 14


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(fedadam(local_sgd(0.01, optimizer="adam", epochs=1, batch_size=4)), id="whole gradients"),
        pytest.param(fedavg(local_sgd(0.05, momentum=0.5, weight_decay=0.01, batch_size=4)), id="momentum"),
        pytest.param(scaffold(local_sgd(0.05, epochs=1, batch_size=4)), id="shift"),
        pytest.param(moon(local_sgd(0.05, epochs=1, batch_size=4)), id="a term through features"),
    ],
)
def test_every_way_to_step_takes_rounded_products(algorithm: Algorithm) -> None:
    kind = MODELS["perceptron"]
    start = kind.model(torch.float32).init()
    _, expected = trained(kind, Loop(), algorithm)
    for engine in (Vectorized(), Vectorized("single")):
        _, found = trained(kind, engine, algorithm)
        assert apart(found, expected, start) < NEAR
    _, full = trained(kind, Vectorized(), algorithm, precision="full")
    assert not torch.equal(full, found)


@pytest.mark.parametrize("name", ["dropout", "layer norm"])
def test_a_model_in_bfloat16_stays_in_it_throughout(name: str) -> None:
    kind, low = MODELS[name], torch.bfloat16
    found: list[Tensor] = []
    for engine in (Loop(), Vectorized()):
        process = Process(kind.model(low), fedavg(local_sgd(0.05, epochs=1, batch_size=4)), engine=engine)
        state, _ = train(process, kind.data(SIZES, low), 1, None)
        found.append(process.vector(state))
    assert found[0].dtype == found[1].dtype == low
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.02)
    assert "form on rows" in process.engine.describe()["reason"]


def test_workers_give_the_same_bits() -> None:
    kind = MODELS["perceptron"]
    _, expected = trained(kind, Vectorized(tile=2))
    process, found = trained(kind, Workers(Vectorized(tile=2), 2))
    assert torch.equal(found, expected)
    assert process.engine.describe()["workers"] == 2
    process.engine.stop()


def test_the_curve_of_the_loss_stays_near_that_of_single_precision() -> None:
    kind = MODELS["perceptron"]
    data = kind.data((20,) * 6, torch.float32)
    curves: list[Tensor] = []
    for precision in ("full", "bfloat16"):
        result = simulation.simulate(
            kind.model(torch.float32), data, algorithm=fedavg(local_sgd(0.2, epochs=1, batch_size=5)), rounds=15,
            precision=precision, evaluate_every=0, progress=False,
        )  # fmt: skip
        curves.append(torch.tensor([r.train["loss"] for r in result.history]))
    full, mixed = curves
    assert full[-1] < 0.97 * full[0]
    assert 0 < float((mixed - full).abs().max()) < 0.05 * float(full[0] - full[-1])


def test_looking_is_in_the_models_own_precision() -> None:
    kind = MODELS["perceptron"]
    data, plan = kind.data(SIZES, torch.float32), local_sgd(0.05, batch_size=4)
    looks = []
    for precision in ("full", "bfloat16"):
        process = Process(kind.model(torch.float32), fedavg(plan), precision=precision)
        looks.append(process.evaluate(process.init(), data, split="train").metrics)
    assert looks[0] == looks[1]


def test_it_is_part_of_the_experiment_and_is_told(tmp_path: Any) -> None:
    kind = MODELS["perceptron"]
    experiment = Experiment(
        model=kind.model(torch.float32), data=kind.data(SIZES, torch.float32),
        algorithm=fedavg(local_sgd(0.05, batch_size=4)), rounds=1, precision="bfloat16",
    )  # fmt: skip
    result = experiment.simulate(directory=tmp_path / "run", progress=False)
    assert result.engine["precision"] == "bfloat16" and result.spec["experiment"]["precision"] == "bfloat16"
    with pytest.raises(RunError, match=r"another experiment.*precision"):
        experiment.simulate(directory=tmp_path / "run", resume=True, precision="full", progress=False)
    full = experiment.simulate(precision="full", progress=False)
    assert "precision" not in full.engine and "precision" not in full.spec["experiment"]


class Scattered(nn.Module):
    """Adds what a product gives to a tensor of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 3).index_add(0, torch.arange(len(x)), self.body(x))


def test_a_model_that_cannot_run_in_it_is_refused_before_any_work() -> None:
    data = MODELS["perceptron"].data(SIZES, torch.float32)
    process = Process(Model(Scattered(), "cross_entropy"), fedavg(local_sgd(0.1)), precision="bfloat16")
    with pytest.raises(InvalidArgument, match=r"precision='bfloat16': .*same scalar type.*precision='full'"):
        process.engine.prepare(process, data)


def test_a_program_that_fails_in_it_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = operations.Linear.forward

    def forward(self: operations.Linear, run: Run) -> None:
        if run.mixed:
            raise RuntimeError("no such kernel")
        plain(self, run)

    monkeypatch.setattr(operations.Linear, "forward", forward)
    kind = MODELS["perceptron"]
    process, found = trained(kind, Vectorized())
    assert "fails in bfloat16 (RuntimeError: no such kernel)" in process.engine.describe()["reason"]
    assert apart(found, trained(kind, Loop())[1], kind.model(torch.float32).init()) < NEAR


@pytest.mark.parametrize(
    ("options", "said", "kind"),
    [
        ({"precision": "float16"}, "precision='float16' is unknown.*bfloat16, full", InvalidArgument),
        ({"dtype": torch.float64}, r"precision='bfloat16' is not allowed.*float64.*module.float\(\)", InvalidArgument),
        ({"algorithm": fedncm(head="head")}, "fedncm trains nothing by a plan", CompositionError),
        ({"private": True}, "example-level privacy.*clip", CompositionError),
    ],
)
def test_what_it_cannot_be_is_refused(options: dict[str, Any], said: str, kind: type[Exception]) -> None:
    model = MODELS["perceptron"].model(options.get("dtype", torch.float32))
    algorithm = options.get("algorithm") or fedavg(local_sgd(0.1))
    if options.get("private"):
        algorithm = fedavg(local_sgd(0.1, privacy=example_level(clip=1.0, noise_multiplier=1.0)))
    with pytest.raises(kind, match=said):
        Process(model, algorithm, precision=options.get("precision", "bfloat16"))
