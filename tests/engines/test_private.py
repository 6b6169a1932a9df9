"""Example-level privacy: fast sums equal the naive loop, batches and noise have the stated laws, nothing else looks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from registry import MODELS
from scipy import stats
from torch import Tensor, nn

import atoll
from atoll import privacy
from atoll.engines import Loop, Vectorized, operations
from atoll.engines import private as module
from atoll.engines.arena import Arena
from atoll.errors import CompositionError, InvalidArgument
from atoll.privacy import example_level
from atoll.rounds import Process

KINDS = [n for n, k in MODELS.items() if "batch norm" not in n and "instance norm" not in n]


def plan(**options: Any) -> Any:
    given: dict[str, Any] = {"steps": 3, "batch_size": 4} | options
    told = given.pop("privacy", None) or example_level(clip=0.5, noise_multiplier=1e-4, seed=1)
    return atoll.local_sgd(0.1, privacy=told, **given)


def trained(kind: Any, engine: Any, own: Any, algorithm: Any = atoll.fedavg) -> tuple[Tensor, Process]:
    model, data = kind.model(), kind.data((5, 9, 2))
    run = Process(model, algorithm(own), engine=engine)
    state, told = run.next(run.init(), data)
    assert math.isnan(told["loss"])
    return run.vector(state), run


@pytest.mark.parametrize("name", KINDS)
def test_clipped_sums_equal_the_naive_loop(name: str) -> None:
    own = plan(steps=2)
    slow, run = trained(MODELS[name], Loop(), own)
    fast, _ = trained(MODELS[name], Vectorized(), own)
    assert float((slow - run.model.init()).norm()) > 1e-3
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("patches", [True, False])
def test_convolutions_that_examples_share_are_clipped_by_patches_and_by_the_library(
    patches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not patches:
        monkeypatch.setattr(operations, "PATCH_VALUES", 0)
        monkeypatch.setattr(operations, "PATCH_WORK", 0)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 1, 7, 7, generator=draw, dtype=torch.float64), torch.arange(9) % 3
    data = atoll.FederatedDataset.from_arrays({"a": (x[:6], y[:6]), "b": (x[6:], y[6:])})
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(75, 3)
    model, ends = atoll.Model(nn.Sequential(*layers).double(), "cross_entropy"), list[Tensor]()
    for engine in (Loop(), fast := Vectorized()):
        run = Process(model, atoll.fedavg(plan(batch_size=None)), engine=engine)
        ends.append(run.vector(run.next(run.init(), data)[0]))
    assert fast.describe()["reason"] == "all its layers have a form on rows"
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-8)


class Pooled(nn.Module):
    """Linear layers over positions, averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).mean(dim=1))


@pytest.mark.parametrize("positions", [1, 2, 12], ids=["one", "few", "many"])  # 12 squared is more than 4 times 6
def test_linear_layers_over_positions_are_clipped_example_by_example(positions: int) -> None:
    draw = torch.Generator().manual_seed(3)
    sizes = {"a": 3, "b": 80, "c": 66}  # more than are taken at once, and not equally many
    data = atoll.FederatedDataset.from_arrays(
        {
            n: (torch.randn(k, positions, 4, generator=draw, dtype=torch.float64), torch.arange(k) % 3)
            for n, k in sizes.items()
        }
    )
    model = atoll.Model(Pooled().double(), "cross_entropy")
    told = example_level(clip=0.3, noise_multiplier=1e-6, seed=1)
    for own in (plan(batch_size=None, steps=1, privacy=told), plan(batch_size=2, privacy=told)):
        ends: list[Tensor] = []
        for engine in (Loop(), Vectorized()):
            run = Process(model, atoll.fedavg(own), engine=engine)
            ends.append(run.vector(run.next(run.init(), data)[0]))
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-8)
        assert float((ends[0] - model.init()).norm()) > 1e-4


