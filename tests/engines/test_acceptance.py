"""What is refused about a model before any work, and what the row form of a model must not do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import atoll
from atoll.engines import Loop, Vectorized
from atoll.errors import CompositionError, InvalidArgument
from atoll.transforms import secure_sum

PLAN = atoll.local_sgd(0.1, epochs=2, batch_size=4)


def data(x: Tensor | None = None) -> atoll.FederatedDataset:
    draw = torch.Generator().manual_seed(0)
    made = {}
    for name, count in (("a", 6), ("b", 9), ("c", 4)):
        own = torch.randn(count, 4, generator=draw) if x is None else x[:count]
        made[name] = (own, torch.randint(2, (count,), generator=draw))
    return atoll.FederatedDataset.from_arrays(made)


class Changes(nn.Module):
    """A linear model that does something odd first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.head = nn.Linear(4, 2)
        self.register_buffer("m", torch.zeros(4), persistent=how != "unsaved")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "input":
            x -= 0.5
        if self.how in ("unsaved", "in place") and self.training:
            self.m.add_(x.mean(0).detach())
        if self.how == "assigned" and self.training:
            self.m = 0.9 * self.m + 0.1 * x.mean(0).detach()
        if self.how == "no gradient":
            with torch.no_grad():
                return nn.functional.linear(torch.tanh(self.head(x)), self.head.weight[:, :2])
        return self.head(x + self.m)


@pytest.mark.parametrize(
    ("how", "buffers", "text"),
    [
        ("input", "mean", "changes its input 'x' in place"),
        ("unsaved", "mean", "changes 'm' in training"),
        ("in place", "frozen", "changes 'm' in training"),
    ],
)
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_hidden_changes_are_refused_and_the_data_stay(how: str, buffers: Any, text: str, engine: str) -> None:
    torch.manual_seed(0)
    model, clients = atoll.Model(Changes(how), "cross_entropy", buffers=buffers), data()
    before = clients.train.fields["x"].clone()
    with pytest.raises(InvalidArgument, match=text):
        atoll.simulate(model, clients, algorithm=atoll.fedavg(PLAN), rounds=1, engine=engine, progress=False)
    assert torch.equal(clients.train.fields["x"], before)


def test_a_buffer_may_be_assigned_instead_of_changed_in_place() -> None:
    found = []
    for engine in (Loop(), Vectorized(), Vectorized("single")):
        torch.manual_seed(0)
        process = atoll.process(atoll.Model(Changes("assigned"), "cross_entropy"), atoll.fedavg(PLAN), engine=engine)
        state, _ = process.next(process.init(), data())
        assert bool(state.buffers.any())
        found.append(state.buffers)
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[0], found[2], atol=1e-6)


class Halted(nn.Module):
    """A body that is used without gradients: tracing alone would train it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(4, 3), nn.Linear(3, 2), scale

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.relu(self.body(x))
        return self.head(h) * self.scale


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_body_without_gradients_is_not_trained(scale: float) -> None:
    torch.manual_seed(0)
    model = atoll.Model(Halted(scale), "cross_entropy")
    process = atoll.process(model, atoll.fedavg(atoll.local_sgd(1 / scale, batch_size=4)))
    state, _ = process.next(process.init(), data())
    moved = model.layout.view(process.vector(state) - model.init())
    assert not bool(moved["body.weight"].any()) and bool(moved["head.weight"].any())


@pytest.mark.parametrize("engine", [Loop(), Vectorized()], ids=["loop", "vectorized"])
@pytest.mark.parametrize("token", [5, -1])
@pytest.mark.parametrize("form", ["rows", "none"])
def test_an_index_out_of_range_never_reads_another_client_s_table(engine: Any, token: int, form: str) -> None:
    table = nn.Embedding(5, 4) if form == "rows" else nn.Embedding(5, 4, padding_idx=0)
    clients = {n: (torch.randint(5, (6, 2)), torch.randint(2, (6,))) for n in ("a", "b", "c")}
    clients["b"][0][5, 1] = token
    model = atoll.Model(nn.Sequential(table, nn.Flatten(), nn.Linear(8, 2)), "cross_entropy")
    process = atoll.process(model, atoll.fedavg(PLAN), engine=engine)
    with pytest.raises((IndexError, InvalidArgument), match="out of range"):
        process.next(process.init(), atoll.FederatedDataset.from_arrays(clients))


def test_tied_tables_have_a_form_on_rows() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 5), nn.Linear(5, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(x).mean(1)))

    clients = {n: (torch.randint(5, (6, 2)), torch.randint(5, (6,))) for n in ("a", "b")}
    made = atoll.FederatedDataset.from_arrays(clients)
    torch.manual_seed(0)
    model, found = atoll.Model(Tied(), "cross_entropy"), []
    assert model.size == 25
    for engine in (Loop(), Vectorized()):
        process = atoll.process(model, atoll.fedavg(PLAN), engine=engine)
        state, _ = process.next(process.init(), made)
        found.append(process.vector(state))
    assert engine.describe()["reason"] == "all its layers have a form on rows"
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_hooks_run_in_training() -> None:
    calls: list[int] = []
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].register_forward_hook(lambda *_: calls.append(1))
    process = atoll.process(atoll.Model(module, "cross_entropy"), atoll.fedavg(PLAN))
    process.engine.prepare(process, clients := data())
    calls.clear()
    process.next(process.init(), clients)
    assert calls


def test_the_first_examples_may_carry_no_signal() -> None:
    x = torch.zeros(9, 4)
    x[-1] = 1.0
    model = atoll.Model(nn.Linear(4, 2, bias=False), "cross_entropy")
    process = atoll.process(model, atoll.fedavg(PLAN))
    assert process.next(process.init(), data(x))[0].round == 1


def test_a_state_without_client_memory_may_be_used_twice() -> None:
    process = atoll.process(atoll.Model(nn.Linear(4, 2), "cross_entropy"), atoll.fedavg(PLAN))
    start = process.init()
    one, two = (process.next(start, data())[0] for _ in range(2))
    assert torch.equal(process.vector(one), process.vector(two))


def test_ring_weights_are_checked_before_any_work() -> None:
    process = atoll.process(
        atoll.Model(nn.Linear(4, 2), "cross_entropy"), atoll.fedavg(PLAN), channel=secure_sum(clip=1.0, weight_cap=8)
    )
    with pytest.raises(CompositionError, match=r"cannot carry a weight of 9: raise weight_cap"):
        process.engine.prepare(process, data())


def test_threads_are_fixed_while_an_engine_works_and_put_back() -> None:
    before, seen = torch.get_num_threads(), []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return nn.functional.cross_entropy(output, target, reduction="none")

    process = atoll.process(atoll.Model(nn.Linear(4, 2), loss), atoll.fedavg(PLAN), engine=Vectorized(threads=2))
    process.next(process.init(), data())
    assert seen[-1] == 2 and torch.get_num_threads() == before
    with pytest.raises(InvalidArgument, match="threads=0"):
        Vectorized(threads=0)
