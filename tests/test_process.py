"""The round: what is refused before any work, what a failure leaves behind, and what is reported."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import parabola, quadratics, scalar_model
from registry import ENGINES, MODELS, squares, stack
from torch import Tensor, nn

from atoll import aggregators, server, spec, transforms
from atoll.algorithms import fedavg, fedper, scaffold
from atoll.data import FederatedDataset
from atoll.errors import AtollError, CompositionError, DataError, InvalidArgument, NonFiniteError
from atoll.evaluation import evaluate
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process, process

PLAN = local_sgd(0.1, steps=2, batch_size=None)
engines = pytest.mark.parametrize("engine", ["loop", "auto"])


def of(x: Any, y: Any, **more: Any) -> FederatedDataset:
    return FederatedDataset.from_arrays({"a": (x, y)}, **more)


# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": nn.Linear(2, 2)}, "model=.*Wrap a module"),
        ({"algorithm": "fedavg"}, "algorithm='fedavg'"),
        ({"aggregator": "mean"}, "aggregator='mean'"),
        ({"engine": "fast"}, "engine='fast' is unknown"),
    ],
)
def test_wrong_parts(arguments: dict[str, Any], said: str) -> None:
    parts: dict[str, Any] = {"model": scalar_model(), "algorithm": fedavg(PLAN)} | arguments
    with pytest.raises(InvalidArgument, match=said):
        process(parts.pop("model"), parts.pop("algorithm"), **parts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1.0}, "seed=1.0"),
        ({"seed": True}, "seed=True"),
        ({"initial": torch.zeros(2, dtype=torch.float64)}, r"initial=.*vector of 1 values"),
        ({"initial": torch.zeros(1)}, r"initial=.*float32.*torch.float64"),
        ({"initial": torch.tensor([torch.nan], dtype=torch.float64)}, "initial=.*finite"),
    ],
)
def test_wrong_starts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        process(scalar_model(), fedavg(PLAN)).init(**options)


def test_a_start_vector_is_copied() -> None:
    start = torch.tensor([2.0], dtype=torch.float64)
    made = process(scalar_model(), fedavg(PLAN))
    state = made.init(initial=start)
    start.fill_(9)
    assert made.vector(state).tolist() == [2.0]


@engines
def test_the_spec_does_not_change_by_running(engine: str) -> None:
    """A callable loss is tried on the first batch; what the run is must not depend on whether that has happened."""
    made = process(scalar_model(), fedavg(PLAN), engine=engine)
    before = spec.identity(made.spec)
    made.next(made.init(), quadratics((1.0,), (1.0,)))
    assert spec.identity(made.spec) == before
    json.dumps(made.spec)


# --- cohorts and states -----------------------------------------------------------------------------------------------


@engines
def test_strangers_and_duplicates_are_refused(engine: str) -> None:
    made, data = process(scalar_model(), fedavg(PLAN), engine=engine), quadratics((1.0, 2.0), (0.0, 1.0))
    with pytest.raises(InvalidArgument, match=r"cohort=\['x'\].*clients in the data"):
        made.next(made.init(), data, ["c0", "x"])
    with pytest.raises(InvalidArgument, match=r"cohort=\['c1'\].*distinct"):
        made.next(made.init(), data, ["c1", "c0", "c1"])
    with pytest.raises(InvalidArgument, match="cohort="):
        made.personal(made.init(), data, ["x"])


@engines
def test_a_stale_state_is_refused(engine: str) -> None:
    made, data = process(scalar_model(), scaffold(PLAN), engine=engine), quadratics((1.0, 2.0), (0.0, 1.0))
    first = made.init()
    second, _ = made.next(first, data)
    with pytest.raises(InvalidArgument, match=r"state is from round 0.*latest state"):
        made.next(first, data)
    third, _ = made.next(second, data)
    assert third.round == 2 and first.round == 0, "states are values"


@pytest.mark.parametrize("how", ["personal", "evaluate"])
def test_a_stale_state_has_no_personal_models(how: str) -> None:
    kind = MODELS["perceptron"]
    made, data = process(kind.model(), fedper(PLAN, private=("head.*",))), kind.data((3, 4))
    first = made.init()
    second, _ = made.next(first, data)
    made.personal(second, data, ["c0"])
    with pytest.raises(InvalidArgument, match="latest state"):
        made.personal(first, data, ["c0"]) if how == "personal" else made.evaluate(first, data, personal=True)


def test_the_median_needs_clients_and_says_so() -> None:
    few = replace(aggregators.median(), least=lambda count: 3)
    made = process(scalar_model(), fedavg(PLAN), aggregator=few)
    with pytest.raises(CompositionError, match="median needs at least 3 clients, but the cohort of round 1 has 2"):
        made.next(made.init(), quadratics((1.0, 2.0), (0.0, 1.0)))


# --- failures ---------------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_a_client_that_diverges_is_named_and_nothing_changes(engine: str, method: str) -> None:
    build = fedavg if method == "fedavg" else scaffold
    data = quadratics((1.0, 1e200, 1.0), (1.0, 1.0, 2.0))
    made = process(scalar_model(), build(PLAN), engine=engine)
    state, _ = made.next(made.init(), data, ["c0", "c2"])
    vector, version, kept = made.vector(state), state.memory.version, state.memory.index
    with pytest.raises(NonFiniteError, match=r"round 2: training became non-finite at c1\. Likely causes.*halve lr"):
        made.next(state, data)
    assert torch.equal(made.vector(state), vector) and state.memory.version == version and state.memory.index == kept
    again, _ = made.next(state, data, ["c0", "c2"])
    assert again.round == 2, "the state can go on"


@engines
def test_private_values_that_diverge_are_named_too(engine: str) -> None:
    """A step may blow up what never leaves the client while its update stays finite."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Parameter(torch.zeros(1))
            self.head = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.shared.expand(len(x), 1), self.head.expand(len(x), 1)), dim=1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - 1).square() + target * output[:, 1]

    model = Model(Apart(), loss)
    x = torch.zeros(2, 1)
    data = FederatedDataset.from_arrays({"a": (x, torch.ones(2)), "b": (x, torch.full((2,), 3e38))})
    made = process(model, fedper(local_sgd(10.0, steps=1, batch_size=None), private=("head",)), engine=engine)
    state = made.init()
    with pytest.raises(NonFiniteError, match="non-finite at b"):
        made.next(state, data)
    assert len(state.memory) == 0


