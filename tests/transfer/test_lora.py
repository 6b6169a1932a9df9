"""LoRA over clients: the average of the products, worked out directly, is the oracle of every aggregation."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from registry import ENGINES, Words, stack
from torch import Tensor, nn

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import fedavg, scaffold
from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.errors import CompositionError, DataError, InvalidArgument
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process
from atoll.transfer import LoraModel

PLAN = local_sgd(0.2, epochs=2, batch_size=3)
SIZES = (7, 4, 9)
KINDS = ("loop", "rows, tile of 3", "single", "auto")
engines = pytest.mark.parametrize("engine", [ENGINES[n] for n in KINDS], ids=KINDS)


def base(module: nn.Module | None = None) -> Model:
    torch.manual_seed(6)
    layers = module or stack(
        body=nn.Linear(5, 6), act=nn.Tanh(), middle=nn.Linear(6, 5), tanh=nn.Tanh(), head=nn.Linear(5, 3)
    )
    return Model(layers.double(), "cross_entropy", ("accuracy",))


def data(shape: tuple[int, ...] = (5,), sizes: Sequence[int] = SIZES) -> FederatedDataset:
    draw = torch.Generator().manual_seed(3)
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, n in enumerate(sizes):
        x = torch.randn(n, *shape, generator=draw, dtype=torch.float64) + 0.5 * i
        clients[f"c{i}"] = (x, torch.randint(0, 3, (n,), generator=draw))
    return FederatedDataset.from_arrays(clients, test=clients)


def adapted(aggregation: Any, **options: Any) -> LoraModel:
    chosen = {"rank": 2, "targets": ("body", "middle"), "alpha": 3.0, **options}
    return atoll.lora(base(), aggregation=aggregation, **chosen)


def after(
    model: LoraModel, cohort: Sequence[str], start: Tensor | None = None, rounds: int = 1, **options: Any
) -> Tensor:
    """The vector after a round of these clients, from a start."""
    process = Process(model, model.algorithm(PLAN), **options)
    state = process.init(initial=start)
    for _ in range(rounds):
        state, _ = process.next(state, data(), cohort)
    return process.vector(state)


EVERYBODY = ["c0", "c1", "c2"]
SHARES = [n / sum(SIZES) for n in SIZES]


def average(model: LoraModel, start: Tensor | None = None) -> dict[str, Tensor]:
    """The average of the weights clients have after their training, each found by a round of its own."""
    own = [model.weights(after(model, [c], start)) for c in EVERYBODY]
    return {n: sum(p * w[n] for p, w in zip(SHARES, own, strict=True)) for n in own[0]}  # type: ignore[misc]


@pytest.mark.parametrize("aggregation", ["fedit", "ffa", "flora", "fedex"])
def test_an_adapted_model_begins_as_the_model_it_adapts(aggregation: str) -> None:
    given, model, x = base(), adapted(aggregation), data().train.fields["x"]
    expected = given.module(given.init())(x)
    torch.testing.assert_close(model.module(model.init())(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.merge(model.init())(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.module(model.init(9))(x), expected, rtol=0, atol=1e-14)
    assert aggregation == "ffa" or not torch.equal(model.init(9), model.init())


@engines
@pytest.mark.parametrize("aggregation", ["ffa", "flora", "fedex"])
def test_exact_aggregations_are_the_average_of_the_products(aggregation: str, engine: Callable[[], Engine]) -> None:
    model = adapted(aggregation)
    start = None
    for _ in range(2):  # the second round begins from factors that are not zero, or drawn anew
        expected = average(model, start)
        vector = after(model, EVERYBODY, start, engine=engine())
        for name, weight in model.weights(vector).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-13)
            assert not torch.allclose(weight, base().layout.view(base().init())[name])
        start = vector


def test_averaging_the_factors_each_for_itself_is_not_exact() -> None:
    model = adapted("fedit")
    found, expected = model.weights(after(model, EVERYBODY)), average(model)
    views, own = model.layout.view(after(model, EVERYBODY)), [model.layout.view(after(model, [c])) for c in EVERYBODY]
    for name in ("body.down.weight", "middle.up.weight"):
        mean = sum(p * v[name] for p, v in zip(SHARES, own, strict=True))
        torch.testing.assert_close(views[name], mean, rtol=0, atol=1e-14)
    assert all((found[n] - expected[n]).abs().max() > 1e-4 for n in expected)
    given = base().layout.view(base().init())
    product = 1.5 * views["body.up.weight"] @ views["body.down.weight"]
    torch.testing.assert_close(found["body.weight"], given["body.weight"] + product, rtol=0, atol=1e-14)


def test_fedex_keeps_the_averaged_factors_of_fedit() -> None:
    one, other = adapted("fedit"), adapted("fedex")
    fedit, fedex = one.layout.view(after(one, EVERYBODY)), other.layout.view(after(other, EVERYBODY))
    for name, value in fedit.items():
        torch.testing.assert_close(fedex[name], value, rtol=0, atol=1e-14)
    residual = fedex["body.base.weight"] - other.layout.view(other.init())["body.base.weight"]
    assert residual.abs().max() > 1e-4


@pytest.mark.parametrize("aggregation", ["fedit", "flora", "fedex"])
def test_one_client_is_plain_low_rank_training(aggregation: str) -> None:
    """W + scale B A with gradients by hand: dA = scale B^T dW, dB = scale dW A^T."""
    model = adapted(aggregation, targets=("body",))
    plan = local_sgd(0.2, steps=3, batch_size=None)
    process = Process(model, model.algorithm(plan))
    state, _ = process.next(process.init(), data(), ["c1"])
    found = model.weights(process.vector(state))["body.weight"]
    module = base().module(base().init())
    views, names = model.layout.view(model.init()), ("body.down.weight", "body.up.weight")
    a, b = (views[n].clone() for n in names)
    weight = module.get_parameter("body.weight").detach().clone()
    x, y = data()["c1"].train.values()
    for _ in range(3):
        leaf = (weight + 1.5 * b @ a).requires_grad_()
        output = torch.func.functional_call(module, {"body.weight": leaf}, (x,))
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(output, y), leaf)
        a, b = a - 0.2 * 1.5 * b.T @ slope, b - 0.2 * 1.5 * slope @ a.T
    torch.testing.assert_close(found, weight + 1.5 * b @ a, rtol=0, atol=1e-13)


@engines
def test_flora_mixes_ranks(engine: Callable[[], Engine]) -> None:
    """A client of rank r trains what a model of rank r would: its factors' first r places."""
    ranks = {"c0": 1, "c1": 3, "c2": 2}
    model = adapted("flora", rank=ranks)
    assert model.rank == 3
    vector = after(model, EVERYBODY, engine=engine())
    expected = average(model)
    for name, weight in model.weights(vector).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-13)
    given = base().layout.view(base().init())
    for client, rank in ranks.items():
        change = model.weights(after(model, [client]))["middle.weight"] - given["middle.weight"]
        assert int(torch.linalg.matrix_rank(change, atol=1e-10)) == rank
    with pytest.raises(DataError, match="no rank for client 'c2'"):
        after(adapted("flora", rank={"c0": 1, "c1": 2}), EVERYBODY)


