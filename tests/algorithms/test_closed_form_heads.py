"""FedNCM and FED3R: the solution of the pooled data, to the bit of double precision, however the data are spread."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from registry import ENGINES, stack
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import Algorithm, fed3r, fedavg, fedncm
from atoll.data import FederatedDataset
from atoll.engines import Engine, Loop, Vectorized, Workers
from atoll.errors import CompositionError, DataError, InvalidArgument
from atoll.local import local_sgd
from atoll.model import Model
from atoll.rounds import Process

sys.path.insert(0, str(Path(__file__).parent.parent / "net"))

from deployed import deploy, sites

engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
SIZES = (7, 1, 12, 30, 5)
CLASSES, INPUTS, WIDTH = 4, 5, 6


def model(*, bias: bool = True, dtype: torch.dtype = torch.float64, outputs: int = CLASSES, loss: Any = None) -> Model:
    torch.manual_seed(2)
    module = stack(body=nn.Linear(INPUTS, WIDTH), act=nn.Tanh(), head=nn.Linear(WIDTH, outputs, bias=bias))
    return Model(atoll.freeze(module.to(dtype), "body"), loss or "cross_entropy", features="act")


def data(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES) -> FederatedDataset:
    """Clients of few classes: the first has one alone, none but the fourth has class 3."""
    draw = torch.Generator().manual_seed(5)
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, n in enumerate(sizes):
        labels = torch.randint(0, CLASSES if i == 3 else CLASSES - 1, (n,), generator=draw)
        labels = torch.zeros_like(labels) if i == 0 else labels
        x = torch.randn(n, INPUTS, generator=draw, dtype=torch.float64) + labels[:, None] * 0.4 + 0.2 * i
        clients[f"c{i}"] = (x.to(dtype), labels)
    return FederatedDataset.from_arrays(clients, test=clients)


def pooled(made: Model, clients: FederatedDataset) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of everybody, as one table."""
    fields = clients.train.fields
    z = made.module(made.init())[:2](fields["x"])  # type: ignore[index]
    return z.detach().double().numpy(), fields["y"].numpy()


def head(made: Model, vector: Tensor) -> tuple[np.ndarray, np.ndarray]:
    views = made.layout.view(vector)
    bias = views.get("head.bias", torch.zeros(len(views["head.weight"])))
    return views["head.weight"].numpy(), bias.numpy()


def solved(algorithm: Algorithm, made: Model, clients: FederatedDataset, **options: Any) -> Tensor:
    process = Process(made, algorithm, **options)
    state, _ = process.next(process.init(), clients)
    return process.vector(state)


@engines
@pytest.mark.parametrize("bias", [True, False])
def test_fed3r_is_ridge_regression_on_the_pooled_data(engine: Callable[[], Engine], bias: bool) -> None:
    made, clients = model(bias=bias), data()
    weight, own = head(made, solved(fed3r(ridge=0.3), made, clients, engine=engine()))
    z, y = pooled(made, clients)
    expected = Ridge(alpha=0.3, fit_intercept=bias).fit(z, np.eye(CLASSES)[y])
    np.testing.assert_allclose(weight, expected.coef_, rtol=0, atol=1e-12)
    np.testing.assert_allclose(own, expected.intercept_ if bias else 0.0, rtol=0, atol=1e-12)


@engines
def test_fedncm_is_the_nearest_mean_of_the_pooled_data(engine: Callable[[], Engine]) -> None:
    made, clients = model(), data()
    z, y = pooled(made, clients)
    means = np.stack([z[y == c].mean(axis=0) for c in range(CLASSES)])
    weight, bias = head(made, solved(fedncm(), made, clients, engine=engine()))
    np.testing.assert_allclose(weight, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=0, atol=1e-13)
    assert not bias.any()
    weight, bias = head(made, solved(fedncm(distance="euclidean", scale=0.5), made, clients, engine=engine()))
    np.testing.assert_allclose(weight, means, rtol=0, atol=1e-13)
    nearest = NearestCentroid().fit(z, y)
    assert np.array_equal((z @ weight.T + bias).argmax(axis=1), nearest.predict(z))