@engines
def test_a_failure_in_the_middle_discards_what_clients_computed(engine: str) -> None:
    calls: list[str] = []
    base = scaffold(PLAN)

    def local(message: Any, memory: Any, cohort: Any) -> Any:
        calls.extend(cohort.clients)
        if "c1" in cohort.clients and len(calls) > 3:
            raise RuntimeError("the cable was pulled")
        return base.local(message, memory, cohort)

    data = quadratics((1.0, 2.0, 3.0), (1.0, 1.0, 2.0))
    made = process(scalar_model(), replace(base, local=local), engine=engine)
    state, _ = made.next(made.init(), data)
    zero = torch.zeros(1, dtype=torch.float64)
    before = state.memory.rows(["c0", "c1", "c2"], zero)
    with pytest.raises(RuntimeError, match="cable"):
        made.next(state, data)
    assert torch.equal(state.memory.rows(["c0", "c1", "c2"], zero), before)
    state.memory.commit()
    assert torch.equal(state.memory.rows(["c0", "c1", "c2"], zero), before), "staged rows outlived the failure"


def test_a_servers_step_that_overflows_is_told_from_a_client_that_did() -> None:
    from atoll import server

    made = process(scalar_model(), fedavg(PLAN, server=server.sgd(1.7e308)))
    with pytest.raises(NonFiniteError, match=r"server's step.*Lower the server's lr"):
        made.next(made.init(), quadratics((1.0,), (50.0,)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda u: u.replace(mean=u.mean[:, :0]), r"shape \(1, 0\) for a shared part of 1"),
        (lambda u: u.replace(sums=u.mean.new_ones(len(u.mean), 2)), r"sums of shape \(1, 2\), but declares 0"),
    ],
)
def test_algorithms_that_break_their_word_are_named(change: Any, said: str) -> None:
    base = fedavg(PLAN)

    def local(message: Any, memory: Any, cohort: Any) -> Any:
        update, memory = base.local(message, memory, cohort)
        return change(update), memory

    made = process(scalar_model(), replace(base, local=local), engine="loop")
    with pytest.raises(CompositionError, match=f"fedavg returned.*{said}"):
        made.next(made.init(), quadratics((1.0,), (1.0,)))


