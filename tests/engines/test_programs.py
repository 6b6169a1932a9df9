"""Programs on rows: every form against the module itself, and what has none takes another path, with the reason."""

import operator
import random as python_random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

import atoll
from atoll.algorithms import fedavg, fedbn, local_only
from atoll.data import FederatedDataset
from atoll.engines import Loop, Vectorized, forms
from atoll.errors import RunError
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process

PLAN = local_sgd(0.05, epochs=2, batch_size=3)
SIZES = (6, 2, 7, 4, 9)


class Of(nn.Module):
    """A module whose forward is `function(self, x)` and whose parts are given."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def reset_parameters(self) -> None: ...


def built(function: Callable[[Any, Tensor], Tensor], loss: Any = "cross_entropy", **parts: Callable[[], Any]) -> Model:
    """A float64 model of parts that are drawn the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Model(Of(function, **{n: part() for n, part in parts.items()}).double(), loss, ("accuracy",))


def clients(shape: tuple[int, ...] = (6,), sizes: tuple[int, ...] = SIZES) -> FederatedDataset:
    draw = torch.Generator().manual_seed(3)
    made = {
        f"c{i}": (
            torch.randn(n, *shape, generator=draw, dtype=torch.float64),
            torch.randint(0, 3, (n,), generator=draw),
        )
        for i, n in enumerate(sizes)
    }
    return FederatedDataset.from_arrays(made, test=made)


def agree(
    make: Callable[[], Model], data: FederatedDataset, *, near: float = 1e-9, personal: bool = False, **options: Any
) -> str:
    """The fast path trains and evaluates as the specification does; gives its reason."""
    found: list[tuple[Tensor, Any]] = []
    reason = ""
    for engine in (Loop(), Vectorized(**options)):
        algorithm = local_only(PLAN) if personal else fedavg(PLAN)
        process = Process(make(), algorithm, engine=engine)
        state = process.init()
        for _ in range(2):
            state, sums = process.next(state, data)
        found.append((process.vector(state), (sums["loss"], process.evaluate(state, data, personal=personal).values)))
        reason = str(process.engine.describe()["reason"])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=near)
    assert found[1][1][0] == pytest.approx(found[0][1][0], abs=near)
    torch.testing.assert_close(found[1][1][1], found[0][1][1], rtol=0, atol=near, equal_nan=True)
    return reason


def a() -> nn.Module:
    return nn.Linear(6, 5)


def b() -> nn.Module:
    return nn.Linear(5, 3)


# --- every listed form ------------------------------------------------------------------------------------------------

POSITIVE = {torch.log, torch.sqrt, torch.rsqrt, torch.log1p}
FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {}
for _target in sorted(forms.ELEMENTWISE - {torch.clamp}, key=forms.named_of):
    FORMS[f"elementwise {forms.named_of(_target)}"] = lambda s, x, f=_target: s.b(
        f(s.a(x).square() + 1.0 if f in POSITIVE else s.a(x))
    )
for _target in [t for t in forms.WRITTEN if callable(t) and not isinstance(t, type)]:
    FORMS[f"written {_target.__module__} {_target.__name__}"] = lambda s, x, f=_target: s.b(f(s.a(x)))
for _name in sorted(forms.METHODS - {"float", "clamp"}):
    FORMS[f"method {_name}"] = lambda s, x, n=_name: s.b(getattr(0.1 * s.a(x).square() + 0.5, n)())
for _target in forms.BINARY:
    if _target not in (operator.floordiv, operator.mod, operator.pow, torch.pow):
        FORMS[f"binary {_target.__module__} {_target.__name__}"] = lambda s, x, f=_target: s.b(
            f(s.a(x), s.c(x).square() + 1.0)
        )
