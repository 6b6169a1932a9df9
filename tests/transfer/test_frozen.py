"""Frozen backbones: constants that never travel, and features that are computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from registry import stack
from torch import Tensor, nn

import atoll
from atoll.algorithms import fedavg, scaffold
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.model import Model
from atoll.net.backbones import Backbones, pack_constants, unpack_constants
from atoll.net.frames import FrameError
from atoll.rounds import Process

PLAN = local_sgd(0.1, epochs=2, batch_size=4)


class Net(nn.Module):
    """A convolutional body with statistics and dropout under a small head."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.neck = nn.Linear(12, 6)
        self.rate = nn.Dropout(rate)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rate(torch.tanh(self.neck(self.body(x)))))


def net(rate: float = 0.0, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    module = Net(rate).double()
    statistics = module.get_submodule("body.1")
    assert isinstance(statistics, nn.BatchNorm2d) and statistics.running_var is not None
    with torch.no_grad():
        statistics.running_var.uniform_(0.5, 2.0)
    return atoll.freeze(module, "body")


def images(sizes: tuple[int, ...] = (5, 9, 4), test: bool = True) -> FederatedDataset:
    draw = torch.Generator().manual_seed(1)
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, n in enumerate(sizes):
        x = torch.randn(n, 1, 5, 5, generator=draw, dtype=torch.float64)
        clients[f"c{i}"] = (x, torch.randint(0, 3, (n,), generator=draw))
    return FederatedDataset.from_arrays(clients, test=clients if test else None, holdout=clients["c0"])


def test_what_is_frozen_never_travels_and_never_changes() -> None:
    model, data = Model(net(), "cross_entropy", features="body"), images()
    head = 12 * 6 + 6 + 6 * 3 + 3
    assert model.size == head and model.buffer_layout.size == 0
    before = {n: t.clone() for n, t in model.constants().items()}
    assert {"body.0.weight", "body.1.weight", "body.1.running_mean", "body.1.running_var"} <= before.keys()
    assert model.frozen_bytes == sum(t.nbytes for t in before.values())
    process = Process(model, fedavg(PLAN))
    state = process.init()
    for _ in range(2):
        state, metrics = process.next(state, data)
        assert metrics["bytes_down"] == 3 * 8 * head and metrics["bytes_up"] == 3 * (8 * head + 24)
    assert all(torch.equal(t, before[n]) for n, t in model.constants().items())
    assert not torch.equal(process.vector(state), model.init())


def test_the_hash_of_what_is_frozen_is_part_of_the_model() -> None:
    first, again = Model(net(), "cross_entropy"), Model(net(), "cross_entropy")
    assert first.frozen_hash == again.frozen_hash and first.spec == again.spec
    for name in ("body.0.weight", "body.1.running_var"):
        other = net()
        with torch.no_grad():
            dict([*other.named_parameters(), *other.named_buffers()])[name].flatten()[0] += 1e-9
        changed = Model(other, "cross_entropy")
        assert changed.frozen_hash != first.frozen_hash and changed.spec != first.spec
    trained = net()
    with torch.no_grad():
        trained.get_parameter("head.bias").add_(1.0)
    assert Model(trained, "cross_entropy").frozen_hash == first.frozen_hash
    assert Model(nn.Linear(2, 2), "mse").frozen_hash is None


@pytest.mark.parametrize("algorithm", [fedavg(PLAN), scaffold(PLAN)], ids=["fedavg", "scaffold"])
@pytest.mark.parametrize("engine", ["loop", "vectorized"])
def test_features_that_are_computed_once_give_the_same_model(algorithm: Any, engine: str) -> None:
    model, data = Model(net(rate=0.3), "cross_entropy", ("accuracy",), features="body"), images()
    head, cached = atoll.features(model, data)
    assert head.layout == model.layout and cached.train.fields["x"].shape == (18, 12)
    assert cached.clients == data.clients and head.frozen_hash is None
    runs = [
        atoll.simulate(m, d, algorithm=algorithm, rounds=3, engine=engine, workers=1, progress=False)
        for m, d in ((model, data), (head, cached))
    ]
    torch.testing.assert_close(runs[1].vector, runs[0].vector, rtol=0, atol=1e-12)
    for own, other in zip(runs[0].history, runs[1].history, strict=True):
        assert own.bytes_up == other.bytes_up and own.bytes_down == other.bytes_down
        assert own.test == pytest.approx(other.test, abs=1e-12) and own.holdout == pytest.approx(
            other.holdout, abs=1e-12
        )
    whole = model.module(runs[1].vector)
    x = data.train.fields["x"]
    torch.testing.assert_close(whole(x), runs[0].module()(x), rtol=0, atol=1e-12)


def test_features_inside_a_sequence_are_cut_there() -> None:
    torch.manual_seed(0)
    module = stack(one=nn.Linear(4, 5), two=nn.Tanh(), three=nn.Linear(5, 4), four=nn.ReLU(), head=nn.Linear(4, 3))
    atoll.freeze(module.double(), "one", "three")
    draw = torch.Generator().manual_seed(1)
    clients = {
        c: (torch.randn(6, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (6,), generator=draw))
        for c in "ab"
    }
    data = FederatedDataset.from_arrays(clients)
    model = Model(module, "cross_entropy", features="four")
    head, cached = atoll.features(model, data)
    expected = torch.relu(module[2](torch.tanh(module[0](data.train.fields["x"]))))
    assert torch.equal(cached.train.fields["x"], expected.detach())
    runs = [
        atoll.simulate(m, d, algorithm=fedavg(PLAN), rounds=2, progress=False)
        for m, d in ((model, data), (head, cached))
    ]
    torch.testing.assert_close(runs[1].vector, runs[0].vector, rtol=0, atol=1e-12)


class Twice(nn.Module):
    """What stands behind the body reads the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + x)


class After(nn.Module):
    """A frozen layer outside of a sequence stands before the one that is named."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.tanh(self.stem(x))))


def vectors() -> FederatedDataset:
    draw = torch.Generator().manual_seed(1)
    return FederatedDataset.from_arrays({"a": (torch.randn(8, 4, generator=draw), torch.arange(8) % 3)})


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (atoll.freeze(Twice(), "body"), "body", "reads more than the features"),
        (atoll.freeze(After(), "stem", "body"), "body", "outside of a sequence"),
        (stack(body=nn.Linear(4, 4), head=nn.Linear(4, 3)), "body", r"body\.weight.* would be trained before"),
        (atoll.freeze(stack(body=nn.Linear(4, 3), head=nn.Linear(3, 3)), "body"), "head", "before the trained layers"),
    ],
    ids=["reads the input", "not the first", "trained", "nothing behind"],
)
def test_what_cannot_be_cut_is_refused(module: nn.Module, name: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        atoll.features(Model(module, "cross_entropy", features=name), vectors())


def test_layers_that_work_otherwise_in_training_are_refused() -> None:
    for layer in (nn.Dropout(0.2), nn.BatchNorm1d(4, affine=False)):
        module = stack(body=nn.Linear(4, 4), between=layer, head=nn.Linear(4, 3))
        module.get_submodule("body").requires_grad_(False)
        with pytest.raises(InvalidArgument, match=r"between .* otherwise in training.*atoll\.freeze"):
            atoll.features(Model(module, "cross_entropy", features="between"), vectors())


def test_a_model_without_names_of_features_and_data_that_are_drawn() -> None:
    with pytest.raises(InvalidArgument, match="names no features"):
        atoll.features(Model(net(), "cross_entropy"), images())
    lazy = FederatedDataset.from_source(2, lambda name: (torch.randn(3, 1, 5, 5).double(), torch.arange(3)))
    with pytest.raises(InvalidArgument, match="packed FederatedDataset"):
        atoll.features(Model(net(), "cross_entropy", features="body"), lazy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "said"),
    [(("nothing",), "matches submodules: body"), ((), "names of submodules"), (("*",), "leave parameters to train")],
)
def test_freeze_refuses_names_of_nothing_and_of_everything(names: tuple[str, ...], said: str) -> None:
    module = Net()
    with pytest.raises(InvalidArgument, match=said):
        atoll.freeze(module, *names)
    assert all(p.requires_grad for p in module.parameters())


