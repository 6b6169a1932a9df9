"""FedPer, FedBN and local training: what is private stays with its client, and nothing of it travels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import train
from registry import MODELS, on, stack
from torch import nn

from atoll import transforms
from atoll.algorithms import Algorithm, fedavg, fedbn, fedper, local_only
from atoll.engines import Engine
from atoll.errors import InvalidArgument
from atoll.local import local_sgd
from atoll.messages import Clear
from atoll.model import Model
from atoll.rounds import Process, Task

engines = on("loop", "rows, tile of 3", "single")
PLAN = local_sgd(0.2, steps=2, batch_size=None)
NORMS = MODELS["batch norm, mean"]


def bytes_up(algorithm: Algorithm, model: Model, **options: Any) -> tuple[float, float]:
    """Bytes of one client, up and down."""
    process = Process(model, algorithm, **options)
    _, metrics = process.next(process.init(), NORMS.data((3, 4)))
    return metrics["bytes_up"] / 2, metrics["bytes_down"] / 2


def test_only_the_shared_part_travels() -> None:
    size, head, norm = NORMS.model().size, 6 * 3 + 3, 12
    buffers = 12
    whole_up, whole_down = bytes_up(fedavg(PLAN), NORMS.model())
    assert whole_down == 8 * (size + buffers)
    up, down = bytes_up(fedper(PLAN, private=("head.*",)), NORMS.model())
    assert whole_up - up == whole_down - down == 8 * head
    up, down = bytes_up(fedbn(PLAN), NORMS.model())
    assert whole_up - up == whole_down - down == 8 * (norm + buffers)
    up, down = bytes_up(local_only(PLAN), NORMS.model())
    assert whole_up - up == whole_down - down == 8 * (size + buffers)


@pytest.mark.parametrize(
    "algorithm",
    [fedper(PLAN, private=("head.*",)), fedbn(PLAN), local_only(PLAN)],
    ids=["fedper", "fedbn", "local_only"],
)
def test_what_a_client_sends_does_not_depend_on_its_private_values_but_through_training(algorithm: Algorithm) -> None:
    """Rows on the wire have the shared length, and private parameters are in none of them."""
    process = Process(NORMS.model(), algorithm, engine="loop")
    data = NORMS.data((3, 4))
    process.next(process.init(), data)
    state = process.init()
    task: Task = process.open(state, data.clients, 2)
    assert task.message.vector.shape == (process.selection.size,)
    for cohort, remembered in process.engine.tiles(process, task, data, state.memory):
        report = process.work(task, cohort, remembered)
        assert isinstance(report.wire, Clear) and report.wire.rows.shape == (1, process.length)
        assert process.length == process.selection.size + process.averaged_buffers
    assert process.private_names.isdisjoint(process.selection.names)


@engines
@pytest.mark.parametrize("channel", ["plain", "ring"])
def test_personal_models_differ_in_their_private_part_alone(engine: Callable[[], Engine], channel: str) -> None:
    model, data = NORMS.model(), NORMS.data((3, 4, 6))
    process = Process(
        model, fedper(PLAN, private=("head.*",)), engine=engine(),
        channel=transforms.secure_sum(clip=9.0, weight_cap=9.0) if channel == "ring" else "plain",
    )  # fmt: skip
    state, path = train(process, data, 3)
    personal = process.personal(state, data, list(data.clients)).rows
    mask = model.layout.mask(process.private_names)
    assert torch.equal(personal[:, ~mask], path[-1][~mask].expand(3, -1)), "the shared part is the global one"
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(personal[i][mask], personal[j][mask])
    assert torch.equal(path[-1][mask], model.init()[mask]), "the server never learns a private value"


@engines
def test_fedper_is_alternating_descent_by_hand(engine: Callable[[], Engine]) -> None:
    """f_i(u, v_i) = mean of (u x + v_i - y)^2 with u shared and v_i private, one step a round."""
    xs, ys = {"a": [1.0, 3.0], "b": [2.0, -1.0]}, {"a": [1.0, 0.0], "b": [5.0, 2.0]}

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.u(x) + self.v(torch.ones_like(x))

    module = Line().double()
    with torch.no_grad():
        module.u.weight.fill_(0.5)
        module.v.weight.fill_(-0.25)
    from atoll.data import FederatedDataset

    column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None]  # noqa: E731
    data = FederatedDataset.from_arrays({c: (column(xs[c]), column(ys[c])) for c in "ab"})
    process = Process(
        Model(module, "mse"), fedper(local_sgd(0.05, steps=1, batch_size=None), private=("v.*",)), engine=engine()
    )
    state, path = train(process, data, 6)
    u, v = 0.5, {"a": -0.25, "b": -0.25}
    for t in range(6):
        moved = 0.0
        for c in "ab":
            errors = [u * x + v[c] - y for x, y in zip(xs[c], ys[c], strict=True)]
            moved -= 0.05 * sum(e * x for e, x in zip(errors, xs[c], strict=True)) / 2
            v[c] -= 0.05 * sum(errors)
        u += moved
        assert float(path[t][0]) == pytest.approx(u, abs=1e-12)
    rows = process.personal(state, data, ["b", "a"]).rows
    assert rows[:, 1].tolist() == pytest.approx([v["b"], v["a"]], abs=1e-12)


@engines
def test_fedbn_keeps_statistics_with_the_client(engine: Callable[[], Engine]) -> None:
    model, data = NORMS.model(), NORMS.data((3, 4, 6))
    process = Process(model, fedbn(PLAN), engine=engine())
    state, _ = train(process, data, 2, [["c0", "c1"], ["c0"]])
    found = process.personal(state, data, list(data.clients))
    assert found.buffers is not None
    assert torch.equal(state.buffers, model.init_buffers()) and torch.equal(found.buffers[2], model.init_buffers())
    assert not torch.allclose(found.buffers[0], found.buffers[1])
    names = {n for n in model.layout.names if n.startswith("norm.")}
    assert process.private_names == names


def test_a_first_visit_starts_from_the_initial_private_values() -> None:
    model, data = NORMS.model(), NORMS.data((3, 4))
    start = model.init(9)
    process = Process(model, fedper(PLAN, private=("head.*",)))
    state = process.init(initial=start)
    rows = process.personal(state, data, ["c1"]).rows
    assert torch.equal(rows[0], start) and torch.equal(process.vector(state), start)


@pytest.mark.parametrize(
    ("private", "said"),
    [
        (("neck.*",), r"private='neck\.\*'.*matches parameters of the model: body\.weight"),
        (("head.*", "neck"), "private='neck'"),
        (("*",), r"leave something to share.*local_only"),
        (("body*", "norm*", "head*"), "leave something to share"),
    ],
)
def test_patterns_that_match_nothing_or_everything(private: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Process(NORMS.model(), fedper(PLAN, private=private))


@pytest.mark.parametrize("private", ["head.*", (), []])
def test_patterns_must_be_a_sequence(private: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"private=.*\(\"head\.\*\",\)"):
        fedper(PLAN, private=private)


def test_fedbn_needs_normalisation_layers() -> None:
    with pytest.raises(InvalidArgument, match="use fedavg"):
        Process(MODELS["perceptron"].model(), fedbn(PLAN))
    plain = Model(stack(norm=nn.LayerNorm(4), head=nn.Linear(4, 3)), "cross_entropy")
    assert Process(plain, fedbn(PLAN)).private_names == {"norm.weight", "norm.bias"}
