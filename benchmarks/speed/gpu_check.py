"""Whether a GPU trains as the CPU does, how far its bits repeat, and how long W6's rounds take on it.

Small models of many kinds are trained on both. In double precision the two may differ by rounding alone; in single
precision and in bfloat16 the difference is told as a part of the way that training went. Then rounds of W6 are timed,
in single precision and in bfloat16, until `--seconds` are over.

`--device cpu` runs the same against the CPU itself, to try the script out.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from reporting import Findings, Table, finish, interval, parser
from torch import Tensor, nn

import atoll
from atoll.algorithms import Algorithm
from atoll.bench.timing import played
from atoll.bench.workloads import WORKLOADS, cohort, examples, smaller

NEAR = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1}
"""Allowed difference from the CPU, as a part of the way that training went."""

SIZES = (6, 2, 7, 4, 11)


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        return self.head(self.body(x)[0][:, -1])


def _images(*norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip


MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), (6,)),
    "MLP with LayerNorm and dropout": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)),
        (6,),
    ),
    "CNN": (_images, (2, 8, 8)),
    "CNN with BatchNorm": (lambda: _images(nn.BatchNorm2d(8)), (2, 8, 8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 3)), (5,)),
    "GRU": (Last, (5, 6)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
        ),
        (5, 8),
    ),
}

PLAN = atoll.local_sgd(lr=0.05, epochs=2, batch_size=4)
ALGORITHMS: Mapping[str, Algorithm] = {
    "fedavg": atoll.fedavg(PLAN),
    "scaffold": atoll.scaffold(PLAN),
    "adam": atoll.fedavg(replace(PLAN, optimizer="adam", lr=0.01)),
}


def trained(name: str, algorithm: str, precision: str, device: str) -> Tensor:
    """What two rounds change, [P] in double precision."""
    make, shape = MODELS[name]
    draw = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    dtype = torch.float64 if precision == "float64" else torch.float32
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, n in enumerate(SIZES):
        words = torch.randint(0, 20, (n, *shape), generator=draw)
        x = words if name == "embedding" else torch.randn(n, *shape, generator=draw, dtype=torch.float64).to(dtype)
        clients[f"c{i}"] = x, torch.randint(0, 3, (n,), generator=draw)
    process = atoll.process(
        atoll.Model(make().to(dtype), loss="cross_entropy"), ALGORITHMS[algorithm], device=device, workers=1,
        precision="bfloat16" if precision == "bfloat16" else "full",
    )  # fmt: skip
    data = atoll.FederatedDataset.from_arrays(clients)
    state = process.init(0)
    begun = process.vector(state)
    for _ in range(2):
        state, _ = process.next(state, data)
    return (process.vector(state) - begun).double()


class Over(Exception):
    """The time is over."""


def timed(device: str, precision: str, seconds: float, *, quick: bool) -> list[float]:
    """Seconds of W6's rounds, the first left out where there are more."""
    load = replace(smaller(WORKLOADS["W6"]), examples=10) if quick else WORKLOADS["W6"]
    cohorts = [cohort(load, i) for i in range(2 if quick else 1 + load.rounds)]
    marks: list[float] = []
    spent: list[float] = []

    def stop() -> None:
        if device != "cpu":
            torch.cuda.synchronize(torch.device(device))
        spent.append(time.perf_counter() - marks[-1])
        if sum(spent) > seconds:
            raise Over

    with (
        suppress(Over),
        played(
            load, examples(load), cohorts, start=lambda: marks.append(time.perf_counter()), stop=stop, workers=1,
            device=device, precision=precision,
        ),
    ):  # fmt: skip
        pass
    return spent[1:] or spent


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, time, and write down."""
    read = parser(__doc__ or "")
    read.add_argument("--device", default="cuda", help="the device")
    read.add_argument("--seconds", type=float, default=60.0, help="how long W6 is timed in each precision")
    options = read.parse_args(arguments)
    device, quick = options.device, options.quick
    rows: list[list[str]] = []
    compared: list[dict[str, Any]] = []
    for name in list(MODELS)[: 2 if quick else None]:
        for algorithm in ALGORITHMS:
            for precision, near in NEAR.items():
                expected = trained(name, algorithm, precision, "cpu")
                found, again = (trained(name, algorithm, precision, device) for _ in range(2))
                far = float((found - expected).norm() / expected.norm())
                told = {
                    "model": name, "algorithm": algorithm, "precision": precision, "difference": far,
                    "near": far <= near, "same bits again": torch.equal(found, again),
                }  # fmt: skip
                compared.append(told)
                rows.append([
                    name, algorithm, precision, f"{far:.1e}", f"{near:g}", "yes" if told["near"] else "**no**",
                    "yes" if told["same bits again"] else "**no**",
                ])  # fmt: skip
    times: list[list[str]] = []
    rounds: dict[str, list[float]] = {}
    for precision in ("full", "bfloat16"):
        spent = timed(device, precision, options.seconds, quick=quick)
        low, high = interval(spent)
        times.append([precision, str(len(spent)), f"{median(spent):.3f} [{low:.3f}, {high:.3f}]"])
        rounds[precision] = spent
    passed = all(told["near"] and told["same bits again"] for told in compared)
    where = "the CPU itself, to try the script out" if device == "cpu" else torch.cuda.get_device_name(device)
    findings = Findings(
        title="Training on a GPU",
        setting=[f"Trained on {where}, and on the CPU. Two rounds of five clients of {SIZES} examples."],
        tables=[
            Table(
                "Difference from the CPU, as a part of the way that training went",
                ["model", "algorithm", "precision", "difference", "allowed", "met", "same bits again"],
                rows,
            ),
            Table("Rounds of W6", ["precision", "rounds", "seconds of a round"], times),
        ],
        remarks=[
            "All differences are allowed ones, and all bits repeat." if passed else "**Not all is as it should.**"
        ],
        passed=passed,
        numbers={"device": where, "compared": compared, "W6": rounds},
    )
    return finish("speed/gpu_check", findings, quick=quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
