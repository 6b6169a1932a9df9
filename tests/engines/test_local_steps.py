"""Local training against torch's own optimisers on the same batches, and the grouping of batches."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import ENGINES, MODELS, Kind
from torch import Tensor, nn

from atoll.algorithms import Algorithm, fedavg
from atoll.algorithms.base import Memory, Message
from atoll.cohort import Cohort
from atoll.engines import Engine
from atoll.engines.schedule import schedule
from atoll.local import Plan, local_sgd
from atoll.model import Model
from atoll.rounds import Process
from atoll.vectors import Update

KINDS = ("loop", "rows", "rows, tile of 1", "single")
engines = pytest.mark.parametrize("engine", [ENGINES[n] for n in KINDS], ids=KINDS)


def look(engine: Engine, kind: Kind, sizes: tuple[int, ...], see: Callable[[Message, Cohort], Update]) -> None:
    """Run `see` as the local work of a round on everybody."""

    def local(message: Message, memory: Memory, cohort: Cohort) -> tuple[Update, Memory]:
        return see(message, cohort), memory

    from dataclasses import replace

    algorithm: Algorithm = replace(fedavg(local_sgd(0.1)), local=local)
    process = Process(kind.model(), algorithm, engine=engine)
    process.next(process.init(), kind.data(sizes))


def reference(
    kind: Kind, plan: Plan, x: Tensor, y: Tensor, build: Callable[..., torch.optim.Optimizer]
) -> tuple[Tensor, float]:
    """One client's parameters and summed loss after unshuffled training with an optimiser of torch."""
    model = kind.model()
    module = model.module(model.init()).train()
    optimizer = build([p for p in module.parameters() if p.requires_grad])
    size = len(y) if plan.batch_size is None else plan.batch_size
    total, step, losses = int(plan.total_steps(np.array([len(y)]))[0]), 0, 0.0
    while step < total:
        for begin in range(0, len(y), size):
            if step == total:
                break
            for group in optimizer.param_groups:
                group["lr"] = float(plan.rate(0, np.array([step]))[0])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x[begin : begin + size]), y[begin : begin + size])
            loss.backward()
            if plan.clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), plan.clip)
            optimizer.step()
            losses += loss.item() * len(y[begin : begin + size])
            step += 1
    return model.layout.flatten({n: p for n, p in module.named_parameters() if p.requires_grad}), losses


def decay(round: int, step: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.asarray(step))


CASES: dict[str, tuple[dict[str, object], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": ({}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "weight decay": ({"weight_decay": 0.05}, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05)),
    "momentum and weight decay": (
        {"momentum": 0.5, "weight_decay": 0.05},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.05),
    ),
    "adam": ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.1)),
    "adam, weight decay": (
        {"optimizer": "adam", "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": 1e-3},
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.05),
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.05},
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05),
    ),
    "clip": ({"clip": 0.2}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "clip that never acts": ({"clip": 1e3}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "clip, momentum, weight decay": (
        {"clip": 0.2, "momentum": 0.5, "weight_decay": 0.05},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.05),
    ),
    "clip, adam": ({"clip": 0.2, "optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.1)),
    "clip, schedule": ({"clip": 0.2, "schedule": decay}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd, schedule": ({"schedule": decay}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "adamw, schedule": (
        {"optimizer": "adamw", "weight_decay": 0.05, "schedule": decay},
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05),
    ),
}


@engines
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 5}], ids=["epochs", "steps"])
def test_local_steps_are_those_of_torch(engine: Callable[[], Engine], case: str, length: dict[str, int]) -> None:
    options, build = CASES[case]
    kind, sizes = MODELS["perceptron"], (7, 1, 3, 8, 7)
    data = kind.data(sizes)
    plan = local_sgd(0.1, batch_size=3, shuffle=False, **length, **options)  # type: ignore[arg-type]
    seen: set[str] = set()

    def see(message: Message, cohort: Cohort) -> Update:
        start = cohort.rows(message.vector)
        trained = cohort.sgd(start, plan)
        for i, client in enumerate(cohort.clients):
            train = data[client].train
            expected, losses = reference(kind, plan, train["x"], train["y"], build)
            torch.testing.assert_close(trained.rows[i], expected, rtol=0, atol=1e-9)
            steps = int(plan.total_steps(np.array([len(train["y"])]))[0])
            assert trained.steps[i].item() == steps
            assert trained.rates[i].item() == pytest.approx(plan.rate(0, np.arange(steps)).sum(), abs=1e-12)
            assert trained.loss[i].item() == pytest.approx(losses, abs=1e-9)
            seen.add(client)
        return cohort.update(trained, start)

    look(engine(), kind, sizes, see)
    assert seen == set(data.clients)


@engines
@pytest.mark.parametrize("part", ["a layer", "some numbers"])
def test_what_is_clipped_is_the_corrected_gradient_of_what_is_trained(engine: Callable[[], Engine], part: str) -> None:
    kind, plan = MODELS["perceptron"], local_sgd(0.1, steps=1, batch_size=None, clip=0.05)
    mask = kind.model().layout.mask(["head.weight"])
    if part == "some numbers":
        mask = torch.arange(len(mask)) % 3 == 0

    def see(message: Message, cohort: Cohort) -> Update:
        start = cohort.rows(message.vector)
        shift = torch.linspace(-1.0, 1.0, start.shape[1], dtype=start.dtype)
        anchor = torch.zeros_like(message.vector)
        trained = cohort.sgd(start, plan, anchor=anchor, pull=0.5, shift=shift, train=mask)
        wanted = torch.where(mask, cohort.gradient(start) + 0.5 * start + shift, 0.0)
        assert bool((wanted.norm(dim=1) > 0.05).all())
        wanted = wanted * 0.05 / (wanted.norm(dim=1, keepdim=True) + 1e-6)
        torch.testing.assert_close(trained.minus(start), -0.1 * wanted, rtol=0, atol=1e-12)
        return cohort.update(trained, start)

    look(engine(), kind, (4, 7, 4), see)