# --- the model against the data, before any work ----------------------------------------------------------------------


def refused(model: Model, data: FederatedDataset, engine: str = "auto", plan: Any = PLAN) -> AtollError:
    """The error of a round, which must come before any local work."""
    base = fedavg(plan)
    worked: list[int] = []

    def local(message: Any, memory: Any, cohort: Any) -> Any:
        worked.append(1)
        return base.local(message, memory, cohort)

    made = process(model, replace(base, local=local), engine=engine)
    with pytest.raises(AtollError) as caught:
        made.next(made.init(), data)
    assert not worked, "work had begun"
    return caught.value


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


@engines
@pytest.mark.parametrize("split", ["train", "test", "validation", "holdout"])
def test_labels_outside_the_classes(engine: str, split: str) -> None:
    wrong = torch.tensor([0, 1, 2, 0, 1, 7])
    more: dict[str, Any] = {
        "test": {"a": (X, wrong)},
        "validation": {"a": (X, wrong)},
        "holdout": (X, wrong),
        "train": None,
    }
    given = {} if split == "train" else {split: more[split]}
    error = refused(Model(nn.Linear(4, 3), "cross_entropy"), of(X, wrong if split == "train" else Y, **given), engine)
    assert isinstance(error, DataError) and "labels outside the classes" in str(error) and "7" in str(error)


@pytest.mark.parametrize(
    ("module", "loss", "said"),
    [
        (nn.Linear(5, 3), "cross_entropy", r"failed on a batch of x \(4, 4\).*input size"),
        (nn.Linear(4, 1), "cross_entropy", "one output per class"),
        (stack(body=nn.Linear(4, 3), flat=nn.Flatten(0)), "cross_entropy", r"returned a tensor of shape \(12,\)"),
        (nn.Linear(4, 3), "binary_cross_entropy", "output="),
        (nn.LSTM(4, 3), "cross_entropy", "returned tuple"),
        (nn.Linear(4, 3).double(), "cross_entropy", "model's dtype torch.float64"),
    ],
    ids=["inputs", "classes", "axis", "binary", "tuple", "dtype"],
)
def test_outputs_of_the_wrong_kind(module: nn.Module, loss: str, said: str) -> None:
    import re

    error = refused(Model(module, loss), of(X, Y))
    assert isinstance(error, InvalidArgument) and re.search(said, str(error))


@engines
def test_outputs_that_lose_their_axis_on_one_example(engine: str) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).squeeze()

    model = Model(Squeezed(), "mse")
    data = FederatedDataset.from_arrays({"a": (X, Y.float()), "b": (X[:1], Y[:1].float())})
    error = refused(model, data, engine)
    assert "example" in str(error) and "shape ()" in str(error)


@engines
def test_a_single_example_in_all_the_data_is_fine(engine: str) -> None:
    for loss in ("cross_entropy", squares):
        made = process(Model(nn.Linear(4, 3), loss), fedavg(PLAN), engine=engine)
        state, metrics = made.next(made.init(), of(X[:1], Y[:1]))
        assert state.round == 1 and metrics["examples"] == 2


