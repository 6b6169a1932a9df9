"""Every engine against the specification, for every kind of model and every algorithm."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from problems import train
from registry import AGGREGATORS, ALGORITHMS, ENGINES, MODELS, TRANSFORMS, Hidden, Kind, Method
from torch import Tensor

from atoll import transforms
from atoll.algorithms import Algorithm, fedavg, fedper, scaffold
from atoll.data import FederatedDataset
from atoll.engines import Engine, Loop, Vectorized, Workers
from atoll.errors import CompositionError, InvalidArgument
from atoll.local import Plan, local_sgd
from atoll.model import Model
from atoll.rounds import Process, State

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

NEAR = 1e-9
FAST = tuple(n for n in ENGINES if n != "loop")
SIZES, PAIRED = (5, 1, 9, 4, 4), (6, 2, 9, 4, 5)
"""Ragged; with batches of 3, the second kind never leaves a batch of one (for BatchNorm)."""


def sizes(kind: Kind) -> tuple[int, ...]:
    return PAIRED if kind.pairs else SIZES


def plans(kind: Kind) -> dict[str, Plan]:
    """Passes with short last batches, a number of steps, everything at once."""
    batch = 4 if kind.pairs else 3
    return {
        "epochs": local_sgd(0.05, epochs=2, batch_size=batch),
        "steps": local_sgd(0.05, steps=3, batch_size=batch, shuffle=False),
        "whole": local_sgd(0.05, steps=2, batch_size=None, momentum=0.5, weight_decay=0.01),
    }


def run(
    model: Model,
    data: FederatedDataset,
    algorithm: Algorithm,
    engine: Engine,
    *,
    rounds: int = 2,
    seed: int = 0,
    **options: object,
) -> tuple[Process, State, dict[str, Tensor]]:
    process = Process(model, algorithm, engine=engine, **options)  # type: ignore[arg-type]
    cohorts = [list(data.clients), list(data.clients)[::2]]
    if algorithm.pooled:
        data, cohorts = data.pooled(), [[data.pooled().clients[0]]]
    state, _ = train(process, data, rounds, cohorts, seed=seed)
    personal = process.personal(state, data, list(data.clients))
    kept = state.memory.rows(list(data.clients), torch.zeros(state.memory.layout.size, dtype=model.dtype))
    everything = {
        "vector": process.vector(state), "buffers": state.buffers, "rows": personal.rows,
        "own buffers": personal.buffers, "memory": kept,
    }  # fmt: skip
    return process, state, everything  # type: ignore[return-value]


def same(found: dict[str, Tensor], expected: dict[str, Tensor], near: float = NEAR) -> None:
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=near, msg=lambda text, n=name: f"{n}: {text}")


# --- models -----------------------------------------------------------------------------------------------------------

models = pytest.mark.parametrize("name", MODELS)


def _hows() -> list[Any]:
    """Every model with every plan; in the quick suite with passes and, by turns, one of the others."""
    turns = {"epochs": None, "steps": 0, "whole": 1}
    return [
        pytest.param(name, how, marks=[] if turn in (None, i % 2) else [pytest.mark.slow])
        for i, name in enumerate(MODELS)
        for how, turn in turns.items()
    ]


@pytest.mark.parametrize(("name", "how"), _hows())
def test_every_engine_trains_every_model_as_the_specification_does(name: str, how: str) -> None:
    kind = MODELS[name]
    data = kind.data(sizes(kind))
    plan = plans(kind)[how]
    if kind.pairs and how != "whole":
        # 6, 2, 9, 4, 5 by batches of 4: the 9 and the 5 would leave one example.
        data = kind.data((6, 2, 7, 4, 11))
    _, state, expected = run(kind.model(), data, fedavg(plan), Loop())
    assert not torch.equal(expected["vector"], kind.model().init()), "nothing was trained"
    if kind.buffers == "mean" and any("running" in n for n in kind.model().buffer_layout.names):
        assert not torch.equal(state.buffers, kind.model().init_buffers()), "statistics were not averaged"
    for engine in ("rows", "rows, tile of 3", "single", "auto"):
        if ("rows" in engine and not kind.rows) or (engine == "auto" and how != "epochs"):
            continue
        _, _, found = run(kind.model(), data, fedavg(plan), ENGINES[engine]())
        same(found, expected)


@models
def test_the_fast_path_says_which_strategy_ran(name: str) -> None:
    kind = MODELS[name]
    process, _, _ = run(
        kind.model(), kind.data(sizes(kind)), fedavg(local_sgd(0.1, steps=1, batch_size=None)), Vectorized()
    )
    said = process.engine.describe()
    assert said["engine"] == "vectorized"
    if kind.single is None:
        assert said["strategy"] == "rows of one matrix"
        assert "form on rows" in said["reason"] or "batching transform" in said["reason"]
        assert kind.written == ("form on rows" in said["reason"]), said["reason"]
        assert said["tile"] > 1
    else:
        assert said["strategy"] == "one client at a time" and kind.single in said["reason"]
        assert said["tile"] == 1


@pytest.mark.parametrize("name", [n for n, k in MODELS.items() if not k.rows])
def test_rows_asked_for_by_hand_are_refused_before_any_work_where_they_cannot_run(name: str) -> None:
    kind = MODELS[name]
    process = Process(kind.model(), fedavg(local_sgd(0.1, steps=1, batch_size=None)), engine=Vectorized("rows"))
    with pytest.raises(InvalidArgument, match=r'strategy=.rows. is not allowed.*"single" or "auto"'):
        process.engine.prepare(process, kind.data(sizes(kind)))


def test_single_precision_agrees_to_its_rounding() -> None:
    for name in ("perceptron", "batch norm, mean", "transformer"):
        kind = MODELS[name]
        model = kind.model(torch.float32)
        data = kind.data((6, 2, 7, 4, 11), torch.float32)
        plan = local_sgd(0.05, epochs=2, batch_size=4)
        _, _, expected = run(model, data, fedavg(plan), Loop())
        assert expected["vector"].dtype == torch.float32
        for engine in ("rows", "single", "auto"):
            _, _, found = run(kind.model(torch.float32), data, fedavg(plan), ENGINES[engine]())
            same(found, expected, near=2e-6)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("convolution")])
def test_both_forms_of_a_convolution_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of patches, which small convolutions take, and the library's kernel row by row."""
    kind = MODELS[name]
    plan, data = local_sgd(0.05, epochs=1, batch_size=4), kind.data((6, 2, 7, 4, 11))
    _, _, expected = run(kind.model(), data, fedavg(plan), Loop())
    for values, work in ((0, 0), (10**6, 10**9)):
        monkeypatch.setattr("atoll.engines.operations.PATCH_VALUES", values)
        monkeypatch.setattr("atoll.engines.operations.PATCH_WORK", work)
        same(run(kind.model(), data, fedavg(plan), Vectorized())[2], expected)