@pytest.mark.parametrize("build", [fed3r, fedncm])
def test_the_layer_may_be_the_whole_model(build: Callable[[], Algorithm]) -> None:
    clients = data()
    bare = nn.Linear(INPUTS, CLASSES, dtype=torch.float64)
    within = Model(stack(head=nn.Linear(INPUTS, CLASSES, dtype=torch.float64)), "cross_entropy")
    alone = solved(build(), Model(bare, "cross_entropy"), clients)
    torch.testing.assert_close(alone, solved(build(), within, clients), rtol=0, atol=0)


def test_regression_too() -> None:
    made = model(outputs=2, loss="mse")
    clients, draw = data(), torch.Generator().manual_seed(8)
    y = torch.randn(len(clients.train), 2, generator=draw, dtype=torch.float64)
    clients = FederatedDataset.from_packed({"x": clients.train.fields["x"], "y": y}, clients.train.offsets)
    weight, bias = head(made, solved(fed3r(ridge=0.1), made, clients))
    z = made.module(made.init())[:2](clients.train.fields["x"]).detach().numpy()  # type: ignore[index]
    expected = Ridge(alpha=0.1).fit(z, y.numpy())
    np.testing.assert_allclose(weight, expected.coef_, rtol=0, atol=1e-12)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [lambda: fed3r(ridge=0.3), lambda: fedncm(distance="euclidean")], ids=["3r", "ncm"])
def test_partial_cohorts_reach_the_same_and_count_nobody_twice(build: Callable[[], Algorithm]) -> None:
    made, clients = model(), data()
    expected = solved(build(), made, clients)
    process = Process(made, build())
    state = process.init()
    for cohort in (["c3"], ["c0", "c3"], ["c1", "c2", "c4", "c3"], ["c0", "c4"]):
        state, metrics = process.next(state, clients, cohort)
    torch.testing.assert_close(process.vector(state), expected, rtol=0, atol=1e-12)
    first, _ = process.next(process.init(), clients, ["c3"])
    alone = solved(build(), made, clients.select(["c3"]))
    torch.testing.assert_close(process.vector(first), alone, rtol=0, atol=1e-12)
    assert np.isnan(metrics["loss"]), "nothing was trained"


def test_a_class_that_nobody_has_is_never_chosen() -> None:
    made, clients = model(), data().select(["c1", "c2", "c4"])
    for distance in ("cosine", "euclidean"):
        vector = solved(fedncm(distance=distance), made, clients)  # type: ignore[arg-type]
        weight, bias = head(made, vector)
        assert not weight[3].any() and bias[3] == -1e4
        assert 3 not in made.module(vector)(clients.train.fields["x"]).argmax(dim=1)
    weight, _ = head(model(bias=False), solved(fedncm(), model(bias=False), clients))
    assert np.isfinite(weight).all() and not weight[3].any()


@pytest.mark.parametrize(
    "engine", [Loop, Vectorized, lambda: Workers(Vectorized(tile=2), 2)], ids=["loop", "rows", "2"]
)
def test_sums_are_double_precision_whatever_the_model_is(engine: Callable[[], Engine]) -> None:
    """Features around 1,000 leave nothing of their spread in sums of squares in single precision."""
    torch.manual_seed(0)
    made = Model(stack(head=nn.Linear(3, 2)), "cross_entropy")
    draw = torch.Generator().manual_seed(1)
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i in range(40):
        y = torch.arange(25) % 2
        x = 1000.0 + torch.randn(25, 3, generator=draw, dtype=torch.float64) + y[:, None]
        clients[f"c{i}"] = (x.float(), y)
    dataset = FederatedDataset.from_arrays(clients)
    used = engine()
    vector = solved(fed3r(ridge=1.0), made, dataset, engine=used)
    used.stop()
    assert vector.dtype == torch.float32
    fields = dataset.train.fields
    expected = Ridge(alpha=1.0).fit(fields["x"].double().numpy(), np.eye(2)[fields["y"].numpy()])
    weight, _ = head(made, vector)
    np.testing.assert_allclose(weight, expected.coef_, rtol=1e-5, atol=0)
    single = fields["x"].T @ fields["x"]
    assert (single.double() - fields["x"].double().T @ fields["x"].double()).abs().max() > 1, "it would not do"