def test_evaluation_of_single_examples_with_a_callable_loss() -> None:
    for loss in (parabola, lambda output, target: parabola(output, target).mean()):
        model = Model(scalar_model().module(torch.tensor([1.0], dtype=torch.float64)), loss)
        target = torch.tensor([[2.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
        x = torch.zeros(2, 1, dtype=torch.float64)
        data = FederatedDataset.from_arrays({"a": (x[:1], target[:1]), "b": (x[1:], target[1:])})
        found = evaluate(model, model.init(), data, split="train")
        assert found.values[:, 0].tolist() == [1.0, 4.0] and found.metrics["loss"] == 2.5


def test_batch_norm_with_a_batch_of_one() -> None:
    kind = MODELS["batch norm, mean"]
    cases = [((4, 1), PLAN), ((4, 5), local_sgd(0.1, batch_size=4)), ((4, 6), local_sgd(0.1, batch_size=1))]
    for sizes, plan in cases:
        error = refused(kind.model(), kind.data(sizes), plan=plan)
        assert isinstance(error, DataError) and "batch of one example" in str(error) and "GroupNorm" in str(error)
    assert "c1" in str(refused(kind.model(), kind.data((4, 5)), plan=local_sgd(0.1, batch_size=4)))
    frozen = MODELS["batch norm, frozen"]
    made = process(frozen.model(), fedavg(PLAN))
    assert made.next(made.init(), frozen.data((4, 1)))[0].round == 1


def test_fields_that_are_missing() -> None:
    without_x = FederatedDataset.from_arrays({"a": {"u": X, "y": Y}})
    error = refused(Model(nn.Linear(4, 3), "cross_entropy"), without_x)
    assert "no 'x'" in str(error) and "forward=" in str(error) and "u, y" in str(error)
    without_y = FederatedDataset.from_arrays({"a": {"x": X, "target": Y}})
    assert "name the target field 'y'" in str(refused(Model(nn.Linear(4, 3), "cross_entropy"), without_y))


def test_a_module_that_does_not_read_its_parameters() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(4, 3))
            self.held = [self.kernel]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.held[0].detach()

    error = refused(Model(Own(), "cross_entropy"), of(X, Y))
    assert isinstance(error, InvalidArgument) and "does not change with its parameters" in str(error)


def test_a_sum_for_a_loss() -> None:
    error = refused(Model(nn.Linear(4, 3), lambda output, target: squares(output, target).sum()), of(X, Y))
    assert "a sum" in str(error)


# --- what is reported -------------------------------------------------------------------------------------------------


@engines
def test_metrics_of_a_round(engine: str) -> None:
    made, data = (
        process(scalar_model(), fedavg(local_sgd(0.1, steps=2, batch_size=None)), engine=engine),
        quadratics((1.0, 2.0), (1.0, -1.0), (2, 4)),
    )
    _, metrics = made.next(made.init(), data)

    def loss(a: float, b: float, x: float, n: int) -> float:
        spread = [(i + 1) / 4 for i in range(n // 2)]
        return a / 2 * ((x - b) ** 2 + sum(s * s for s in spread) * 2 / n)

    y = (0.1 * 1.0, 0.2 * -1.0)
    expected = sum(
        n * (loss(a, b, 0.0, n) + loss(a, b, y[i], n)) for i, (a, b, n) in enumerate(((1.0, 1.0, 2), (2.0, -1.0, 4)))
    )
    assert metrics["examples"] == 12 and metrics["clients"] == 2 and metrics["saturated"] == 0
    assert metrics["loss"] == pytest.approx(expected / 12, abs=1e-12)
    assert metrics["bytes_down"] == 2 * 8 and metrics["bytes_up"] == 2 * (8 + 8 + 16)


@engines
def test_scaffold_sends_and_receives_twice_as_much(engine: str) -> None:
    kind = MODELS["perceptron"]
    size, found = kind.model().size, []
    for build in (fedavg, scaffold):
        made = process(kind.model(), build(PLAN), engine=engine)
        found.append(made.next(made.init(), kind.data((3, 4)))[1])
    assert (
        found[1]["bytes_up"] - found[0]["bytes_up"] == found[1]["bytes_down"] - found[0]["bytes_down"] == 2 * 8 * size
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_of_the_global_and_of_personal_models(engine: str) -> None:
    kind = MODELS["batch norm, local"]
    model, data = kind.model(metrics=("accuracy",)), kind.data((3, 4, 6))
    made = process(model, fedper(PLAN, private=("head.*",)), engine=ENGINES[engine]())
    state, _ = made.next(made.init(), data)
    for personal in (False, True):
        found = made.evaluate(state, data, personal=personal).to_dict()
        rows = made.personal(state, data, list(data.clients))
        losses, hits = [], 0.0
        assert rows.buffers is not None
        for i, client in enumerate(data.clients):
            test = data[client].test
            assert test is not None
            vector, buffers = (rows.rows[i], rows.buffers[i]) if personal else (made.vector(state), state.buffers)
            output = model.module(vector, buffers)(test["x"])
            losses.append(nn.functional.cross_entropy(output, test["y"], reduction="sum").item())
            right = float((output.argmax(1) == test["y"]).sum())
            hits += right
            assert found["clients"][client]["loss"] == pytest.approx(losses[-1] / len(test["y"]), abs=1e-9)
            assert found["clients"][client]["accuracy"] == pytest.approx(right / len(test["y"]))
        assert found["metrics"]["loss"] == pytest.approx(sum(losses) / 13, abs=1e-9)
        assert found["metrics"]["accuracy"] == pytest.approx(hits / 13)


def test_evaluation_changes_nothing() -> None:
    kind = MODELS["batch norm, local"]
    made, data = process(kind.model(), scaffold(PLAN)), kind.data((3, 4))
    state, _ = made.next(made.init(), data)
    twin = process(kind.model(), scaffold(PLAN))
    other, _ = twin.next(twin.init(), data)
    made.evaluate(state, data), made.evaluate(state, data, personal=True), made.personal(state, data, ["c1"])
    a, b = made.next(state, data)[0], twin.next(other, data)[0]
    assert torch.equal(made.vector(a), twin.vector(b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@engines
def test_weights_by_examples_are_exact_in_every_dtype(engine: str, dtype: torch.dtype) -> None:
    seen: dict[str, float] = {}

    def watch(examples: Tensor, clients: Any) -> Tensor:
        seen.update(zip(clients, examples[:, 0].tolist(), strict=True))
        return examples

    sizes = {"a": 2051, "b": 1, "c": 257}
    x = {c: torch.zeros(n, 2, dtype=dtype) for c, n in sizes.items()}
    data = FederatedDataset.from_arrays({c: (x[c], x[c][:, :1]) for c in sizes})
    made = process(
        Model(nn.Linear(2, 1).to(dtype), "mse"), fedavg(PLAN), engine=engine, aggregator=aggregators.mean(weights=watch)
    )
    made.next(made.init(), data)
    assert seen == sizes


def test_uniform_expected_and_realised_denominators_agree_when_everybody_comes() -> None:
    data = quadratics((1.0, 2.0, 3.0), (1.0, -1.0, 2.0))
    found = []
    for denominator in ("realised", "expected"):
        for channel in ("plain", transforms.secure_sum(clip=9.0, bits=48)):
            rule = aggregators.mean(weights="uniform", denominator=denominator)  # type: ignore[arg-type]
            made = process(scalar_model(), fedavg(PLAN), aggregator=rule, channel=channel)
            found.append(float(made.vector(made.next(made.init(), data)[0])))
    assert found == pytest.approx([found[0]] * 4, abs=1e-9)


def test_parts_compose_as_next_does() -> None:
    kind = MODELS["batch norm, mean"]
    data = kind.data((3, 4, 6))
    whole = process(kind.model(), scaffold(PLAN), transforms=(transforms.quantize(6),))
    expected, _ = whole.next(whole.init(seed=4), data)
    parts = Process(kind.model(), scaffold(PLAN), transforms=(transforms.quantize(6),))
    state = parts.init(seed=4)
    parts.engine.prepare(parts, data)
    task = parts.open(state, tuple(data.clients), 3)
    collector = parts.collector(state, task)
    for report in parts.engine.run(parts, task, data, state.memory):
        collector.add(report)
    closed = parts.close(state, task, collector.finish())
    assert torch.equal(parts.vector(closed), whole.vector(expected)) and closed.round == 1
    assert torch.equal(closed.buffers, expected.buffers) and torch.equal(
        closed.algorithm.variate, expected.algorithm.variate
    )


@pytest.mark.parametrize("rule", [server.sgd(0.5), server.sgd(0.5, momentum=0.9), server.adam(), server.yogi()])
def test_a_model_in_the_mean_s_memory_has_the_same_bits(rule: server.ServerOptimizer) -> None:
    kind = MODELS["batch norm, mean"]
    data, found = kind.data((3, 4, 6)), list[Tensor]()
    for spare in (False, True):
        parts = Process(kind.model(), fedavg(PLAN, server=rule))
        state = parts.init(seed=4)
        parts.engine.prepare(parts, data)
        task = parts.open(state, tuple(data.clients), 3)
        collector = parts.collector(state, task)
        for report in parts.engine.run(parts, task, data, state.memory):
            collector.add(report)
        before, collected = parts.vector(state), collector.finish()
        mean = collected.mean.clone()
        closed = parts.close(state, task, collected, spare=spare)
        found.append(torch.cat((parts.vector(closed), closed.buffers)))
        assert torch.equal(parts.vector(state), before)
        assert torch.equal(collected.mean, mean) != spare
        assert (closed.algorithm.vector.data_ptr() == collected.mean.data_ptr()) == spare
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "parts",
    [
        {"aggregator": aggregators.centered_clipping(radius=0.5)},
        {"aggregator": aggregators.mean(weights="uniform"), "transforms": [transforms.ef21(transforms.top_k(0.5))]},
    ],
    ids=["centred clipping", "ef21"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_that_a_rule_or_a_stage_keeps_is_not_written_over(parts: dict[str, Any], dtype: torch.dtype) -> None:
    kind = MODELS["perceptron"]
    data, found = kind.data((3, 4, 6), dtype), list[Tensor]()
    for spare in (False, True):
        process = Process(kind.model(dtype), fedavg(PLAN), **parts)
        state = process.init(seed=4)
        process.engine.prepare(process, data)
        for _ in range(3):
            task = process.open(state, tuple(data.clients), 3)
            collector = process.collector(state, task)
            for report in process.engine.run(process, task, data, state.memory):
                collector.add(report)
            state = process.close(state, task, collector.finish(), spare=spare)
        found.append(process.vector(state))
    assert torch.equal(*found)


def test_evaluation_of_one_example_with_a_callable_loss() -> None:
    model, x = scalar_model(1.0), torch.zeros(1, 1, dtype=torch.float64)
    data = FederatedDataset.from_arrays({"a": (x, torch.tensor([[2.0, 3.0]], dtype=torch.float64))})
    found = evaluate(model, model.init(), data, split="train")
    assert found.metrics["loss"] == 4.0


@engines
def test_finite_updates_of_half_precision_are_not_taken_for_infinite(engine: str) -> None:
    """The sum of many finite values may lie beyond the range of their dtype."""
    module = nn.Linear(300, 1, bias=False).half()
    with torch.no_grad():
        module.weight.zero_()
    x, y = torch.ones(2, 300, dtype=torch.float16), torch.full((2, 1), 16.0, dtype=torch.float16)
    made = process(Model(module, "mse"), fedavg(local_sgd(8.0, steps=1, batch_size=None)), engine=engine)
    state, _ = made.next(made.init(), FederatedDataset.from_arrays({"a": (x, y)}))
    assert made.vector(state).tolist() == [256.0] * 300