class Wide(nn.Module):
    """A linear map, scaled or not: only without are linear layers alone."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        nn.init.constant_(self.linear.weight, 9.0)
        self.scale = nn.Parameter(torch.ones(3)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.scale is None else self.linear(x) * self.scale


@pytest.mark.parametrize("scaled", [False, True])
def test_an_example_whose_gradient_is_not_finite_adds_nothing(scaled: bool) -> None:
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 3
    x[[2, 5]] = 1e308  # nine of these are more than a number holds; none is among those the model is tried on
    data = atoll.FederatedDataset.from_arrays({"a": (x, y), "b": (x[4:], y[4:])})
    model, ends = atoll.Model(Wide(scaled=scaled).double(), "cross_entropy"), list[Tensor]()
    for engine in (Loop(), fast := Vectorized()):
        run = Process(model, atoll.fedavg(plan(batch_size=None)), engine=engine)
        ends.append(run.vector(run.next(run.init(), data)[0]))
    assert fast.describe()["reason"] == "all its layers have a form on rows"
    assert bool(ends[0].isfinite().all())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"optimizer": "adam"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"batch_size": None},
        {"schedule": lambda round, step: 1.0 / (1 + step)},
    ],
)
def test_every_rule_of_the_plan_is_kept(options: Any) -> None:
    own = plan(**options)
    slow, _ = trained(MODELS["perceptron"], Loop(), own)
    fast, _ = trained(MODELS["perceptron"], Vectorized(), own)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


CORRECTED = [lambda p: atoll.fedprox(p, mu=0.3), atoll.scaffold, lambda p: atoll.feddyn(p, alpha=0.5)]


@pytest.mark.parametrize("algorithm", CORRECTED)
def test_corrections_are_kept(algorithm: Any) -> None:
    slow, _ = trained(MODELS["perceptron"], Loop(), plan(), algorithm)
    fast, _ = trained(MODELS["perceptron"], Vectorized(), plan(), algorithm)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)


def test_without_clipping_and_noise_a_full_batch_is_plain_training() -> None:
    kind = MODELS["perceptron"]
    free = example_level(clip=1e3, noise_multiplier=1e-6, seed=1)
    private, _ = trained(kind, Vectorized(), plan(batch_size=None, privacy=free))
    run = Process(kind.model(), atoll.fedavg(atoll.local_sgd(0.1, steps=3, batch_size=None)))
    state, _ = run.next(run.init(), kind.data((5, 9, 2)))
    torch.testing.assert_close(private, run.vector(state), rtol=1e-4, atol=1e-4)


def test_one_example_moves_the_sum_by_at_most_the_clip_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []

    class Spy(module.Source):
        def add_normal(self, values: Tensor, std: float, *, within: float | None = None) -> Tensor:
            sums.append(values.clone())
            return values

        def derive(self, *parts: Any) -> "Spy":
            return self

        def bernoulli(self, probability: Any, size: Any) -> Tensor:
            return torch.ones(size, dtype=torch.bool)

    monkeypatch.setattr(module, "Source", Spy)
    kind = MODELS["perceptron"]
    x, y = torch.randn(6, 4, dtype=torch.float64) * torch.logspace(-3, 6, 6)[:, None], torch.arange(6) % 3
    own = atoll.local_sgd(0.1, steps=1, batch_size=None, privacy=example_level(clip=0.5, noise_multiplier=1.0))
    for engine in (Loop(), Vectorized()):
        sums.clear()
        run = Process(kind.model(), atoll.fedavg(own), engine=engine)
        for gone in (None, *range(6)):
            keep = [i for i in range(6) if i != gone]
            data = atoll.FederatedDataset.from_arrays({"a": (x[keep], y[keep])})
            run.next(run.init(), data)
        moved = [float((sums[0] - s).norm()) for s in sums[1:]]
        assert max(moved) <= 0.5 and max(moved) > 0.4999 * 0.99


def test_noise_and_batches_have_the_stated_laws() -> None:
    size, n, batch, clip, z = 20_000, 50, 10, 0.3, 1.7
    flat = nn.Linear(size, 1, bias=False).double()
    nn.init.zeros_(flat.weight)
    model = atoll.Model(flat, lambda output, target: 0.0 * output[:, 0])
    data = atoll.FederatedDataset.from_arrays({"a": (torch.ones(n, size, dtype=torch.float64), torch.zeros(n))})
    own = atoll.local_sgd(1.0, steps=1, batch_size=batch, privacy=example_level(clip=clip, noise_multiplier=z))
    run = Process(model, atoll.fedavg(own))
    noise = (run.vector(run.next(run.init(), data)[0]) * batch).numpy()
    assert stats.kstest(noise, "norm", args=(0.0, z * clip)).pvalue > 1e-6

    counts: list[int] = []

    def summed(clients: Any, y: Tensor, held: Tensor, places: Any, step: int, c: float) -> list[Tensor]:
        counts.append(len(places[0]))
        return [torch.zeros(y.shape[1], dtype=torch.float64)]

    kind = MODELS["perceptron"]
    process = Process(kind.model(), atoll.fedavg(own), engine="loop")
    clients = kind.data((n,))
    process.engine.prepare(process, clients)
    task = process.open(process.init(), ("c0",), 1)
    cohort, _ = next(process.engine.tiles(process, task, clients, process.init().memory))
    many = atoll.local_sgd(0.1, steps=400, batch_size=batch, privacy=example_level(clip=clip, noise_multiplier=z))
    module.train_privately(
        cohort, summed, cohort.rows(task.message.vector), many, anchor=None, pull=0.0, shift=None, train=None,
        buffers=None, purpose="train", arena=Arena(),
    )  # fmt: skip
    found = np.array(counts)
    assert abs(found.mean() - batch) < 6 * math.sqrt(batch * 0.8 / 400) and 4 < found.var() < 13


def test_private_training_is_new_every_time_and_seeded_training_is_not() -> None:
    kind, secret = MODELS["perceptron"], example_level(clip=0.5, noise_multiplier=1.0)
    ends = [trained(kind, Vectorized(), plan(privacy=secret))[0] for _ in range(2)]
    assert not torch.equal(*ends)
    ends = [trained(kind, Vectorized(), plan())[0] for _ in range(2)]
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (lambda p: atoll.qfedavg(p, q=1.0), "loss looks at examples without noise"),
        (lambda p: atoll.scaffold(p, option=1), "gradient looks at examples without noise"),
        (lambda p: atoll.per_fedavg(p, alpha=0.1, personal=p), "minibatch looks at examples without noise"),
        (lambda p: atoll.ditto(p, lam=0.1, personal=atoll.local_sgd(0.1)), "some of the plans of ditto"),
    ],
)
def test_methods_that_look_at_examples_otherwise_are_refused(algorithm: Any, said: str) -> None:
    for engine in (Loop(), Vectorized()):
        with pytest.raises(CompositionError, match=said):
            trained(MODELS["perceptron"], engine, plan(), algorithm)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_refused_with_a_replacement(kind: torch.dtype) -> None:
    model = atoll.Model(nn.Linear(2, 3).to(kind), "cross_entropy")
    with pytest.raises(CompositionError, match=rf"{kind}.*use a model in torch\.float32"):
        Process(model, atoll.fedavg(plan()))


MIXING = ["batch norm, mean", "batch norm, local", "batch norm, frozen", "convolution, batch norm"]


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_examples_are_refused_with_a_replacement(name: str) -> None:
    with pytest.raises(CompositionError, match=r"'norm' \(BatchNorm.*nn.GroupNorm or nn.LayerNorm"):
        Process(MODELS[name].model(), atoll.fedavg(plan()))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip": 0.0}, "clip=0.0"),
        ({"noise_multiplier": 1.0, "epsilon": 1.0}, "and not both"),
        ({"noise_multiplier": None}, "and not both"),
        ({"delta": 2.0}, "delta=2.0"),
        ({"accountant": "analytic"}, "accountant='analytic'"),
        ({"seed": "a"}, "seed='a'"),
    ],
)
def test_arguments_outside_their_range(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        example_level(**{"clip": 1.0, "noise_multiplier": 1.0} | wrong)
    with pytest.raises(InvalidArgument, match=r"privacy=1\.0"):
        atoll.local_sgd(0.1, privacy=1.0)  # type: ignore[arg-type]
    assert privacy.example_level is example_level


@pytest.mark.parametrize("name", ["perceptron", next(n for n in KINDS if "embedding" in n or "convolution" in n)])
def test_an_empty_minibatch_is_noise_alone(name: str) -> None:
    own = plan(steps=12, batch_size=1)  # of twelve Poisson samples with one example expected some are empty
    slow, _ = trained(MODELS[name], Loop(), own)
    fast, _ = trained(MODELS[name], Vectorized(), own)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


def test_a_step_s_clip_and_an_example_s_do_not_go_together() -> None:
    with pytest.raises(InvalidArgument, match=r"clip=2\.0.*left out with privacy="):
        plan(clip=2.0)


@pytest.mark.parametrize("times", [1, 2])
def test_training_that_an_algorithm_does_not_tell_of_is_refused(times: int) -> None:
    def untold(own: Any) -> Any:
        base = atoll.fedavg(own)

        def local(message: Any, memory: Any, cohort: Any) -> Any:
            start = cohort.rows(message.vector)
            for number in range(times):
                done = cohort.sgd(start, own, purpose=str(number))
            return cohort.update(done, start), memory

        return replace(base, local=local, plans=base.plans[: times - 1])

    for engine in (Loop(), Vectorized()):
        with pytest.raises(CompositionError, match=r"nobody would count it.*plans="):
            trained(MODELS["perceptron"], engine, plan(), untold)