def test_memory_used_again_by_the_next_tile_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.engines.arena.ARENA_BYTES", 0)
    kind, method = MODELS["batch norm, local"], ALGORITHMS["scaffold option 2"]
    data = kind.data((6, 2, 7, 4, 11))
    for options in ({}, {"aggregator": AGGREGATORS["median"]()}):
        built = method.build(method.plan(epochs=1, batch_size=4))
        expected = run(kind.model(), data, built, Loop(), **options)[2]
        same(run(kind.model(), data, built, Vectorized(tile=2), **options)[2], expected)
        same(run(kind.model(), data, built, Vectorized(tile=1), **options)[2], expected)


# --- algorithms -------------------------------------------------------------------------------------------------------

PLANS = {
    "passes": {"epochs": 2, "batch_size": 4},
    "steps": {"steps": 5, "batch_size": 4},
    # Biases in front of BatchNorm have a gradient of nought but rounding, which a small eps would blow up.
    "adam": {"epochs": 1, "batch_size": 4, "optimizer": "adam", "eps": 1e-3},
}


def _some(cases: Mapping[str, Sequence[tuple[str, ...]]], of: int) -> list[Any]:
    """Every name with its cases; the quick suite takes one in `of` for each name, others for the next."""
    return [
        pytest.param(name, *case, marks=[] if (i + j) % min(of, len(own)) == 0 else [pytest.mark.slow])
        for i, (name, own) in enumerate(cases.items())
        for j, case in enumerate(own)
    ]


def _trained(method: Method) -> list[tuple[str, ...]]:
    """Plans and models a method takes."""
    hows = [
        how
        for how in PLANS
        if not (((method.plain or method.rates) and how == "adam") or (method.whole and how != "passes"))
    ]
    names = ["batch norm, local"] if method.several else ["batch norm, mean", "batch norm, local"]
    return list(itertools.product(hows, names))


@pytest.mark.parametrize(("which", "how", "name"), _some({n: _trained(m) for n, m in ALGORITHMS.items()}, of=3))
def test_every_engine_runs_every_algorithm_as_the_specification_does(which: str, how: str, name: str) -> None:
    kind, method = MODELS[name], ALGORITHMS[which]
    data = kind.data((6, 2, 7, 4, 11))
    algorithm = method.build(method.plan(**PLANS[how]))
    _, _, expected = run(kind.model(), data, algorithm, Loop())
    for engine in ("rows", "rows, tile of 3", "factors", "single"):
        _, _, found = run(kind.model(), data, method.build(method.plan(**PLANS[how])), ENGINES[engine]())
        same(found, expected)


