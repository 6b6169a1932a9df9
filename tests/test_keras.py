"""Keras models against the torch modules they stand for, and the classic first program."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import atoll
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument
from atoll.keras import Stateless
from atoll.model import Model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

EXAMPLE = Path(__file__).parent.parent / "examples" / "classic.py"
NEAR = 1e-6
layers = keras.layers


def clients(*shape: int, sizes: tuple[int, ...] = (7, 5, 9), classes: int = 3) -> FederatedDataset:
    draw = torch.Generator().manual_seed(3)
    made = {
        f"c{i}": (torch.randn(n, *shape, generator=draw) + 0.2 * i, torch.randint(classes, (n,), generator=draw))
        for i, n in enumerate(sizes)
    }
    return FederatedDataset.from_arrays(made, test=made)


def trained(
    model: Model, data: FederatedDataset, engine: str = "auto", **plan: Any
) -> tuple[Tensor, Tensor, list[float]]:
    """Vector, buffers and losses after three rounds."""
    process = atoll.process(model, atoll.fedavg(atoll.local_sgd(**{"lr": 0.1, "batch_size": 4, **plan})), engine=engine)
    state, losses = process.init(seed=1), list[float]()
    for _ in range(3):
        state, metrics = process.next(state, data)
        losses.append(metrics["loss"])
    return process.vector(state), state.buffers, losses


def perceptron(size: int = 4, outputs: int = 3) -> tuple[Any, nn.Module]:
    """The same network twice, with the same start values."""
    network = keras.Sequential([keras.Input((size,)), layers.Dense(10, activation="relu"), layers.Dense(outputs)])
    module = nn.Sequential(nn.Linear(size, 10), nn.ReLU(), nn.Linear(10, outputs))
    with torch.no_grad():
        for layer, dense in zip((module[0], module[2]), network.layers, strict=True):
            layer.weight.copy_(torch.tensor(np.array(dense.get_weights()[0]).T))
            layer.bias.copy_(torch.tensor(np.array(dense.get_weights()[1])))
    return network, module


def transposed(vector: Tensor, model: Model) -> Tensor:
    """A Keras vector in the order of the torch module: kernels are [inputs, outputs] there."""
    return torch.cat([t.t().reshape(-1) for t in model.layout.view(vector).values()])


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_the_classic_program_trains_to_the_torch_modules_numbers(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = runpy.run_path(str(EXAMPLE))
    assert found["model"].size == 784 * 10 + 10 + 10 + 1 and found["state"].round == 5
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown[:5]] == [f"round {i}" for i in range(1, 6)]
    first, last = (float(shown[i].split()[-1]) for i in (0, 4))
    assert last < 0.9 * first, "it learns"

    module = nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 1))
    start = found["model"].layout.view(found["model"].init())
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), start.values(), strict=True):
            parameter.copy_(value.t() if value.ndim == 2 else value)
    model = atoll.Model(module, loss="mse", metrics=("mae",))
    process = atoll.process(model, atoll.fedavg(atoll.local_sgd(lr=0.02, batch_size=10)), engine=engine)
    state = process.init(seed=0)
    for _ in range(5):
        state, metrics = process.next(state, found["data"])
    own = transposed(found["process"].vector(found["state"]), found["model"])
    torch.testing.assert_close(own, process.vector(state), rtol=0, atol=NEAR)
    assert metrics["loss"] == pytest.approx(found["metrics"]["loss"], rel=1e-5)
    mine = process.evaluate(state, found["data"]).metrics
    theirs = found["process"].evaluate(found["state"], found["data"]).metrics
    assert mine.keys() == theirs.keys() == {"loss", "mae"}
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_every_engine_gives_the_numbers_of_the_torch_module() -> None:
    network, module = perceptron()
    data = clients(4)
    vector, _, losses = trained(atoll.Model(module, "cross_entropy"), data, "loop", momentum=0.5)
    for engine in ("loop", "vectorized"):
        model = atoll.from_keras(network, "cross_entropy", ("accuracy",))
        own, _, found = trained(model, data, engine, momentum=0.5)
        torch.testing.assert_close(transposed(own, model), vector, rtol=0, atol=NEAR)
        assert found == pytest.approx(losses, rel=1e-5)


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[], list[Any]]]] = {
    "statistics": ((4,), lambda: [layers.Dense(6), layers.BatchNormalization(momentum=0.8), layers.Dense(3)]),
    "dropout": ((4,), lambda: [layers.Dense(16, activation="tanh"), layers.Dropout(0.5), layers.Dense(3)]),
    "images": ((6, 6, 2), lambda: [layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(3)]),
    "sequences": ((5, 3), lambda: [layers.LSTM(4), layers.Dense(3)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_engines_agree_on_other_layers(name: str) -> None:
    shape, parts = NETWORKS[name]
    network = keras.Sequential([keras.Input(shape), *parts()])
    data = clients(*shape)
    found = {}
    for engine in ("loop", "vectorized"):
        model = atoll.from_keras(network, "cross_entropy")
        found[engine] = trained(model, data, engine)
        assert not torch.equal(found[engine][0], model.init())
        again = trained(atoll.from_keras(network, "cross_entropy"), data, engine)
        assert torch.equal(found[engine][0], again[0]), "the same seed gives the same bits"
    torch.testing.assert_close(found["loop"][0], found["vectorized"][0], rtol=0, atol=2e-6)
    torch.testing.assert_close(found["loop"][1], found["vectorized"][1], rtol=0, atol=2e-6)
    if name == "statistics":
        model = atoll.from_keras(network, "cross_entropy")
        assert model.buffer_layout.size == 12 and not torch.equal(found["loop"][1], model.init_buffers())


def test_dropout_masks_are_drawn_where_engines_key_them() -> None:
    network = keras.Sequential([keras.Input((4,)), layers.Dense(32), layers.Dropout(0.5)])
    module, x = Stateless(network).train(), torch.ones(8, 4)
    torch.manual_seed(0)
    first, second = module(x), module(x)
    torch.manual_seed(0)
    assert torch.equal(first, module(x)) and not torch.equal(first == 0, second == 0)
    assert 0.3 < float((first == 0).double().mean()) < 0.7 and not bool((module.eval()(x) == 0).any())


def test_names_do_not_depend_on_what_was_built_before() -> None:
    one, other = (atoll.from_keras(perceptron()[0], "cross_entropy") for _ in range(2))
    assert one.layout.names == other.layout.names == ("dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias")
    assert one.spec.keys() == other.spec.keys() and one.spec["parameters"] == other.spec["parameters"]
    process = atoll.process(one, atoll.fedper(atoll.local_sgd(lr=0.1), private=("dense_1/*",)))
    assert process.private_names == {"dense_1/kernel", "dense_1/bias"}


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_layers_that_are_not_trainable_are_constants(engine: str) -> None:
    network, module = perceptron()
    network.layers[0].trainable = False
    module[0].requires_grad_(False)
    model, twin = atoll.from_keras(network, "cross_entropy"), atoll.Model(module, "cross_entropy")
    assert model.buffer_layout.size == 0 and model.size == twin.size == 33
    assert model.frozen_bytes == twin.frozen_bytes == 4 * 50
    found, expected = trained(model, clients(4), engine), trained(twin, clients(4), engine)
    torch.testing.assert_close(transposed(found[0], model), expected[0], rtol=0, atol=NEAR)


def test_statistics_of_a_layer_that_is_not_trainable_stay_as_they_are() -> None:
    parts = NETWORKS["statistics"][1]()
    still = next(part for part in parts if isinstance(part, layers.BatchNormalization))
    still.trainable = False
    network = keras.Sequential([keras.Input((4,)), *parts])
    before = [np.array(w) for w in still.get_weights()]
    model = atoll.from_keras(network, "cross_entropy")
    assert model.buffer_layout.size == 0
    vector, _, losses = trained(model, clients(4))
    after: Any = model.module(vector)
    kept = after.keras().layers[network.layers.index(still)].get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before, kept, strict=True)) and losses[2] < losses[0]


def test_a_trained_keras_model_comes_back() -> None:
    network = keras.Sequential([keras.Input((4,)), *NETWORKS["statistics"][1]()])
    before = [np.array(w) for w in network.get_weights()]
    data = clients(4)
    result = atoll.simulate(
        atoll.from_keras(network, "cross_entropy"), data,
        algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1, batch_size=4)), rounds=2, progress=False,
    )  # fmt: skip
    back: Any = result.module()
    x = data["c0"].train["x"]
    given = back.keras()(x.numpy(), training=False)
    torch.testing.assert_close(torch.as_tensor(given).detach(), result.predict(x), rtol=0, atol=NEAR)
    assert all(np.array_equal(a, b) for a, b in zip(before, network.get_weights(), strict=True)), "left as it was"


def test_what_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"model='Linear'.*keras\.Model.*atoll\.Model"):
        atoll.from_keras(nn.Linear(2, 2), "mse")
    with pytest.raises(InvalidArgument, match=r"no weights yet.*keras\.Input"):
        atoll.from_keras(keras.Sequential([layers.Dense(3)]), "mse")
    shrunk = layers.Dense(3, kernel_regularizer="l2")
    with pytest.raises(InvalidArgument, match=r"regularisation.*weight_decay"):
        atoll.from_keras(keras.Sequential([keras.Input((4,)), shrunk]), "mse")
    held = layers.Dense(3, activity_regularizer="l2", name="held")
    with pytest.raises(InvalidArgument, match=r"'held'.*activity_regularizer"):
        atoll.from_keras(keras.Sequential([keras.Input((4,)), held, layers.Dense(1)]), "mse")
    bounded = layers.Dense(3, kernel_constraint="non_neg")
    with pytest.raises(InvalidArgument, match=r"kernel has a constraint"):
        atoll.from_keras(keras.Sequential([keras.Input((4,)), bounded]), "mse")
    with pytest.raises(InvalidArgument, match=r"buffers='frozen'.*trainable = False"):
        atoll.from_keras(perceptron()[0], "mse", buffers="frozen")  # type: ignore[arg-type]


def test_another_backend_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    network = perceptron()[0]
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(InvalidArgument, match=r"backend 'jax'.*KERAS_BACKEND=torch.*before keras is first imported"):
        atoll.from_keras(network, "mse")


def test_an_environment_without_keras_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    network = perceptron()[0]
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(InvalidArgument, match=r"needs Keras 3.*pip install atoll\[keras\]"):
        atoll.from_keras(network, "mse")