# --- how constants reach a site ---------------------------------------------------------------------------------------


def test_constants_are_sent_once_and_never_again(tmp_path: Path) -> None:
    server, site = Model(net(seed=3), "cross_entropy"), Model(net(seed=4), "cross_entropy")
    wanted = server.frozen_hash
    assert wanted is not None and site.frozen_hash != wanted
    store = Backbones(tmp_path / "backbones")
    assert not store.provide(site, wanted)
    store.receive(site, pack_constants(server), wanted)
    assert site.frozen_hash == wanted == Model(net(seed=3), "cross_entropy").frozen_hash
    assert all(torch.equal(t, server.constants()[n]) for n, t in site.constants().items())
    restarted = Model(net(seed=5), "cross_entropy")
    assert Backbones(tmp_path / "backbones").provide(restarted, wanted) and restarted.frozen_hash == wanted
    x = images().train.fields["x"]
    answers = [
        m.call(m.layout.view(server.init()), {}, {"x": x}, train=False) for m in (server, restarted)
    ]  # fmt: skip
    assert torch.equal(*answers)
    assert all(restarted.spec[n] == server.spec[n] for n in ("frozen", "held"))


def test_damaged_or_foreign_constants_are_refused_and_change_nothing(tmp_path: Path) -> None:
    server, site = Model(net(seed=3), "cross_entropy"), Model(net(seed=4), "cross_entropy")
    wanted, before = server.frozen_hash, site.frozen_hash
    assert wanted is not None
    content = bytearray(pack_constants(server))
    content[-1] ^= 1
    store = Backbones(tmp_path)
    for bad in (bytes(content), bytes(content[:-8]), pack_constants(Model(atoll.freeze(Twice(), "body"), "mse"))):
        with pytest.raises(FrameError):
            store.receive(site, bad, wanted)
        assert site.frozen_hash == before and not list(tmp_path.iterdir())
    store.receive(site, pack_constants(server), wanted)
    (tmp_path / f"{wanted}.safetensors").write_bytes(bytes(content))
    assert not store.provide(Model(net(seed=5), "cross_entropy"), wanted) and not list(tmp_path.iterdir())
    with pytest.raises(FrameError, match="32 hexadecimal"):
        store.provide(site, "../../etc/passwd")
    with pytest.raises(InvalidArgument, match="has no constants"):
        store.provide(site, None)
    with pytest.raises(FrameError, match="was expected"):
        unpack_constants(site, pack_constants(server), "0" * 32)