@pytest.mark.parametrize("build", [lambda: fed3r(ridge=0.3), lambda: fedncm()], ids=["3r", "ncm"])
def test_a_channel_that_shows_sums_alone_gives_the_same_to_its_rounding(build: Callable[[], Algorithm]) -> None:
    made, clients = model(), data()
    expected = solved(build(), made, clients)
    channel = transforms.secure_sum(clip=64.0, weight_cap=64.0, bits=48)
    torch.testing.assert_close(solved(build(), made, clients, channel=channel), expected, rtol=0, atol=1e-9)


def test_sums_that_were_cut_are_no_solution() -> None:
    process = Process(model(), fed3r(ridge=0.3), channel=transforms.secure_sum(clip=2.0, weight_cap=64.0))
    state = process.init()
    with pytest.raises(CompositionError, match="cut to the range of the channel secure_sum"):
        process.next(state, data())
    other = Process(model(), fed3r(ridge=0.3), channel=transforms.secure_sum(clip=64.0, weight_cap=64.0, bits=48))
    assert len(state.memory) == 0, "nobody was counted"
    other.next(other.init(), data())


def test_stages_and_rules_that_would_spoil_the_sums_are_refused() -> None:
    for stage in (transforms.clip_norm(1.0), transforms.quantize(8), transforms.half()):
        with pytest.raises(CompositionError, match="would change the sums that fed3r solves"):
            Process(model(), fed3r(), transforms=(stage,))
    with pytest.raises(CompositionError, match="added up"):
        Process(model(), fedncm(), aggregator=aggregators.median())


def test_weights_of_the_mean_do_not_matter() -> None:
    made, clients = model(), data()
    uniform = solved(fed3r(), made, clients, aggregator=aggregators.mean(weights="uniform"))
    assert torch.equal(uniform, solved(fed3r(), made, clients))


def test_a_head_that_was_solved_can_be_trained_further() -> None:
    made, clients = model(), data()
    made = Model(made.module(made.init()), "cross_entropy", ("accuracy",))
    start = atoll.simulate(model(), clients, algorithm=fed3r(ridge=0.3, scale=4.0), rounds=1, progress=False)
    plain = atoll.simulate(model(), clients, algorithm=fed3r(ridge=0.3), rounds=1, progress=False)
    assert torch.equal(start.vector, 4 * plain.vector)
    tuned = atoll.simulate(
        model(), clients, algorithm=fedavg(local_sgd(0.1, epochs=2, batch_size=8)), rounds=5, initial=start.vector,
        progress=False,
    )  # fmt: skip
    assert tuned.history[-1].test["loss"] < start.history[-1].test["loss"]


def test_what_was_counted_outlives_a_restart(tmp_path: Path) -> None:
    clients, order = data(), [["c0", "c1"], ["c1", "c2", "c3"], ["c4", "c0"]]
    options: dict[str, Any] = {"algorithm": fed3r(ridge=0.3), "cohort": atoll.sampling.sequence(order)}
    whole = atoll.simulate(model(), clients, rounds=3, progress=False, **options)
    atoll.simulate(model(), clients, rounds=2, progress=False, directory=tmp_path / "run", **options)
    resumed = atoll.simulate(
        model(), clients, rounds=3, progress=False, directory=tmp_path / "run", resume=True, **options
    )
    assert torch.equal(resumed.vector, whole.vector)
    torch.testing.assert_close(whole.vector, solved(fed3r(ridge=0.3), model(), clients), rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [lambda: fed3r(ridge=0.3), lambda: fedncm()], ids=["3r", "ncm"])
@pytest.mark.parametrize("ring", [False, True], ids=["plain", "ring"])
def test_it_can_be_deployed(build: Callable[[], Algorithm], ring: bool) -> None:
    clients = data(torch.float32)
    channel = transforms.secure_sum(clip=256.0, weight_cap=64.0, bits=48) if ring else "plain"

    def process() -> Process:  # a head alone: sites' own copies of the data may change a product's last bit
        torch.manual_seed(0)
        return Process(
            Model(stack(head=nn.Linear(INPUTS, CLASSES)), "cross_entropy"), build(), engine="loop", channel=channel
        )

    made = process()
    state = made.init()
    for _ in range(2):
        state, _ = made.next(state, clients)
    world = deploy(process, clients, 2, sites(process, clients))
    assert world.server is not None
    assert torch.equal(made.vector(state), made.vector(world.server.model))