def test_flora_begins_every_round_with_new_factors() -> None:
    model = adapted("flora")
    first, second = after(model, EVERYBODY), after(model, EVERYBODY, rounds=2)
    a, b = "body.down.weight", "body.up.weight"
    views = [model.layout.view(v) for v in (model.init(), first, second)]
    assert all(not bool(v[b].any()) for v in views)
    assert not torch.equal(views[0][a], views[1][a]) and not torch.equal(views[1][a], views[2][a])
    assert torch.equal(after(model, EVERYBODY, rounds=2), second), "drawn by seed and round"


def test_flora_begins_from_factors_that_are_given() -> None:
    model = adapted("flora")
    start = after(adapted("fedex"), EVERYBODY)
    assert bool(model.layout.view(start)["body.up.weight"].any())
    process = Process(model, model.algorithm(PLAN))
    vector = process.vector(process.init(initial=start))
    assert not bool(model.layout.view(vector)["body.up.weight"].any())
    for name, weight in model.weights(vector).items():
        torch.testing.assert_close(weight, model.weights(start)[name], rtol=0, atol=1e-14)


def test_only_what_is_trained_travels() -> None:
    sizes = {"body": (6, 5), "middle": (5, 6)}
    factors = sum(2 * (o + i) for o, i in sizes.values())
    for aggregation, count in (
        ("fedit", factors),
        ("ffa", 2 * (6 + 5)),
        ("fedex", factors + 60),
        ("flora", factors + 60),
    ):
        model = adapted(aggregation)
        assert model.size == count
        process = Process(model, model.algorithm(PLAN))
        _, metrics = process.next(process.init(), data())
        assert metrics["bytes_down"] == 3 * 8 * count and metrics["bytes_up"] == 3 * (8 * count + 24)
    with_head = adapted("fedit", train=("head.*",))
    assert with_head.size == factors + 18 and {"head.weight", "head.bias"} <= set(with_head.layout.names)


