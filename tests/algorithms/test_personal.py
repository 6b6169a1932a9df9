"""Methods with a model for every client, against answers worked out by hand; personal models of anybody who asks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems import points, quadratics, scalar_model, scalars, train
from registry import ALGORITHMS, ENGINES, MODELS, Method, on
from torch import Tensor

import atoll
from atoll import aggregators, rate, server
from atoll.algorithms import (
    Algorithm,
    apfl,
    ditto,
    fedavg,
    fedbabu,
    fedper,
    fedrep,
    fine_tune,
    ifca,
    lg_fedavg,
    local_only,
    per_fedavg,
    pfedme,
)
from atoll.data import FederatedDataset
from atoll.engines import Engine, Vectorized
from atoll.errors import InvalidArgument
from atoll.local import Plan, local_sgd
from atoll.result import Result
from atoll.rounds import Process

A, B, SIZES = (1.0, 2.0, 3.5), (-1.0, 0.5, 4.0), (2, 4, 6)
CURVES, CENTRES = np.array(A), np.array(B)
START, LR, NEAR = 0.75, 0.1, 1e-12
W = np.array(SIZES) / sum(SIZES)

engines = on("loop", "rows", "single")
long_on_engines = on("rows", "loop", "single", long=True)


def full(steps: int, lr: float = LR, **options: Any) -> Plan:
    return local_sgd(lr, steps=steps, batch_size=None, **options)


def run(
    algorithm: Algorithm, engine: Engine, rounds: int, cohorts: Sequence[Sequence[str]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Global models after every round, and personal models after the last, on the quadratics."""
    data = quadratics(A, B, SIZES)
    process = Process(scalar_model(START), algorithm, engine=engine)
    state, path = train(process, data, rounds, cohorts)
    return np.array([float(v) for v in path]), process.personal(state, data, list(data.clients)).rows[:, 0].numpy()


def averaged(rounds: int, steps: int) -> list[float]:
    """Federated averaging's models, START first."""
    path = [START]
    for _ in range(rounds):
        path.append(float(W @ (CENTRES + (1 - LR * CURVES) ** steps * (path[-1] - CENTRES))))
    return path


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@engines
def test_fine_tuning_trains_the_global_model_further(engine: Callable[[], Engine]) -> None:
    path, own = run(fine_tune(full(3), personal=full(5, 0.2)), engine(), 4, [["c0", "c1"]])
    assert path.tolist() == run(fedavg(full(3)), engine(), 4, [["c0", "c1"]])[0].tolist()
    np.testing.assert_allclose(own, CENTRES + (1 - 0.2 * CURVES) ** 5 * (path[-1] - CENTRES), rtol=0, atol=NEAR)


@pytest.mark.parametrize("name", ["fine_tune", "pfedme", "fedbabu"])
@pytest.mark.parametrize("option", ["schedule", "work"])
def test_models_made_when_asked_for_belong_to_no_round(name: str, option: str) -> None:
    """A rate that has fallen to nought and slow clients are the rounds' matter; a given plan is taken as it is."""
    options: dict[str, Any] = {"schedule": rate.cosine(3), "work": lambda client, round: 0.0}  # type: ignore[reportUnknownLambdaType]
    kind = MODELS["layer norm"]
    data, plain = kind.data((6, 2, 7)), full(3)
    plan = full(3, **{option: options[option]})
    build: dict[str, Callable[..., Algorithm]] = {
        "fine_tune": fine_tune,
        "pfedme": lambda plan, personal=None: pfedme(plan, lam=2.0, personal=personal),
        "fedbabu": lambda plan, personal=None: fedbabu(plan, private=("head.*",), personal=personal),
    }
    found = []
    for algorithm in (build[name](plan), build[name](plan, personal=plain), build[name](plan, personal=plan)):
        process = Process(kind.model(), algorithm, engine="loop")
        state, path = train(process, data, 3)
        found.append(process.personal(state, data, list(data.clients)).rows)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0][0], path[-1])
    assert torch.equal(found[2], path[-1].expand(3, -1)), "a given plan is taken as it is"