FORMS |= {
    "clamp": lambda s, x: s.b(s.a(x).clamp(-0.2, 0.3)),
    "clamp, by name": lambda s, x: s.b(torch.clamp(s.a(x), min=-0.1)),
    "power": lambda s, x: s.b(s.a(x) ** 2),
    "power, torch": lambda s, x: s.b(torch.pow(s.a(x), 2)),
    "numbers on both sides": lambda s, x: s.b(1.0 - 2 * s.a(x) / 3 + 0.5),
    "softmax": lambda s, x: s.b(torch.softmax(s.a(x), dim=-1)),
    "log softmax": lambda s, x: s.b(functional.log_softmax(s.a(x), dim=1)),
    "negation": lambda s, x: s.b(-s.a(x)),
    "view of another's shape": lambda s, x: s.b(s.a(x).view(s.c(x).shape)),
    "flatten": lambda s, x: s.b(torch.flatten(s.a(x).unsqueeze(2), 1)),
    "sizes": lambda s, x: s.b(s.a(x).reshape(x.size(0), 5, 1).squeeze(-1)),
    "sum of two": lambda s, x: s.b(s.a(x).unsqueeze(1).add(s.c(x).unsqueeze(1)).sum(1)),
    "mean, amax": lambda s, x: s.b(s.a(x) - s.a(x).mean(-1, keepdim=True) + s.a(x).unsqueeze(2).amax(2)),
    "stack, cat": lambda s, x: s.b(torch.stack((s.a(x), s.c(x)), 1).mean(1) + torch.cat((s.a(x), s.c(x)), 1)[:, :5]),
    "chunks": lambda s, x: s.b(torch.cat(s.a(torch.cat((x, x), 1)[:, 3:9]).chunk(5, dim=1), dim=1)),
    "matmul": lambda s, x: s.b(torch.matmul(s.a(x).unsqueeze(1), s.a(x).unsqueeze(2)).squeeze(2) * s.a(x)),
    "transposed": lambda s, x: s.b(s.a(x).unsqueeze(1).transpose(1, 2).permute(0, 2, 1).squeeze(1)),
    "linear by hand": lambda s, x: functional.linear(functional.linear(x, s.a.weight, bias=s.a.bias), s.b.weight),
    "dropout by hand": lambda s, x: s.b(functional.dropout(s.a(x), 0.3, s.training)),
    "shared layer": lambda s, x: s.b(s.d(torch.tanh(s.d(s.a(x))))),
    "parameter twice": lambda s, x: s.b(s.a(x) * s.v + s.v),
    "parts of a parameter": lambda s, x: s.b(s.a(x) * s.v[0] + s.v[1:2]),
    "half of it detached": lambda s, x: s.b(s.a(x)) + 0.0,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_modules_own(name: str) -> None:
    def make() -> Model:
        return built(FORMS[name], a=a, b=b, c=a, d=lambda: nn.Linear(5, 5), v=lambda: nn.Parameter(torch.randn(5)))

    assert "form on rows" in agree(make, clients())


LAYERS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    **{
        kind.__name__: ((6,), lambda k=kind: k(0.1, 20.0) if k is nn.Threshold else k())
        for kind in forms.ELEMENTWISE_LAYERS
    },
    "max pool, ceil": ((2, 7, 7), lambda: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)),
    "avg pool": ((5, 6, 5), lambda: nn.AvgPool2d((3, 2), stride=1, padding=1)),
    "adaptive": ((5, 6, 5), lambda: nn.AdaptiveAvgPool2d((2, 3))),
    "adaptive max": ((5, 6), lambda: nn.AdaptiveMaxPool1d(2)),
    "pool of lines": ((3, 8), lambda: nn.MaxPool1d(2)),
    "pads": ((2, 4, 4), lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d((1, 0, 1, 0)))),
    "upsample": ((4, 3, 3), lambda: nn.Upsample(scale_factor=2)),
    "unflatten": ((6,), lambda: nn.Unflatten(1, (2, 3))),
    "batch norm without statistics": ((6,), lambda: nn.BatchNorm1d(6, track_running_stats=False, affine=False)),
    "layer norm without bias": ((4, 6), lambda: nn.LayerNorm((4, 6), bias=False)),
    "group norm of lines": ((4, 6), lambda: nn.GroupNorm(2, 4, affine=False)),
    "conv, uneven kernel": ((2, 6, 7), lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
    "gelu by tanh": ((6,), lambda: nn.GELU("tanh")),
    "norm first": ((4, 6), lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True)),
    "encoder": ((4, 6), lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2, nn.LayerNorm(6), enable_nested_tensor=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_the_modules_own(name: str) -> None:
    shape, layer = LAYERS[name]
    with torch.no_grad():
        flat = layer().eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    wide = int(np.prod(shape))

    def make() -> Model:
        # A layer in front, so that the layer's input gradient counts too.
        return built(
            lambda s, x: s.head(s.layer(s.front(x.flatten(1)).view(x.shape)).flatten(1)),
            front=lambda: nn.Linear(wide, wide), layer=layer, head=lambda: nn.Linear(flat, 3),
        )  # fmt: skip

    sizes = (6, 3, 7, 5, 9) if "batch norm" in name else SIZES
    if "batch norm" in name:  # no batch of one
        sizes = (6, 3, 9, 5, 8)
    assert "form on rows" in agree(make, clients(shape, sizes))


# --- what has no form -------------------------------------------------------------------------------------------------

ODD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "clamp by a buffer": lambda s, x: s.d(s.e(x).clamp(min=s.low)),
    "an axis computed": lambda s, x: s.b(s.a(x).unsqueeze(x.dim()).squeeze(-1)),
    "arguments by name": lambda s, x: s.b(
        torch.matmul(s.a(x).unsqueeze(1), other=s.c(x).unsqueeze(2)).squeeze(2) * s.a(x)
    ),
    "where": lambda s, x: s.b(torch.where(s.a(x) > 0, s.a(x), s.c(x))),
    "einsum": lambda s, x: s.b(torch.einsum("bi,bi->bi", s.a(x), s.c(x))),
    "relu in place, used again": lambda s, x: s.b((lambda h: torch.relu_(h * 1.0) + h)(s.a(x))),
    "a change of an alias": lambda s, x: s.b((lambda h: (h.add_(1.0), h)[1])(s.a(x))),
    "the batch's mean": lambda s, x: s.b(s.a(x) - s.a(x).mean(0)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_right_on_whatever_path(name: str) -> None:
    def make() -> Model:
        parts = {"a": a, "b": b, "c": a, "e": lambda: nn.Linear(6, 2), "d": lambda: nn.Linear(2, 3)}
        return built(ODD[name], low=lambda: torch.tensor(-0.2), **parts)

    agree(make, clients())


def test_a_buffer_is_read_in_every_step() -> None:
    def scaled(s: Any, x: Tensor) -> Tensor:
        return s.b(s.g(s.a(x)) / (s.g.running_var + 1e-5).sqrt())

    data = clients(sizes=(6, 3, 9, 5, 8))
    assert "form on rows" in agree(lambda: built(scaled, a=a, b=b, g=lambda: nn.BatchNorm1d(5)), data)


def test_tracing_changes_nothing_of_the_model() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 3)
            self.register_buffer("m", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.m.mul_(0.9)
            return self.a(x * self.m)

    model = Model(Moving().double(), "cross_entropy")
    before = model.spec
    process = Process(model, fedavg(PLAN))
    process.engine.prepare(process, clients())
    assert model.spec == before and torch.equal(model.init_buffers(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("personal", [False, True])
def test_models_that_mix_examples_are_evaluated_client_by_client(personal: bool) -> None:
    def make() -> Model:
        return built(lambda s, x: s.b(s.a(x) - s.a(x).mean(0)), a=a, b=b)

    data = clients(sizes=(7, 5, 80, 3, 1, 6))
    found = []
    for engine in (Loop(), Vectorized()):
        process = Process(make(), local_only(PLAN), engine=engine)
        state, _ = process.next(process.init(), data)
        found.append(process.evaluate(state, data, personal=True).values)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)


def contrast(output: Tensor, target: Tensor) -> Tensor:
    """A loss for each example that compares it with all others, [n]."""
    return functional.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")


def centred(output: Tensor, target: Tensor) -> Tensor:
    """Losses divided by their mean, [n]."""
    each = functional.cross_entropy(output, target, reduction="none")
    return each / each.detach().mean().sqrt()


def masked(output: Tensor, target: Tensor) -> Tensor:
    """A mean over some of the examples, with a decision on the way."""
    each = functional.cross_entropy(output, target, reduction="none")[target >= 0]
    return each.mean() if float(each.sum()) > -1 else each.sum()


@pytest.mark.parametrize("loss", [contrast, centred, masked])
def test_losses_of_whole_batches_never_mix_clients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    agree(lambda: built(lambda s, x: s.b(torch.tanh(s.a(x))), loss, a=a, b=b), clients())


def test_draws_of_python_and_numpy_are_keyed() -> None:
    def skipping(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        if s.training and (python_random.random() < 0.3 or np.random.rand() < 0.3):  # noqa: NPY002
            h = h + s.d(h)
        return s.b(h)

    def make() -> Model:
        return built(skipping, a=a, b=b, d=lambda: nn.Linear(5, 5))

    before = python_random.getstate()
    reason = agree(make, clients())
    assert "draws random numbers unasked" in reason
    assert before == python_random.getstate(), "Python's own generator was moved"


def test_counters_of_a_modules_own_are_seen() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.calls = nn.Linear(6, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x)

    process = Process(Model(Counting().double(), "cross_entropy"), fedavg(PLAN))
    process.engine.prepare(process, clients())
    assert process.engine.describe()["reason"].startswith("its forward changes attributes of its own")


def test_the_reason_says_what_has_no_form() -> None:
    model = built(
        lambda s, x: s.b((lambda h: torch.where(h > 0, h, 0.1 * h))(s.c(x.view(-1, 1, 2, 3)).flatten(1))),
        c=lambda: nn.Conv2d(1, 5, (2, 3)),
        b=b,
    )
    process = Process(model, fedavg(PLAN))
    process.engine.prepare(process, clients())
    assert "convolution" in (said := process.engine.describe()["reason"]) and "the function gt" in said


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["ARENA_BYTES", "STRIP_BYTES", "GATHER_BYTES", "LOOK"])
def test_pieces_of_one_change_nothing(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "arena" if size.startswith("ARENA") else "tile"
    monkeypatch.setattr(f"atoll.engines.{where}.{size}", 1)
    kind = MODELS["batch norm, local"]
    data = kind.data((6, 2, 7, 4, 11))
    ends = []
    for engine in (Loop(), Vectorized()):
        process = Process(kind.model(), fedbn(local_sgd(0.05, epochs=2, batch_size=4, momentum=0.5)), engine=engine)
        state, _ = process.next(process.init(), data)
        ends.append((process.vector(state), process.evaluate(state, data, personal=True).values))
    for found, expected in zip(ends[1], ends[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_clients_outside_the_cohort_do_not_change_its_bits() -> None:
    def vector(sizes: tuple[int, ...]) -> Tensor:
        model = MODELS["perceptron"].model(torch.float32)
        process = Process(model, fedavg(local_sgd(0.1, batch_size=None)), engine=Vectorized())
        data = MODELS["perceptron"].data(sizes, torch.float32)
        state, _ = process.next(process.init(), data, [f"c{i}" for i in range(40)])
        return process.vector(state)

    small = tuple(3 + i % 7 for i in range(40))
    assert torch.equal(vector(small), vector((*small, 30_000)))


def test_one_client_with_many_examples_has_a_tile_of_its_own() -> None:
    kind = MODELS["convolution"]
    process = Process(kind.model(), fedavg(local_sgd(0.1, batch_size=None)), engine=Vectorized())
    data = kind.data((9000, 5, 5, 4))
    process.engine.prepare(process, data)
    task = process.open(process.init(), data.clients, 4)
    assert [t.tolist() for t in process.engine.split(task, data)] == [[0], [1, 2, 3]]


def test_a_cohort_with_much_to_do_has_two_tiles_and_a_single_client_one() -> None:
    model = Model(nn.Linear(600, 500), "mse")
    x = torch.ones(4, 600)
    data = FederatedDataset.from_arrays({c: (x, torch.ones(4, 500)) for c in ("a", "b", "c")})
    process = Process(model, fedavg(PLAN), engine=Vectorized())
    process.engine.prepare(process, data)
    state = process.init()
    assert [len(t) for t in process.engine.split(process.open(state, ("a", "b", "c"), 3), data)] == [2, 1]
    assert [len(t) for t in process.engine.split(process.open(state, ("b",), 3), data)] == [1]


def test_an_engine_at_work_elsewhere_is_refused() -> None:
    import threading

    engine, said = Vectorized(), list[str]()
    kind = MODELS["perceptron"]

    def other() -> None:
        try:
            process = Process(kind.model(), fedavg(PLAN), engine=engine)
            process.next(process.init(), kind.data(SIZES))
        except RunError as error:
            said.append(str(error))

    with engine.threads(), engine.threads():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert said and "at work in another thread" in said[0]
    other()
    assert len(said) == 1, "it was not given back"
    assert atoll.__version__