def test_parameters_that_are_trained_as_they_are_are_averaged() -> None:
    model = adapted("fedex", train=("head.bias",))
    own = [model.layout.view(after(model, [c]))["head.bias"] for c in EVERYBODY]
    mean = sum(p * v for p, v in zip(SHARES, own, strict=True))
    torch.testing.assert_close(model.layout.view(after(model, EVERYBODY))["head.bias"], mean, rtol=0, atol=1e-14)


def test_a_channel_that_shows_sums_alone_is_as_exact_as_its_rounding() -> None:
    model = adapted("fedex")
    channel = transforms.secure_sum(clip=4.0, weight_cap=16.0, bits=48)
    expected = after(model, EVERYBODY, rounds=2)
    torch.testing.assert_close(after(model, EVERYBODY, rounds=2, channel=channel), expected, rtol=0, atol=1e-9)


def test_other_methods_train_factors_too_but_not_the_parts_of_exact_aggregations() -> None:
    model = adapted("ffa")
    plain = Process(model, scaffold(local_sgd(0.1, steps=2, batch_size=None)), aggregator=aggregators.median())
    plain.next(plain.init(), data())
    with pytest.raises(CompositionError, match=r"model\.algorithm\(plan\), which is lora, fedex"):
        Process(adapted("fedex"), fedavg(PLAN))
    with pytest.raises(CompositionError, match="another model"):
        Process(base(), adapted("fedex").algorithm(PLAN))
    with pytest.raises(InvalidArgument, match="exact average"):
        adapted("flora").algorithm(PLAN, server=atoll.server.adam(0.1))


# --- layers -----------------------------------------------------------------------------------------------------------