@engines
def test_the_correction_is_data(engine: Callable[[], Engine]) -> None:
    """`y <- y - rate (gradient + pull (y - anchor) + shift)`, on the trained parameters alone."""
    kind, sizes = MODELS["perceptron"], (4, 2, 4)
    data = kind.data(sizes)
    model = kind.model()
    draw = torch.Generator().manual_seed(1)
    anchor, shift = (torch.randn(model.size, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = model.layout.mask([n for n in model.layout.names if n.startswith("head")])
    plan = local_sgd(0.1, steps=3, batch_size=None)

    def see(message: Message, cohort: Cohort) -> Update:
        start = cohort.rows(message.vector)
        own = shift * torch.arange(1, len(cohort.clients) + 1)[:, None]
        given = start.clone()
        trained = cohort.sgd(start, plan, anchor=anchor, pull=0.3, shift=own, train=mask)
        assert torch.equal(start, given), "the start rows were changed"
        for i, client in enumerate(cohort.clients):
            train, y = data[client].train, message.vector
            for _ in range(3):
                leaf = y.clone().requires_grad_()
                output = model.call(model.layout.view(leaf), {}, train, train=True)
                (g,) = torch.autograd.grad(nn.functional.cross_entropy(output, train["y"]), leaf)
                y = y - torch.where(mask, 0.1 * (g + 0.3 * (y - anchor) + own[i]), 0.0)
            torch.testing.assert_close(trained.rows[i], y, rtol=0, atol=1e-12)
        return cohort.update(trained, start)

    look(engine(), kind, sizes, see)


@engines
def test_gradients_losses_and_predictions_are_those_of_autograd(engine: Callable[[], Engine]) -> None:
    kind, sizes = MODELS["perceptron"], (4, 2, 4, 1)
    data, model = kind.data(sizes), kind.model()

    def see(message: Message, cohort: Cohort) -> Update:
        start = cohort.rows(message.vector) + 0.1 * torch.arange(len(cohort.clients), dtype=torch.float64)[:, None]
        gradients, losses, outputs = cohort.gradient(start), cohort.loss(start), cohort.predict(start)
        assert losses.shape == (len(cohort.clients), 1)
        for i, client in enumerate(cohort.clients):
            train, leaf = data[client].train, start[i].clone().requires_grad_()
            output = model.call(model.layout.view(leaf), {}, train, train=False)
            loss = nn.functional.cross_entropy(output, train["y"])
            (g,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(gradients[i], g, rtol=0, atol=1e-12)
            torch.testing.assert_close(losses[i, 0], loss.detach(), rtol=0, atol=1e-12)
            torch.testing.assert_close(outputs[i], output.detach(), rtol=0, atol=1e-12)
        batch = {
            "x": torch.ones(len(start), 2, 4, dtype=torch.float64),
            "y": torch.zeros(len(start), 2, dtype=torch.int64),
        }
        given = cohort.gradient(start, batch)
        leaf = start[0].clone().requires_grad_()
        output = model.call(model.layout.view(leaf), {}, {"x": batch["x"][0]}, train=False)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(output, batch["y"][0]), leaf)
        torch.testing.assert_close(given[0], g, rtol=0, atol=1e-12)
        return cohort.update(cohort.sgd(start, local_sgd(0.1)), start)

    look(engine(), kind, sizes, see)


@engines
def test_features_are_the_output_of_the_named_submodule(engine: Callable[[], Engine]) -> None:
    from dataclasses import replace

    kind = replace(MODELS["perceptron"], options={"features": "act"})
    data, model = kind.data((3, 2)), kind.model()

    def see(message: Message, cohort: Cohort) -> Update:
        start = cohort.rows(message.vector)
        for client, found in zip(cohort.clients, cohort.features(start), strict=True):
            module = model.module(message.vector)
            expected = module.get_submodule("body")(data[client].train["x"]).tanh().detach()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        return cohort.update(cohort.sgd(start, local_sgd(0.1)), start)

    look(engine(), kind, (3, 2), see)


def test_features_need_a_name() -> None:
    kind = MODELS["perceptron"]
    with pytest.raises(ValueError, match="features="):
        Model(kind.module(), "cross_entropy").features({}, {}, {})
    with pytest.raises(ValueError, match=r"features='neck'.*name of a submodule"):
        Kind(kind.module, options={"features": "neck"}).model()


# --- the order of batches ---------------------------------------------------------------------------------------------


@given(
    batch=st.one_of(st.none(), st.integers(1, 5)),
    clients=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=6),
)
def test_grouped_batches_are_every_clients_own_in_its_order(batch: int | None, clients: list[tuple[int, int]]) -> None:
    sizes, totals = np.array([c[0] for c in clients]), np.array([c[1] for c in clients])
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in clients]
    for group in schedule(batch, sizes, totals):
        members = group.members
        assert (
            np.arange(len(sizes))[members] if isinstance(members, slice) else members.numpy()
        ).tolist() == group.rows.tolist()
        for place, row in enumerate(group.rows):
            for j in range(group.count):
                begin = int(group.begins[place]) + j * group.size
                found[row].append((int(group.steps[place]) + j, group.number, begin, group.size))
    for row, (size, total) in enumerate(clients):
        expected: list[tuple[int, int, int, int]] = []
        width, number = batch or size, 0
        while len(expected) < total:
            for begin in range(0, size, width):
                if len(expected) < total:
                    expected.append((len(expected), number, begin, min(width, size - begin)))
            number += 1
        assert found[row] == expected