def test_bytes_are_those_of_the_sums() -> None:
    made, clients = model(dtype=torch.float32), data(torch.float32)
    process = Process(made, fed3r())
    _, metrics = process.next(process.init(), clients)
    d, length = WIDTH + 1, CLASSES * (WIDTH + 1)
    sums = d * (d + 1) // 2 + d * CLASSES
    assert metrics["bytes_up"] == len(SIZES) * (8 * (length + sums) + 24)
    assert metrics["bytes_down"] == len(SIZES) * 4 * length


# --- what is refused --------------------------------------------------------------------------------------------------


def test_which_layer_is_the_head() -> None:
    torch.manual_seed(0)
    two = stack(body=nn.Linear(INPUTS, WIDTH), head=nn.Linear(WIDTH, CLASSES)).double()
    with pytest.raises(InvalidArgument, match=r"trains 2 \(body, head\): name it by head="):
        Process(Model(two, "cross_entropy"), fed3r())
    with pytest.raises(InvalidArgument, match=r"head='neck'.*trained: body, head"):
        Process(Model(two, "cross_entropy"), fed3r(head="neck"))
    with pytest.raises(InvalidArgument, match="not what that layer gives"):
        Process(Model(two, "cross_entropy"), fed3r(head="body")).next(
            Process(Model(two, "cross_entropy"), fed3r(head="body")).init(), data()
        )
    made = Model(two, "cross_entropy")
    vector = solved(fed3r(head="head"), made, data())
    views, start = made.layout.view(vector), made.layout.view(made.init())
    assert torch.equal(views["body.weight"], start["body.weight"])
    assert not torch.equal(views["head.weight"], start["head.weight"])
    two.get_parameter("head.bias").requires_grad_(False)
    with pytest.raises(InvalidArgument, match="bias of 'head' too, but it is frozen"):
        Process(Model(two, "cross_entropy"), fed3r(head="head"))


def test_models_and_targets_it_is_not_made_for() -> None:
    with pytest.raises(InvalidArgument, match="needs a bias"):
        Process(model(bias=False), fedncm(distance="euclidean"))
    squashed = Model(stack(head=nn.Linear(INPUTS, 1), act=nn.Sigmoid()).double(), "mse")
    numbers = FederatedDataset.from_arrays({"a": (torch.randn(4, INPUTS).double(), torch.randn(4, 1).double())})
    with pytest.raises(InvalidArgument, match="leave activations behind it to the loss"):
        solved(fed3r(), squashed, numbers)
    with pytest.raises(DataError, match=r"class labels \[n\] are needed"):
        solved(fedncm(), Model(stack(head=nn.Linear(INPUTS, 1)).double(), "mse"), numbers)
    sequence = Model(stack(head=nn.Linear(INPUTS, 3), flat=nn.Flatten()).double(), "cross_entropy")
    words = FederatedDataset.from_arrays({"a": (torch.randn(4, 2, INPUTS).double(), torch.arange(4))})
    with pytest.raises(InvalidArgument, match="one vector for every example"):
        solved(fed3r(), sequence, words)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: fed3r(ridge=0.0), "ridge=0.0"),
        (lambda: fed3r(ridge=float("nan")), "ridge=nan"),
        (lambda: fed3r(scale=0), "scale=0"),
        (lambda: fedncm(scale=-1.0), "scale=-1.0"),
        (lambda: fedncm(distance="manhattan"), '"cosine" or "euclidean"'),  # type: ignore[arg-type]
        (lambda: fed3r(head=3), "head=3"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range(build: Callable[[], Algorithm], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build()


def test_it_says_what_it_is() -> None:
    assert fed3r(ridge=0.5).spec == {"name": "fed3r", "ridge": 0.5, "head": None, "scale": 1.0}
    assert fedncm(head="head").spec != fedncm().spec
    with pytest.raises(InvalidArgument, match="solves for a layer of a model"):
        fed3r().init(torch.zeros(3))