_PIPES = [(name,) for name in (*TRANSFORMS, "secure_sum")]


@pytest.mark.parametrize(("which", "transform"), _some(dict.fromkeys(ALGORITHMS, _PIPES), of=5))
def test_pipelines_work_with_every_algorithm_on_every_engine(which: str, transform: str) -> None:
    # Biases in front of BatchNorm change by nought but rounding, of which a sign would make much.
    method = ALGORITHMS[which]
    noisy = transform != "secure_sum" and TRANSFORMS[transform]().client_noise is not None
    kind = MODELS["layer norm" if transform == "sign" or noisy or method.several else "batch norm, mean"]
    data = kind.data((6, 2, 7, 4, 11))
    options: dict[str, object] = (
        {"channel": transforms.secure_sum(clip=10.0, weight_cap=50.0, bits=40)}
        if transform == "secure_sum"
        else {"transforms": (TRANSFORMS[transform](),)}
    )
    if noisy:
        options["aggregator"] = AGGREGATORS["uniform mean"]()
    algorithm = method.build(method.plan(epochs=1, batch_size=4))
    if algorithm.scalars and transform != "entropy_code":  # which codes bytes, and mixes no numbers
        name = "" if transform == "secure_sum" else TRANSFORMS[transform]().name
        said = (
            f"{name} treats what a client sends as one vector" if name else "secure_sum cuts every number at one clip"
        )
        with pytest.raises(CompositionError, match=said):
            Process(kind.model(), algorithm, **options)  # type: ignore[arg-type]
        return
    if algorithm.pooled and noisy:
        with pytest.raises(CompositionError, match="cannot protect clients under pooled"):
            Process(kind.model(), algorithm, **options)  # type: ignore[arg-type]
        return
    if algorithm.pooled and transform == "secure_sum":
        with pytest.raises(CompositionError, match="needs 3 clients in a sum, but there are 1"):
            run(kind.model(), data, algorithm, Loop(), **options)
        return
    _, _, expected = run(kind.model(), data, algorithm, Loop(), **options)
    for engine in ("rows, tile of 3", "single"):
        _, _, found = run(kind.model(), data, algorithm, ENGINES[engine](), **options)
        # One code of a quantiser may turn on the last bit of its input; none of these inputs lies there.
        same(found, expected, near=1e-8)


_RULED = [("fedavg",), ("scaffold option 2",), ("fedper",)]


@pytest.mark.parametrize(("rule", "algorithm"), _some(dict.fromkeys(AGGREGATORS, _RULED), of=3))
def test_rules_work_on_every_engine(rule: str, algorithm: str) -> None:
    method, kind = ALGORITHMS[algorithm], MODELS["perceptron"]
    data = kind.data((*SIZES, 3, 2, 6, 8, 1, 7, 2, 5))  # seven in the smaller cohort, which the most demanding needs
    built = method.build(method.plan(epochs=1, batch_size=3))
    _, _, expected = run(kind.model(), data, built, Loop(), aggregator=AGGREGATORS[rule]())
    for engine in FAST:
        _, _, found = run(kind.model(), data, built, ENGINES[engine](), aggregator=AGGREGATORS[rule]())
        same(found, expected)


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["loop", "rows", "auto"])
@pytest.mark.parametrize("name", ["dropout", "convolution, batch norm", "recurrent, dropout", "transformer, dropout"])
def test_the_same_seed_gives_the_same_bits(engine: str, name: str) -> None:
    kind = MODELS[name]
    if "rows" in engine and not kind.rows:
        pytest.skip("no rows for this model")
    data = kind.data((6, 2, 7))
    plan = local_sgd(0.1, epochs=2, batch_size=3)
    first = run(kind.model(), data, fedavg(plan), ENGINES[engine](), transforms=(transforms.quantize(4),))[2]
    torch.manual_seed(99)  # what others draw from torch's own generator must not matter
    before = torch.default_generator.get_state()
    again = run(kind.model(), data, fedavg(plan), ENGINES[engine](), transforms=(transforms.quantize(4),))[2]
    assert torch.equal(before, torch.default_generator.get_state()), "torch's own generator was moved"
    assert all(torch.equal(first[n], again[n]) for n in first)
    other = run(kind.model(), data, fedavg(plan), ENGINES[engine](), transforms=(transforms.quantize(4),), seed=1)[2]
    assert not torch.equal(first["vector"], other["vector"])