# --- Ditto ------------------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("lam", [0.0, 0.6, 3.0])
def test_ditto_follows_the_paper(engine: Callable[[], Engine], lam: float) -> None:
    own, path = np.full(3, START), averaged(6, 3)
    for x in path[:-1]:
        for _ in range(4):
            own = own - 0.05 * (CURVES * (own - CENTRES) + lam * (own - x))
    found, personal = run(ditto(full(3), lam=lam, personal=full(4, 0.05)), engine(), 6)
    np.testing.assert_allclose(found, path[1:], rtol=0, atol=NEAR)
    np.testing.assert_allclose(personal, own, rtol=0, atol=NEAR)


@long_on_engines
def test_dittos_personal_models_tend_to_where_pull_and_slope_balance(engine: Callable[[], Engine]) -> None:
    path, own = run(ditto(full(1), lam=1.5, personal=full(20)), engine(), 40)
    np.testing.assert_allclose(own, (CURVES * CENTRES + 1.5 * path[-1]) / (CURVES + 1.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["loop", "rows", "auto"])
def test_without_a_pull_dittos_clients_are_alone_bit_for_bit(engine: str) -> None:
    kind, plan = MODELS["batch norm, mean"], full(3, momentum=0.5, shuffle=False)
    data = kind.data((6, 2, 7))
    found = []
    for algorithm in (ditto(plan, lam=0.0), local_only(plan)):
        process = Process(kind.model(), algorithm, engine=ENGINES[engine]())
        state, _ = train(process, data, 3)
        found.append(process.personal(state, data, list(data.clients)))
    assert torch.equal(found[0].rows, found[1].rows)
    assert found[0].buffers is not None and found[1].buffers is not None
    assert torch.equal(found[0].buffers, found[1].buffers), "statistics are the client's own too"


@long_on_engines
def test_a_strong_pull_makes_dittos_clients_global(engine: Callable[[], Engine]) -> None:
    lam = 1e6
    path, own = run(ditto(full(1), lam=lam, personal=full(3, 0.5 / lam)), engine(), 60)
    np.testing.assert_allclose(own, path[-1], rtol=0, atol=1e-3)
    assert own.std() > 0


# --- private parts ----------------------------------------------------------------------------------------------------


def lines() -> tuple[atoll.Model, FederatedDataset, dict[str, tuple[Tensor, Tensor]]]:
    """y = u x + v with a body u and a head v, in float64."""

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(1, 1, bias=False)
            self.head = torch.nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.head(torch.ones_like(x))

    module = Line().double()
    with torch.no_grad():
        module.body.weight.fill_(0.5)
        module.head.weight.fill_(-0.25)
    draw = torch.Generator().manual_seed(0)
    own = {c: (torch.randn(4, 1, generator=draw).double(), torch.randn(4, 1, generator=draw).double()) for c in "abc"}
    return atoll.Model(module, "mse"), FederatedDataset.from_arrays(own, test=own), own


def slopes(u: float, v: float, of: tuple[Tensor, Tensor]) -> tuple[float, float]:
    error = u * of[0] + v - of[1]
    return float(2 * (error * of[0]).mean()), float(2 * error.mean())


@engines
def test_fedrep_trains_the_head_first_and_then_the_body_under_it(engine: Callable[[], Engine]) -> None:
    model, data, own = lines()
    algorithm = fedrep(full(2), private=("head.*",), head=full(3, 0.2))
    state, path = train(Process(model, algorithm, engine=engine()), data, 4)
    u, heads = 0.5, dict.fromkeys("abc", -0.25)
    for t in range(4):
        ends = []
        for c in "abc":
            y = u
            for _ in range(3):
                heads[c] -= 0.2 * slopes(u, heads[c], own[c])[1]
            for _ in range(2):
                y -= LR * slopes(y, heads[c], own[c])[0]
            ends.append(y)
        u = float(np.mean(ends))
        assert float(path[t][0]) == pytest.approx(u, abs=NEAR)
    rows = Process(model, algorithm, engine=engine()).personal(state, data, list(data.clients)).rows
    assert rows[:, 1].tolist() == pytest.approx(list(heads.values()), abs=NEAR)


@engines
@pytest.mark.parametrize("tuned", ["all", "private"])
def test_fedbabus_head_stays_as_it_was_until_a_model_is_asked_for(engine: Callable[[], Engine], tuned: Any) -> None:
    model, data, own = lines()
    algorithm = fedbabu(full(2), private=("head.*",), personal=full(3, 0.2), tuned=tuned)
    process = Process(model, algorithm, engine=engine())
    state, path = train(process, data, 3, [["a", "b"]])
    u = 0.5
    for _ in range(3):
        ends = []
        for c in "ab":
            y = u
            for _ in range(2):
                y -= LR * slopes(y, -0.25, own[c])[0]
            ends.append(y)
        u = float(np.mean(ends))
    assert path[-1].tolist() == pytest.approx([u, -0.25], abs=NEAR)
    kept = state.memory.rows(["a", "b", "c"], torch.tensor([-0.25]).double())
    assert kept.flatten().tolist() == [-0.25] * 3
    rows = process.personal(state, data, ["c", "a"]).rows
    for row, c in zip(rows, "ca", strict=True):
        y, v = u, -0.25
        for _ in range(3):
            du, dv = slopes(y, v, own[c])
            y, v = (y - 0.2 * du if tuned == "all" else y), v - 0.2 * dv
        assert row.tolist() == pytest.approx([y, v], abs=NEAR)


@engines
def test_lg_fedavg_is_fedper_with_the_other_half_private(engine: Callable[[], Engine]) -> None:
    model, data, _ = lines()
    paths = []
    for algorithm in (lg_fedavg(full(2), private=("body.*",)), fedper(full(2), private=("body.*",))):
        process = Process(model, algorithm, engine=engine())
        state, path = train(process, data, 3)
        assert process.private_names == {"body.weight"}
        paths.append((path[-1], process.personal(state, data, list(data.clients)).rows))
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


@pytest.mark.parametrize("method", ["fedper", "lg_fedavg", "fedrep", "fedbabu"])
def test_private_parameters_are_not_sent(method: str) -> None:
    kind = MODELS["perceptron"]
    whole = Process(kind.model(), fedavg(full(1)))
    process = Process(kind.model(), ALGORITHMS[method].build(full(1)))
    mine = kind.model().layout.mask(process.private_names).sum().item()
    data = kind.data((3, 4))
    sent = [p.next(p.init(), data)[1] for p in (whole, process)]
    assert mine and sent[0]["bytes_up"] - sent[1]["bytes_up"] == 2 * 8 * mine
    assert sent[0]["bytes_down"] - sent[1]["bytes_down"] == 2 * 8 * mine


# --- APFL -------------------------------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize(("alpha", "adaptive"), [(0.5, True), (0.3, False), (0.9, True)])
def test_apfl_follows_the_paper(engine: Callable[[], Engine], alpha: float, adaptive: bool) -> None:
    x, v, share, expected = START, np.full(3, START), np.full(3, alpha), []
    for _ in range(5):
        w = np.full(3, x)
        for _ in range(4):
            mixed = share * v + (1 - share) * w
            slope = CURVES * (mixed - CENTRES)
            change = slope * (v - w)
            w, v = w - LR * CURVES * (w - CENTRES), v - LR * share * slope
            if adaptive:
                share = np.clip(share - LR * change, 0, 1)
        x = float(W @ w)
        expected.append(x)
    path, own = run(apfl(full(4), alpha=alpha, adaptive=adaptive), engine(), 5)
    np.testing.assert_allclose(path, expected, rtol=0, atol=NEAR)
    np.testing.assert_allclose(own, share * v + (1 - share) * x, rtol=0, atol=NEAR)
    assert not adaptive or np.abs(share - alpha).max() > 1e-3


@engines
def test_the_ends_of_apfl(engine: Callable[[], Engine]) -> None:
    """A share of nought is the global model; of one, training alone."""
    path, own = run(apfl(full(3), alpha=0.0, adaptive=False), engine(), 5)
    np.testing.assert_allclose(path, averaged(5, 3)[1:], rtol=0, atol=NEAR)
    np.testing.assert_allclose(own, path[-1], rtol=0, atol=NEAR)
    _, own = run(apfl(full(3), alpha=1.0, adaptive=False), engine(), 5)
    np.testing.assert_allclose(own, run(local_only(full(3)), engine(), 5)[1], rtol=0, atol=NEAR)


# --- pFedMe -----------------------------------------------------------------------------------------------------------


@long_on_engines
def test_pfedme_follows_the_paper_to_its_fixed_point(engine: Callable[[], Engine]) -> None:
    lam, eta, x, expected = 2.0, 0.2, START, []
    reached = 1 - (1 - LR * (CURVES + lam)) ** 3
    for _ in range(100):
        w = np.full(3, x)
        for _ in range(2):
            nearest = (CURVES * CENTRES + lam * w) / (CURVES + lam)
            w = w - eta * lam * (w - (w + reached * (nearest - w)))
        x += 0.8 * float(W @ (w - x))
        expected.append(x)
    algorithm = pfedme(full(2), lam=lam, eta=eta, inner=3, personal=full(60), server=server.sgd(0.8))
    path, own = run(algorithm, engine(), 100)
    np.testing.assert_allclose(path, expected, rtol=0, atol=NEAR)
    left = (1 - eta * lam * reached * CURVES / (CURVES + lam)) ** 2
    assert path[-1] == pytest.approx(float(W * (1 - left) @ CENTRES / (W @ (1 - left))), abs=1e-9)
    np.testing.assert_allclose(own, (CURVES * CENTRES + lam * path[-1]) / (CURVES + lam), rtol=0, atol=1e-7)


@long_on_engines
def test_exact_envelopes_weigh_clients_by_curve_over_curve_and_pull(engine: Callable[[], Engine]) -> None:
    lam = 2.0
    path, _ = run(pfedme(full(1, 0.2), lam=lam, eta=0.4, inner=15), engine(), 30)
    weights = W * CURVES / (CURVES + lam)
    assert path[-1] == pytest.approx(float(weights @ CENTRES / weights.sum()), abs=1e-5)


@engines
def test_without_a_pull_pfedmes_global_model_stays(engine: Callable[[], Engine]) -> None:
    path, own = run(pfedme(full(3), lam=0.0, eta=0.1), engine(), 2)
    assert path.tolist() == [START, START]
    np.testing.assert_allclose(own, CENTRES + (1 - LR * CURVES) ** 3 * (START - CENTRES), rtol=0, atol=NEAR)


# --- Per-FedAvg -------------------------------------------------------------------------------------------------------


@long_on_engines
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_per_fedavg_takes_the_meta_gradient(engine: Callable[[], Engine], first_order: bool, steps: int) -> None:
    alpha, x, expected = 0.2, START, []
    pull = CURVES * (1 - alpha * CURVES) ** (1 if first_order else 2)
    for _ in range(60):
        x = float(W @ (CENTRES + (1 - 0.5 * pull) ** steps * (x - CENTRES)))
        expected.append(x)
    path, own = run(per_fedavg(full(steps, 0.5), alpha=alpha, first_order=first_order), engine(), 60)
    np.testing.assert_allclose(path, expected, rtol=0, atol=NEAR)
    if steps == 1:
        fixed = float(W * pull @ CENTRES / (W @ pull))
        assert path[-1] == pytest.approx(fixed, abs=1e-7)
    np.testing.assert_allclose(own, path[-1] - alpha * CURVES * (path[-1] - CENTRES), rtol=0, atol=NEAR)


@engines
def test_the_meta_gradient_of_a_network_is_that_of_the_loss_after_a_step(engine: Callable[[], Engine]) -> None:
    """Against numbers: the slope of f(w - alpha grad f(w)) by differences."""
    kind, alpha = MODELS["perceptron"], 0.3
    model, data = kind.model(), kind.data((6,))
    process = Process(model, per_fedavg(full(1, 1.0), alpha=alpha), engine=engine())
    state = process.init()
    moved = process.vector(process.next(state, data)[0]) - process.vector(state)
    batch = data.train.client(0)

    def after(w: Tensor) -> Tensor:
        def loss(v: Tensor) -> Tensor:
            return model.loss.mean(model.call(model.layout.view(v), {}, batch, train=True), batch["y"])

        leaf = w.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf)
        return loss(w - alpha * slope).detach()

    w = model.init()
    for i in range(0, model.size, 5):
        unit = torch.zeros_like(w)
        unit[i] = 1e-5
        assert float(-moved[i]) == pytest.approx(float((after(w + unit) - after(w - unit)) / 2e-5), abs=1e-7)


