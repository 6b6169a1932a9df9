"""EfficientNet-Lite0 and its weights: read without unpickling, equal to an independent implementation."""

import io
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import atoll
from atoll.algorithms import fedavg
from atoll.cli.recipes import recipe_path
from atoll.data import FederatedDataset
from atoll.errors import DataError, InvalidArgument
from atoll.experiment import load_app
from atoll.local import local_sgd
from atoll.model import Model
from atoll.transfer.efficientnet import STAGES, Inverted, efficientnet_lite0
from atoll.transfer.networks import PACKAGE
from atoll.transfer.weights import load_in_order, read_tensors

weights = pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the weights' package is not installed")


def old_format(state: object) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def small() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(2, 5))


def test_old_files_are_read_as_torch_reads_them() -> None:
    module = small()
    state = module.state_dict()
    state["0.weight"] = state["0.weight"].to(memory_format=torch.channels_last)
    assert not state["0.weight"].is_contiguous()
    found = read_tensors(old_format(state))
    assert [s.name for s in found] == list(state)
    assert [s.shape for s in found] == [tuple(t.shape) for t in state.values()]
    other = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(2, 5))
    load_in_order(other, found)
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())


def test_what_is_no_such_file_is_refused() -> None:
    content = old_format(small().state_dict())
    shared = torch.arange(6.0)
    new = io.BytesIO()
    torch.save(small().state_dict(), new)
    pieces = {"a": shared[:3], "b": shared[3:]}
    for bad in (content[:-1], content[:200], b"", b"nonsense", new.getvalue(), old_format(OrderedDict(pieces))):
        with pytest.raises(DataError, match="torch's old format"):
            read_tensors(bad)


def test_tensors_must_fit_the_network() -> None:
    found = read_tensors(old_format(small().state_dict()))
    with pytest.raises(DataError, match="9 tensors, the network has 2"):
        load_in_order(nn.Linear(2, 5), found)
    with pytest.raises(DataError, match=r"0\.weight has the shape"):
        load_in_order(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(2, 5)), found)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "sprung",)

    with pytest.raises(DataError):
        read_tensors(old_format({"a": Trap()}))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("size", [32, 33, 47, 64])
def test_images_are_halved_five_times_rounding_up(size: int) -> None:
    network = efficientnet_lite0(size).eval()
    blocks = network.get_submodule("blocks")
    seen: list[torch.Size] = []
    for part in (network.get_submodule("stem"), *blocks.children()):
        part.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    with torch.no_grad():
        assert network(torch.rand(1, 3, 20, 30)).shape == (1, 1280)
    expected, at = [(1, 32, -(-size // 2), -(-size // 2))], -(-size // 2)
    for _, stride, _, channels, repeats in STAGES:
        at = -(-at // stride)
        expected += [(1, channels, at, at)] * repeats
    assert [tuple(s) for s in seen] == expected
    assert sum(isinstance(b, Inverted) for b in blocks.children()) == 16
    assert sum(p.numel() for p in network.parameters()) == 3_371_008


@weights
def test_the_published_weights_answer_as_an_independent_implementation_does() -> None:
    """Logits of efficientnet-lite-pytorch 0.1.0 on a ramp of pixels at 64 x 64."""
    network = atoll.pretrained("efficientnet_lite0", size=64).eval()
    ramp = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    with torch.no_grad():
        found = network(ramp)
    assert found.shape == (1, 1000) and int(found.argmax()) == 782
    expected = [-0.45301732, -0.12692100, 0.93154329, 0.62125844, 0.80773753, 0.91072524]
    assert found[0, :6].tolist() == pytest.approx(expected, abs=2e-5)


@weights
def test_a_federated_head_on_the_frozen_network() -> None:
    module = atoll.pretrained("efficientnet_lite0", classes=3, size=32)
    model = Model(module, "cross_entropy", ("accuracy",), features="backbone")
    assert model.layout.names == ("head.weight", "head.bias") and model.size == 1280 * 3 + 3
    assert model.frozen_bytes > 4 * 3_371_008 and not bool(model.init().any())
    draw = torch.Generator().manual_seed(0)
    clients = {c: (torch.rand(3, 3, 32, 32, generator=draw), torch.arange(3)) for c in "ab"}
    data = FederatedDataset.from_arrays(clients)
    head, cached = atoll.features(model, data)
    plan = local_sgd(0.05, steps=2, batch_size=3)
    runs = [
        atoll.simulate(m, d, algorithm=fedavg(plan), rounds=1, engine="loop", progress=False)
        for m, d in ((model, data), (head, cached))
    ]
    torch.testing.assert_close(runs[1].vector, runs[0].vector, rtol=0, atol=2e-5)
    assert runs[0].history[0].bytes_down == runs[1].history[0].bytes_down == 2 * 4 * model.size


@weights
def test_thawed_networks_are_trained_whole() -> None:
    module = atoll.pretrained("efficientnet_lite0", classes=2, size=32, frozen=False)
    assert Model(module, "cross_entropy").size == 3_371_008 + 2 * 1280 + 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "efficientnet_lite1"}, "Did you mean 'efficientnet_lite0'"),
        ({"classes": 1}, "classes=1 is not allowed"),
        ({"size": 16}, "at least 32"),
        ({"size": 64.0}, "integer"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        atoll.pretrained(**{"name": "efficientnet_lite0", **options})  # type: ignore[arg-type]


def test_weights_that_are_not_at_hand_or_not_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        atoll.pretrained("efficientnet_lite0", path=tmp_path / "nothing.pth")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(DataError, match="not hold the published weights"):
        atoll.pretrained("efficientnet_lite0", path=tmp_path / "other.pth")
    monkeypatch.setattr("atoll.transfer.networks.find_spec", lambda _name: None)
    with pytest.raises(DataError, match=r"pip install \"atoll\[pretrained\]\""):
        atoll.pretrained("efficientnet_lite0")


@weights
def test_the_fleets_recipe_solves_for_the_last_layer_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(5)
    pictures = {f"vehicle-0{i}": (torch.rand(6, 3, 32, 32, generator=draw), torch.arange(6) % 3) for i in range(2)}
    few = FederatedDataset.from_arrays(pictures, test=pictures, holdout=pictures["vehicle-00"])
    monkeypatch.setattr(atoll.datasets, "traffic_signs", lambda vehicles, *, alpha, seed: few)
    experiment = load_app(recipe_path("vehicles"))(method="pretrained")
    result = experiment.simulate(progress=False)
    assert [record.round for record in result.history] == [1]
    assert experiment.model.layout.names == ("head.weight", "head.bias")
    assert result.history[0].test["accuracy"] > 0.5, "a ridge regression on its own training pictures"