class Look(nn.Module):
    """Attention over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Turned(nn.Module):
    """A layer of another library, whose weight is [inputs, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[int, ...]]] = {
    "embedding": (Words, ("body",), (5,)),
    "convolution": (
        lambda: stack(
            body=nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1),
            act=nn.ReLU(),
            flat=nn.Flatten(),
            head=nn.Linear(16, 3),
        ),
        ("body",),
        (2, 4, 4),
    ),
    "attention": (Look, ("attention",), (5, 4)),
    "transformer": (
        lambda: stack(
            body=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            flat=nn.Flatten(),
            head=nn.Linear(20, 3),
        ),
        ("body",),
        (5, 4),
    ),
    "another library's": (lambda: stack(body=Turned(), head=nn.Linear(4, 3)), ("body",), (5,)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_adapted_trained_and_merged(name: str) -> None:
    build, targets, shape = LAYERS[name]
    given = base(build())
    clients = data(shape)
    if name == "embedding":
        draw = torch.Generator().manual_seed(1)
        words = {c: (torch.randint(0, 7, (6, 5), generator=draw), torch.arange(6) % 3) for c in EVERYBODY}
        clients = FederatedDataset.from_arrays(words)
    x = clients.train.fields["x"]
    plan = local_sgd(0.2, steps=2, batch_size=None)
    for aggregation in ("fedit", "fedex"):
        model = atoll.lora(given, rank=2, targets=targets, aggregation=aggregation)  # type: ignore[arg-type]
        found: list[Tensor] = []
        for engine in ("loop", "auto"):
            process = Process(model, model.algorithm(plan), engine=engine)
            state = process.init()
            for _ in range(2):
                state, _ = process.next(state, clients)
            found.append(process.vector(state))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
        changed = model.weights(found[0])
        before = given.layout.view(given.init())
        assert changed and all((changed[n] - before[n]).abs().max() > 1e-6 for n in changed)
        merged = model.merge(found[0])
        assert [n for n, _ in merged.named_parameters()] == list(given.layout.names)
        torch.testing.assert_close(merged(x), model.module(found[0])(x), rtol=0, atol=1e-12)


def test_factors_of_linear_layers_run_as_rows() -> None:
    model = adapted("fedit")
    process = Process(model, model.algorithm(PLAN))
    process.next(process.init(), data())
    assert "form on rows" in process.engine.describe()["reason"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("neck",)}, r"targets='neck'.*body, middle, head"),
        ({"targets": ("body", "neck.*")}, r"targets='neck\.\*'"),
        ({"targets": ("*",)}, "leave layers out"),
        ({"targets": ("act",)}, "act: it holds no matrix of its own"),
        ({"targets": "body"}, r"Write targets=\(\"fc\*\",\)"),
        ({"targets": ()}, "non-empty sequence"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": 6}, r"weight 'weight' of 'body' is \(6, 5\), of rank 5 at most"),
        ({"rank": {"c0": 2}}, 'Only "flora" mixes ranks'),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"aggregation": "average"}, '"fedit", "ffa"'),
        ({"train": ("tail",)}, "train='tail'"),
        ({"train": "head"}, "sequence of names"),
        ({"train": ("body.weight",)}, "have no adapter"),
    ],
)
def test_arguments_that_cannot_be_meant(options: dict[str, Any], said: str) -> None:
    given = {"rank": 2, "targets": ("body", "middle"), **options}
    with pytest.raises(InvalidArgument, match=said):
        atoll.lora(base(), **given)


@pytest.mark.parametrize(
    ("module", "target", "said"),
    [
        (stack(body=nn.Conv1d(4, 4, 1, groups=2), head=nn.Linear(4, 3)), "body", "each group"),
        (stack(body=nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), head=nn.Linear(4, 3)), "body", "circular"),
        (stack(body=nn.Embedding(7, 4, max_norm=1.0), head=nn.Linear(4, 3)), "body", "max_norm"),
        (Look(), "attention.out_proj", "'attention' reads its weights itself: name that layer as a whole"),
        (stack(body=nn.LayerNorm(4), head=nn.Linear(4, 3)), "body", "no matrix"),
    ],
    ids=["groups", "padding", "norm", "part of attention", "norm layer"],
)
def test_layers_that_cannot_be_adapted(module: nn.Module, target: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        atoll.lora(Model(module, "cross_entropy"), rank=1, targets=(target,))


def test_weights_that_are_shared_and_models_that_are_adapted() -> None:
    tied = stack(body=nn.Linear(4, 4), act=nn.Tanh(), head=nn.Linear(4, 4))
    tied.get_submodule("head").weight = tied.get_parameter("body.weight")  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match="shares no weight"):
        atoll.lora(Model(tied, "mse"), rank=1, targets=("body",))
    with pytest.raises(InvalidArgument, match="no adapters yet"):
        atoll.lora(adapted("fedit"), rank=1, targets=("head",))
    with pytest.raises(InvalidArgument, match=r"plain atoll\.Model"):
        atoll.features(adapted("fedit"), data())


def test_the_model_says_what_it_is() -> None:
    specs = [adapted(a).spec for a in ("fedit", "ffa", "flora", "fedex")]
    specs += [adapted("fedit", seed=1).spec, adapted("fedit", alpha=4.0).spec, adapted("flora", rank={"c0": 1}).spec]
    assert all(a != b for i, a in enumerate(specs) for b in specs[:i])
    assert adapted("fedit").spec == specs[0]