# --- IFCA -------------------------------------------------------------------------------------------------------------


@engines
def test_ifca_separates_planted_clusters(engine: Callable[[], Engine]) -> None:
    centres = (-2.0, 3.0, -2.5, 3.4, -1.8)
    data = points((1.0,) * 5, centres, (2, 4, 2, 2, 6))
    process = Process(scalar_model(0.4), ifca(full(30, 0.3), clusters=2, spread=1.0, seed=2), engine=engine())
    start = process.init()
    assert float(start.algorithm.models[0]) == 0.4 and float(start.algorithm.models[1]) != 0.4
    state, path = train(process, data, 4)
    found = sorted(state.algorithm.models[:, 0].tolist())
    # The mean in a cluster is unweighted.
    assert found == pytest.approx([np.mean([-2.0, -2.5, -1.8]), np.mean([3.0, 3.4])], abs=1e-4)
    assert sorted(state.algorithm.counts.tolist()) == [2, 3]
    assert float(path[-1]) == pytest.approx(found[0], abs=1e-12), "the global model is the larger cluster's"
    own = process.personal(state, data, list(data.clients)).rows[:, 0]
    assert own.tolist() == [found[0] if c < 0 else found[1] for c in centres]
    stranger = points((1.0, 1.0), (2.0, -1.0), (2, 2))
    assert process.personal(state, stranger, ["c0", "c1"]).rows[:, 0].tolist() == [found[1], found[0]]