@pytest.mark.parametrize("name", ["perceptron", "dropout", "batch norm, local", "attention"])
def test_neither_the_tile_nor_the_other_clients_change_a_clients_row(name: str) -> None:
    kind = MODELS[name]
    data = kind.data((6, 2, 7, 4, 11))
    plan = local_sgd(0.1, epochs=2, batch_size=4)
    alone: list[Tensor] = []
    for client in data.clients:
        process = Process(kind.model(), fedper(plan, private=("body*",)), engine=Loop())
        state, _ = process.next(process.init(), data, [client])
        alone.append(process.personal(state, data, [client]).rows[0][process.model.layout.mask(process.private_names)])
    for width in (1, 2, 3, None):
        process = Process(kind.model(), fedper(plan, private=("body*",)), engine=Vectorized("rows", tile=width))
        state, _ = process.next(process.init(), data)
        rows = process.personal(state, data, list(data.clients)).rows
        for found, expected in zip(rows, alone, strict=True):
            torch.testing.assert_close(
                found[process.model.layout.mask(process.private_names)], expected, rtol=0, atol=1e-12
            )


def test_every_client_round_and_pass_has_an_order_of_its_own() -> None:
    kind = MODELS["perceptron"]
    x, y = kind.data((12,)).train.fields["x"], kind.data((12,)).train.fields["y"]
    twins = FederatedDataset.from_arrays({"a": (x, y), "b": (x, y)})
    process = Process(kind.model(), scaffold(local_sgd(0.1, epochs=1, batch_size=2)), engine=Vectorized())
    state, _ = process.next(process.init(), twins)
    rows = state.memory.rows(["a", "b"], torch.zeros(state.memory.layout.size, dtype=torch.float64))
    assert not torch.allclose(rows[0], rows[1]), "twins went through their data in the same order"


# --- choices ----------------------------------------------------------------------------------------------------------


def test_engines_are_found_by_name() -> None:
    from atoll.engines import resolve

    assert isinstance(resolve("loop"), Loop)
    for name in ("auto", "vectorized"):
        found = resolve(name)
        assert isinstance(found, Workers) and isinstance(found.inner, Vectorized)
    own = Loop()
    assert resolve(own) is own
    shared = resolve(own, 2)
    assert isinstance(shared, Workers) and shared.inner is own and resolve(shared) is shared
    with pytest.raises(InvalidArgument, match="workers=2"):
        resolve(shared, 2)
    with pytest.raises(InvalidArgument, match=r"engine='lop' is unknown.*Did you mean 'loop'"):
        resolve("lop")


@pytest.mark.parametrize(
    ("options", "said"), [({"strategy": "row"}, "strategy="), ({"tile": 0}, "tile="), ({"tile": True}, "tile=")]
)
def test_wrong_choices_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Vectorized(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_order_of_the_data_raises_no_warning(engine: str) -> None:
    kind = MODELS["perceptron"]
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(kind.model(), kind.data((5, 3)), fedavg(local_sgd(0.1, shuffle=False, batch_size=2)), ENGINES[engine]())
    finally:
        torch.set_warn_always(False)


def test_the_loop_says_what_it_is() -> None:
    assert Loop().describe()["engine"] == "loop"


def test_a_choice_by_hand_is_said() -> None:
    kind = MODELS["convolution"]
    for asked, strategy in (("rows", "rows of one matrix"), ("single", "one client at a time")):

        def engine(asked=asked) -> Engine:
            return Vectorized(asked)  # type: ignore[arg-type]

        process, _, _ = run(kind.model(), kind.data((4, 3)), fedavg(local_sgd(0.1)), engine())
        said = process.engine.describe()
        assert said["strategy"] == strategy and said["reason"].startswith("chosen by hand")


def test_weights_that_stand_as_factors_are_told() -> None:
    def told(examples: int) -> object:
        x = torch.ones(examples, 1500)
        process = Process(Model(torch.nn.Linear(1500, 1500), "mse"), fedavg(local_sgd(1e-4, batch_size=None)))
        process.engine.prepare(process, FederatedDataset.from_arrays({"a": (x, x)}))
        return process.engine.describe()["factors"]

    assert told(20) == told(600) == {"weight": 562}


def test_large_models_run_one_client_at_a_time() -> None:
    module = torch.nn.Linear(1500, 1500)
    model = Model(module, "mse")
    x = torch.ones(600, 1500)
    process = Process(model, fedavg(local_sgd(1e-4, batch_size=None)), engine="auto")
    process.engine.prepare(process, FederatedDataset.from_arrays({"a": (x, x)}))
    assert process.engine.describe()["strategy"] == "one client at a time"
    assert "2,251,500 parameters" in process.engine.describe()["reason"]
    other = Model(Hidden(1500), "mse")  # no form on rows
    process = Process(other, fedavg(local_sgd(1e-4, batch_size=None)), engine="auto")
    process.engine.prepare(process, FederatedDataset.from_arrays({"a": (x, x)}))
    assert process.engine.describe()["strategy"] == "one client at a time"
    assert "2,251,500 parameters are more than" in process.engine.describe()["reason"]
