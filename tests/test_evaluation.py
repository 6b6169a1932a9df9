"""Sums for every client, and what follows from them."""

import pytest
import torch
from torch import nn

import atoll
from atoll.errors import AtollError
from atoll.rounds import Process


@pytest.fixture
def data() -> atoll.FederatedDataset:
    draw = torch.Generator().manual_seed(1)
    made = {
        f"c{i}": (torch.randn(n, 3, generator=draw), torch.randint(2, (n,), generator=draw))
        for i, n in enumerate((5, 9, 4))
    }
    return atoll.FederatedDataset.from_arrays(made, test=0.4)


def model(loss: object = "cross_entropy") -> atoll.Model:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return atoll.Model(module, loss, ("accuracy", "auc"))  # type: ignore[arg-type]


def mean_cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize("loss", ["cross_entropy", mean_cross_entropy], ids=["named", "mean"])
def test_one_stream_of_batches_equals_client_by_client(
    data: atoll.FederatedDataset, loss: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.evaluation.CHUNK", 3)
    m = model(loss)
    process = Process(m, atoll.fedavg(atoll.local_sgd(0.1, batch_size=None)))
    state, _ = process.next(process.init(), data)
    found = process.evaluate(state, data, split="train")
    task = process.open_global(state, data.clients, 3)
    for cohort, remembered in process.engine.tiles(process, task, data, state.memory):
        places = data.places(cohort.clients)
        sums, _ = process.examine(task, cohort, remembered, data.train, places, personal=False)
        for client, row in zip(cohort.clients, sums, strict=True):
            assert found.client(client)["loss"] == pytest.approx(float(row[0] / row[1]), rel=1e-6)
    module = m.module(process.vector(state), state.buffers)
    for client in data.clients:
        own = data[client].train
        with torch.no_grad():
            assert found.client(client)["loss"] == pytest.approx(
                float(nn.functional.cross_entropy(module(own["x"]), own["y"])), rel=1e-5
            )
    total = sum(found.client(c)["loss"] * len(data[c].train["y"]) for c in data.clients) / len(data.train)
    assert found.metrics["loss"] == pytest.approx(total)


def test_personal_models_use_each_client_s_own_parameters_and_statistics(data: atoll.FederatedDataset) -> None:
    m = model()
    process = Process(m, atoll.fedbn(atoll.local_sgd(0.5, epochs=3, batch_size=None)))
    state = process.init()
    for _ in range(3):
        state, _ = process.next(state, data)
    found = process.evaluate(state, data, split="train", personal=True)
    own = process.personal(state, data, data.clients)
    for i, client in enumerate(data.clients):
        module = m.module(own.rows[i], own.buffers[i] if own.buffers is not None else None)
        x, y = data[client].train["x"], data[client].train["y"]
        with torch.no_grad():
            assert found.client(client)["loss"] == pytest.approx(
                float(nn.functional.cross_entropy(module(x), y)), rel=1e-5
            )
    assert found.metrics["loss"] < process.evaluate(state, data, split="train").metrics["loss"]


def test_a_client_never_seen_in_training_uses_what_it_receives(data: atoll.FederatedDataset) -> None:
    process = Process(model(), atoll.fedper(atoll.local_sgd(0.1, batch_size=None), private=("3.*",)))
    state, _ = process.next(process.init(), data, cohort=["c0", "c1"])
    rows = process.personal(state, data, ["c2"]).rows
    assert torch.equal(rows[0], process.vector(state))


def test_an_undefined_metric_is_nan_and_says_why(data: atoll.FederatedDataset) -> None:
    one_class = atoll.FederatedDataset.from_arrays(
        {
            "a": (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)),
            "b": (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])),
        }
    )
    m = model()
    found = atoll.evaluate(m, m.init(), one_class, split="train")
    assert found.client("a")["auc"] != found.client("a")["auc"]
    assert found.client("b")["auc"] == found.client("b")["auc"]
    assert found.spread["auc"]["undefined"] == 1
    assert found.notes == ("auc is undefined at 1 client(s) (a): only one class among the examples",)


def test_bad_input(data: atoll.FederatedDataset) -> None:
    m = model()
    with pytest.raises(AtollError, match="no validation examples"):
        atoll.evaluate(m, m.init(), data, split="validation")
    with pytest.raises(AtollError, match="split='dev'"):
        atoll.evaluate(m, m.init(), data, split="dev")
    with pytest.raises(AtollError, match=r"vector=\(3,\)"):
        atoll.evaluate(m, torch.zeros(3), data)