@engines
def test_a_cluster_nobody_chose_stays_and_starts_can_be_given(engine: Callable[[], Engine]) -> None:
    starts = [torch.tensor([v], dtype=torch.float64) for v in (50.0, 1.0)]
    process = Process(scalar_model(), ifca(full(1), clusters=2, starts=starts), engine=engine())
    state, path = train(process, quadratics(A, B, SIZES), 1)
    expected = 1.0 - LR * float(np.mean(CURVES * (1.0 - CENTRES)))
    assert state.algorithm.models[:, 0].tolist() == pytest.approx([50.0, expected], abs=NEAR)
    assert float(path[0]) == pytest.approx(expected, abs=NEAR)


@engines
def test_one_cluster_of_all_is_fedavg(engine: Callable[[], Engine]) -> None:
    starts = [torch.tensor([v], dtype=torch.float64) for v in (START, 1e6)]
    options = {"start": START, "aggregator": aggregators.mean(weights="uniform")}
    data = quadratics(A, B, SIZES)
    found = scalars(ifca(full(3), clusters=2, starts=starts), engine(), data, 5, **options)
    np.testing.assert_allclose(found, scalars(fedavg(full(3)), engine(), data, 5, **options), rtol=0, atol=NEAR)


# --- whoever asks -----------------------------------------------------------------------------------------------------

