"""A module as functions of one flat vector."""

from typing import Any

import pytest
import torch
from problems import parabola
from registry import MODELS, Tied, stack
from torch import Tensor, nn

from atoll.algorithms import fedavg
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument, RunError
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process

models = pytest.mark.parametrize("name", MODELS)


def small() -> nn.Module:
    return stack(body=nn.Linear(3, 2), act=nn.Tanh(), head=nn.Linear(2, 2))


def test_the_vector_holds_the_modules_values_in_order() -> None:
    module = small()
    model = Model(module, "cross_entropy")
    assert model.layout.names == ("body.weight", "body.bias", "head.weight", "head.bias")
    assert model.size == 6 + 2 + 4 + 2 == len(model.init())
    views = model.layout.view(model.init())
    assert all(torch.equal(views[n], p) for n, p in module.named_parameters())


def test_the_users_module_and_what_is_given_out_are_copies() -> None:
    module = small()
    model = Model(module, "cross_entropy")
    first = model.init()
    with torch.no_grad():
        module.get_parameter("head.bias").fill_(9)
    model.init().fill_(7)
    model.init_buffers().fill_(7)
    assert torch.equal(model.init(), first)


class Scaled(nn.Module):
    """A module of an author's own."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by, self.linear = by, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.linear(x)


def test_start_values_are_no_part_of_what_a_model_is() -> None:
    first, second, other = (Model(Scaled(by), "cross_entropy") for by in (1.0, 1.0, 2.0))
    assert not torch.equal(first.init(), second.init())
    assert first.spec == second.spec != other.spec


@models
def test_a_model_without_its_values_knows_its_form(name: str) -> None:
    model, other = MODELS[name].model(), MODELS[name].model()
    vector, buffers = model.init(), model.init_buffers()
    model.forget()
    with pytest.raises(RunError, match="given up its values"):
        model.init()
    assert model.spec == other.spec and model.layout == other.layout and torch.equal(model.init_buffers(), buffers)
    assert all(torch.equal(t, other.constants()[n]) for n, t in model.constants().items())
    for ours, theirs in zip(model.module(vector).parameters(), other.module(vector).parameters(), strict=True):
        assert torch.equal(ours, theirs)


@models
def test_a_module_of_a_vector_and_back(name: str) -> None:
    model = MODELS[name].model()
    vector = torch.randn(model.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    buffers = torch.rand(model.buffer_layout.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    module = model.module(vector, buffers)
    assert not module.training
    again = Model(module, model.loss.function, buffers=model.buffer_rule)
    assert torch.equal(again.init(), vector) and again.layout == model.layout
    assert torch.equal(again.init_buffers(), buffers)
    x = MODELS[name].data((3,)).train.fields
    called = model.call(
        model.layout.view(vector), model.buffer_layout.view(buffers.clone()) | model.counters(), x, train=False
    )
    torch.testing.assert_close(module(x["x"]), called, rtol=0, atol=1e-12)


@models
def test_start_values_by_seed(name: str) -> None:
    model = MODELS[name].model()
    before, state = model.init(), torch.default_generator.get_state()
    first, again, other = model.init(3), model.init(3), model.init(4)
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, before)
    assert first.dtype == torch.float64 and first.shape == before.shape and bool(torch.isfinite(first).all())
    assert torch.equal(model.init(), before) and torch.equal(state, torch.default_generator.get_state())


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(30, 20),
        lambda: nn.LayerNorm(4),
        lambda: nn.LSTM(3, 4),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
    ],
    ids=["linear", "layer norm", "lstm", "attention", "transformer"],
)
def test_start_values_have_the_scale_the_layers_give_themselves(build: Any) -> None:
    """What a layer sets to a constant (or to nought) when it is built, it sets so by seed too."""
    torch.manual_seed(0)
    made = build()
    drawn = Model(made, parabola).layout.view(Model(made, parabola).init(5))
    for name, parameter in made.named_parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            assert torch.equal(drawn[name], parameter), name
        else:
            assert 0.2 < float(drawn[name].std() / parameter.detach().std()) < 5, name


def test_layers_that_cannot_draw_are_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    model = Model(stack(first=nn.Linear(2, 2), own=Own()), "mse")
    assert model.init().shape == (8,)
    with pytest.raises(InvalidArgument, match=r"own \(Own\).*no reset_parameters"):
        model.init(0)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_no_trainable_parameters() -> None:
    frozen = small().requires_grad_(False)
    for module in (nn.ReLU(), frozen):
        with pytest.raises(InvalidArgument, match="no trainable parameters"):
            Model(module, "mse")


def test_mixed_or_integer_dtypes() -> None:
    mixed = stack(body=nn.Linear(3, 2), head=nn.Linear(2, 2).double())
    with pytest.raises(InvalidArgument, match=r"float32.*float64.*module\.float\(\)"):
        Model(mixed, "mse")
    mixed.get_submodule("body").requires_grad_(False)
    assert Model(mixed, "mse").dtype == torch.float64, "constants may have a dtype of their own"


def test_lazy_modules_need_a_first_batch() -> None:
    with pytest.raises(InvalidArgument, match="'weight' has no shape yet"):
        Model(nn.LazyLinear(2), "mse")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"module": lambda x: x}, "module='function'"),
        ({"loss": "cross_entrpy"}, "loss='cross_entrpy' is unknown.*Did you mean 'cross_entropy'"),
        ({"metrics": "accuracy"}, r"metrics='accuracy'.*metrics=\('accuracy',\)"),
        ({"buffers": "average"}, "buffers='average'"),
        ({"features": "neck"}, "features='neck'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {"module": small(), "loss": "cross_entropy"} | arguments
    with pytest.raises(InvalidArgument, match=said):
        Model(options.pop("module"), options.pop("loss"), **options)


def test_an_unknown_metric_is_refused() -> None:
    model = Model(small(), "cross_entropy", ("acuracy",))
    with pytest.raises(InvalidArgument, match=r"'acuracy' is unknown.*Did you mean 'accuracy'"):
        model.metrics(torch.zeros(2, 2))


# --- modes, ties, constants, buffers ----------------------------------------------------------------------------------


def test_parts_left_in_eval_mode_stay_there() -> None:
    module = stack(body=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), drop=nn.Dropout(0.5), head=nn.Linear(4, 2))
    module.get_submodule("norm").eval()
    training = dict(Model(module, "mse").modules())
    assert training["drop"].training and not training["norm"].training and training[""].training
    wholly = dict(Model(module.eval(), "mse").modules())
    assert wholly["norm"].training, "a module given in eval mode says nothing about its parts"
    assert not any(m.training for m in Model(module, "mse").module(Model(module, "mse").init()).modules())


def test_tied_weights_count_once_and_stay_tied() -> None:
    model = Model(Tied(), "cross_entropy")
    assert model.layout.names == ("body.weight", "middle.weight", "middle.bias", "head.bias")
    assert model.size == 28 + 16 + 4 + 7
    module = model.module(torch.arange(float(model.size)))
    assert module.get_parameter("head.weight") is module.get_parameter("body.weight")
    batch = {"x": torch.tensor([[1, 2]])}
    changed = model.call(model.layout.view(torch.zeros(model.size)), {}, batch, train=True)
    assert torch.equal(changed, torch.zeros(1, 7)), "the tied matrix was not replaced everywhere"


def test_frozen_parameters_are_part_of_what_the_model_is() -> None:
    first, second = MODELS["frozen body"].module(), MODELS["frozen body"].module()
    a, b = Model(first, "mse"), Model(second, "mse")
    assert a.layout.names == ("head.weight", "head.bias")
    assert a.spec["frozen"] != b.spec["frozen"], "other constants, another model"
    assert Model(first, "mse").spec["frozen"] == a.spec["frozen"]


def test_integer_buffers_are_never_averaged() -> None:
    kind = MODELS["batch norm, mean"]
    model = kind.model()
    assert set(model.buffer_layout.names) == {"norm.running_mean", "norm.running_var"}
    assert list(model.counters()) == ["norm.num_batches_tracked"]
    process = Process(model, fedavg(local_sgd(0.1, steps=3, batch_size=None)))
    state, _ = process.next(process.init(), kind.data((4, 6)))
    module = model.module(process.vector(state), state.buffers)
    assert int(module.get_buffer("norm.num_batches_tracked")) == 0
    assert int(model.counters()["norm.num_batches_tracked"]) == 0
    model.counters()["norm.num_batches_tracked"].add_(5)
    assert int(model.counters()["norm.num_batches_tracked"]) == 0, "counters are copies"


@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm2d(4), lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)],
    ids=["batch norm", "instance norm"],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_frozen_buffers_never_change(norm: Any, engine: str) -> None:
    module = stack(body=nn.Conv2d(2, 4, 3), norm=norm(), flat=nn.Flatten(), head=nn.Linear(16, 3)).double()
    with torch.no_grad():
        module.get_buffer("norm.running_mean").fill_(0.25)
    model = Model(module, "cross_entropy", buffers="frozen")
    assert model.buffer_layout.size == 0
    process = Process(model, fedavg(local_sgd(0.1, steps=3, batch_size=None)), engine=engine)
    state, _ = process.next(process.init(), MODELS["convolution"].data((4, 6)))
    found = model.module(process.vector(state)).get_buffer("norm.running_mean")
    assert torch.equal(found, torch.full((4,), 0.25, dtype=torch.float64))


def test_frozen_batch_norm_normalises_by_its_statistics() -> None:
    kind = MODELS["batch norm, frozen"]
    model = kind.model()
    batch = {"x": torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    views = model.layout.view(model.init())
    assert torch.equal(
        model.call(views, model.counters(), batch, train=True), model.call(views, {}, batch, train=False)
    )


def test_normalisation_layers_are_found_by_kind_not_by_name() -> None:
    module = stack(
        one=nn.Linear(4, 4), a=nn.BatchNorm1d(4), b=nn.LayerNorm(4), c=nn.GroupNorm(2, 4), norm=nn.Linear(4, 2)
    )
    assert Model(module, "mse").norm_names() == {f"{n}.{p}" for n in "abc" for p in ("weight", "bias")}


def test_a_number_can_be_a_parameter() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    model = Model(Scaled(), "mse")
    assert model.layout.view(model.init())["scale"].shape == ()
    x = torch.ones(4, 1)
    for engine in ("loop", "auto"):
        process = Process(model, fedavg(local_sgd(0.25, steps=1, batch_size=None)), engine=engine)
        state, _ = process.next(process.init(), FederatedDataset.from_arrays({"a": (x, x), "b": (x, x)}))
        assert process.vector(state).tolist() == [1.5]


def test_other_inputs_through_a_forward_function() -> None:
    def both(module: nn.Module, batch: Any) -> Tensor:
        return module(batch["u"] + batch["v"])

    model = Model(nn.Linear(2, 2).double(), "cross_entropy", forward=both)
    u = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = FederatedDataset.from_arrays({c: {"u": u, "v": u, "y": torch.tensor([0, 1, 0, 1])} for c in "ab"})
    found = []
    for engine in ("loop", "auto"):
        process = Process(model, fedavg(local_sgd(0.1)), engine=engine)
        found.append(process.vector(process.next(process.init(), data)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert "both" in str(model.spec["forward"])


def test_spec_and_text() -> None:
    module = small()
    model = Model(module, "cross_entropy", ("accuracy",))
    assert repr(model) == "Model(Sequential, 14 parameters, loss=cross_entropy)" and model.names == ("accuracy",)
    assert model.spec == Model(module, "cross_entropy", ("accuracy",)).spec
    assert model.spec != Model(module, "cross_entropy").spec != Model(module, "mse").spec


class Extra(nn.Module):
    """Holds a number where only its extra state tells of it."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.body, self._holder = nn.Linear(2, 1), [by].copy

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self._holder()[0]

    def get_extra_state(self) -> dict[str, float]:
        return {"by": self._holder()[0]}


def test_what_a_module_is_includes_its_extra_state_and_not_its_start_values() -> None:
    told = [Model(Extra(by), "mse").spec for by in (1.0, 1.0, 2.0)]
    assert told[0] == told[1] != told[2]
