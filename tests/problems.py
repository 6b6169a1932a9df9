"""Problems whose answers can be worked out by hand: scalar quadratics f_i(x) = a_i / 2 (x - b_i)^2 + constant."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll.data import FederatedDataset
from atoll.engines import Engine
from atoll.model import Model
from atoll.rounds import Process, State


class Scalar(nn.Module):
    """One number, whatever the input."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.seen = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(self.x.expand(len(x)))


def parabola(output: Tensor, target: Tensor) -> Tensor:
    """a / 2 (x - b)^2 of targets (a, b): [n]."""
    return target[:, 0] / 2 * (output - target[:, 1]).square()


def scalar_model(start: float = 0.0) -> Model:
    """The model of the quadratics, in float64."""
    return Model(Scalar(start), parabola, features="seen")


def quadratics(
    a: Sequence[float], b: Sequence[float], sizes: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> FederatedDataset:
    """Client i has the mean loss a_i / 2 (x - b_i)^2 + constant, over an even number of examples around b_i."""
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, (curve, centre) in enumerate(zip(a, b, strict=True)):
        n = 2 if sizes is None else sizes[i]
        assert n % 2 == 0, "pairs around b cancel"
        spread = torch.arange(1, n // 2 + 1, dtype=torch.float64) / 4
        centres = centre + torch.cat((spread, -spread))
        target = torch.stack((torch.full((n,), curve, dtype=torch.float64), centres), dim=1)
        clients[f"c{i}" if names is None else names[i]] = (torch.zeros(n, 1, dtype=torch.float64), target)
    return FederatedDataset.from_arrays(clients, test=clients)


def killed(folder: Path, round: int, module: str, call: str) -> None:
    """Make a call of a test module, with `callbacks=(tell,)` in it, in a process that is killed behind a round."""
    script = folder / "child.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from {module} import *\n"
        "def tell(record):\n"
        f"    if record.round == {round}:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{call}\n"
    )
    assert subprocess.run([sys.executable, str(script)], check=False, env=os.environ).returncode == -9


def wide(parameters: int) -> Model:
    """A model of so many numbers, all 0, whose loss is flat."""
    module = nn.Linear(parameters, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    return Model(module, lambda output, target: 0.0 * output[:, 0])


def silent(parameters: int, clients: int) -> FederatedDataset:
    """Clients whose loss is flat: they send nothing."""
    x = torch.ones(2, parameters, dtype=torch.float64)
    return FederatedDataset.from_arrays({f"c{i}": (x, torch.zeros(2)) for i in range(clients)})


def points(a: Sequence[float], b: Sequence[float], sizes: Sequence[int]) -> FederatedDataset:
    """The same with all of a client's examples at b_i: every batch has the gradient of the whole."""
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, (curve, centre, n) in enumerate(zip(a, b, sizes, strict=True)):
        target = torch.tensor([[curve, centre]], dtype=torch.float64).expand(n, 2).clone()
        clients[f"c{i}"] = (torch.zeros(n, 1, dtype=torch.float64), target)
    return FederatedDataset.from_arrays(clients, test=clients)


def train(
    process: Process, data: FederatedDataset, rounds: int, cohorts: Sequence[Sequence[str]] | None = None, seed: int = 0
) -> tuple[State, list[Tensor]]:
    """Run rounds, with these cohorts in turn; the last state and the global model [P] after each round."""
    state, path = process.init(seed=seed), list[Tensor]()
    for i in range(rounds):
        state, _ = process.next(state, data, None if cohorts is None else cohorts[i % len(cohorts)])
        path.append(process.vector(state))
    return state, path


def scalars(
    algorithm: object, engine: Engine, data: FederatedDataset, rounds: int, *, start: float = 0.0, **options: object
) -> list[float]:
    """The iterates of an algorithm on quadratics; `cohorts=` and `aggregator=` are passed on."""
    cohorts = options.pop("cohorts", None)
    process = Process(scalar_model(start), algorithm, engine=engine, **options)  # type: ignore[arg-type]
    return [float(v) for v in train(process, data, rounds, cohorts)[1]]  # type: ignore[arg-type]