PERSONAL = {
    n: m for n, m in ALGORITHMS.items() if Process(MODELS["layer norm"].model(), m.build(m.plan())).personalised
}


def test_these_are_personal() -> None:
    assert set(PERSONAL) == {
        "apfl", "apfl, fixed share", "ditto", "fedala", "fedala, the head",
        "fedbabu", "fedbn", "fedper", "fedrep", "fine_tune", "ifca",
        "lg_fedavg", "local_only", "per_fedavg", "per_fedavg, first order", "pfedme",
    }  # fmt: skip


@pytest.mark.parametrize("name", PERSONAL)
def test_personal_models_of_seen_and_unseen_clients_are_evaluated_and_saved(name: str, tmp_path: Any) -> None:
    method: Method = PERSONAL[name]
    kind = MODELS["layer norm"]
    model = kind.model(metrics=("accuracy",))
    data = kind.data((6, 2, 7, 4))
    result = atoll.simulate(
        model, data, algorithm=method.build(method.plan(0.2, steps=5, batch_size=None)), rounds=3,
        cohort=atoll.sampling.sequence([["c0", "c1"]]),
    )  # fmt: skip
    evaluation = result.evaluate(data, personal=True)
    last = result.history[-1]
    assert last.to_dict()["personal"]
    for client in data.clients:
        own = result.personal(client)
        split = data.test.client(data.index(client))
        output = result.predict(split["x"], client)
        assert torch.isfinite(own).all()
        assert evaluation.client(client)["loss"] == pytest.approx(float(model.loss.mean(output, split["y"])), abs=1e-9)
    # Clients may share a cluster, and may learn that they want nothing of their own.
    for client in () if name in ("ifca", "apfl") else ("c0", "c1"):
        assert not torch.equal(result.personal(client), result.vector), "a visited client's model is its own"
    new = kind.data((6, 2, 7, 4, 9, 3), seed=1)  # c4 and c5 were never in any data of the run
    told = result.evaluate(new, personal=True)
    assert torch.isfinite(torch.tensor([told.client(c)["loss"] for c in new.clients])).all()
    loaded = Result.load(result.save(tmp_path / "result"), model)
    for client in data.clients:
        assert torch.equal(loaded.personal(client), result.personal(client)), client


@pytest.mark.parametrize("name", ["fine_tune", "ditto", "apfl", "per_fedavg", "ifca"])
def test_workers_give_the_bits_of_one_process(name: str) -> None:
    kind, method = MODELS["layer norm"], ALGORITHMS[name]
    data = kind.data((6, 2, 7, 4, 5, 3))
    found = []
    for workers in (1, 2):
        result = atoll.simulate(
            kind.model(), data, algorithm=method.build(method.plan(0.2, epochs=1, batch_size=3)), rounds=2,
            engine=Vectorized(tile=2), workers=workers,
        )  # fmt: skip
        own = torch.stack([result.personal(c) for c in data.clients])
        found.append((result.vector, own, result.evaluate(data, personal=True).metrics))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("name", ["fednova", "feddyn", "fedexp", "qfedavg", "ditto", "apfl", "fedrep", "ifca"])
def test_a_run_that_goes_on_ends_with_the_bits_of_one_that_was_not_stopped(name: str, tmp_path: Any) -> None:
    kind, method = MODELS["layer norm"], ALGORITHMS[name]
    data, found = kind.data((6, 2, 7, 4)), []
    for stops in ((4,), (2, 4)):
        for rounds in stops:
            result = atoll.simulate(
                kind.model(), data, algorithm=method.build(method.plan(epochs=1, batch_size=3)), rounds=rounds,
                cohort=3, directory=tmp_path / str(len(stops)), resume=rounds > stops[0],
            )  # fmt: skip
        found.append(torch.stack([result.vector, *(result.personal(c) for c in data.clients)]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["fine_tune", "pfedme", "per_fedavg", "fedbabu", "ifca"])
def test_clients_never_seen_have_a_model_of_their_own(name: str) -> None:
    kind, method = MODELS["layer norm"], ALGORITHMS[name]
    data = kind.data((6, 2, 7, 4))
    process = Process(kind.model(), method.build(method.plan(0.2, steps=5, batch_size=None)), engine="loop")
    state, _ = train(process, data, 2, [["c0", "c1"]])
    rows = process.personal(state, data, ["c2", "c3"]).rows
    if name != "ifca":
        assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], process.vector(state))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ditto(full(1), lam=-1.0), r"lam=-1\.0 .* at least 0"),
        (lambda: ditto(full(1), lam=20.0), r"lam=20\.0 .* overshoot.*Lower lr, or lam"),
        (lambda: ditto(full(1), lam=1.0, personal=0.1), r"personal=0\.1 .* instance personal=atoll\.local_sgd"),  # type: ignore[arg-type]
        (lambda: fine_tune(full(1), personal=3), "personal=3"),  # type: ignore[arg-type]
        (lambda: fedrep(full(1), private=("h*",), head=1), "head=1"),  # type: ignore[arg-type]
        (lambda: fedbabu(full(1), private=("h*",), tuned="head"), r"tuned='head' .*\"all\" or \"private\""),  # type: ignore[arg-type]
        (lambda: apfl(full(1), alpha=1.2), r"alpha=1\.2 .* in \[0, 1\]"),
        (lambda: apfl(full(1, momentum=0.5)), r"apfl needs plain sgd.*momentum=0\.5"),
        (lambda: pfedme(full(1, optimizer="adam")), r"pfedme needs plain sgd.*'adam'"),
        (lambda: pfedme(full(1), lam=15.0, eta=0.2), r"eta=0\.2 .* below 2 / lam"),
        (lambda: pfedme(full(1), inner=0), "inner=0"),
        (lambda: per_fedavg(full(1), alpha=0.0), r"alpha=0\.0 .* above 0"),
        (lambda: per_fedavg(full(1, momentum=0.5), alpha=0.1), "per_fedavg needs plain sgd"),
        (lambda: ifca(full(1), clusters=1), r"clusters=1 .* integer of at least 2"),
        (lambda: ifca(full(1), clusters=2, spread=0.0), r"spread=0\.0"),
        (lambda: ifca(full(1), clusters=2, starts=[torch.zeros(1)]), "starts='1 vectors'"),
        (lambda: ifca(full(1), clusters=2, starts=3), "starts=3 .* a list with one vector for each of 2"),  # type: ignore[arg-type]
        (lambda: ifca(full(1), clusters=2, starts=[0.0, 1.0]), r"starts=0\.0 .* vectors \[D\]"),  # type: ignore[list-item]
        (lambda: ifca(full(1), clusters=2, starts=[torch.tensor([1]), torch.tensor([2])]), "floating-point"),
        (lambda: ifca(full(1), clusters=2, starts=[torch.zeros(1, 1)] * 2), r"starts=.* vectors \[D\]"),
        (lambda: ifca(full(1), clusters=2, starts=[torch.zeros(1), torch.zeros(2)]), "vectors of one length"),
        (lambda: ifca(full(1), clusters=2, starts=[torch.zeros(1), torch.tensor([torch.nan])]), "NaN .* finite"),
    ],
)
def test_what_would_be_wrong_is_refused(build: Callable[[], Algorithm], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build()


def test_starts_of_another_length_are_refused() -> None:
    process = Process(scalar_model(), ifca(full(1), clusters=2, starts=[torch.zeros(2), torch.ones(2)]))
    with pytest.raises(InvalidArgument, match=r"starts=\(2,\) .* the model's 1 parameters"):
        process.init()


def test_ifca_refuses_statistics_that_would_be_averaged() -> None:
    algorithm = ifca(full(1), clusters=2)
    with pytest.raises(InvalidArgument, match=r"every cluster would need its own.*GroupNorm.*frozen"):
        Process(MODELS["batch norm, mean"].model(), algorithm)
    for fine in ("batch norm, local", "batch norm, frozen", "layer norm"):
        Process(MODELS[fine].model(), algorithm)
