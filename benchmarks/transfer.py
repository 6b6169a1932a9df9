"""A pretrained network on real images: traffic signs seen by vehicles that each know a few kinds of them.

The features of EfficientNet-Lite0, trained on ImageNet and frozen, are computed once. Heads are then solved in one
round (`fed3r`, `fedncm`), trained by federated averaging, or both, and compared with the pooled solution.
"""

import csv
import io
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from reporting import Findings, Table, finish, parser
from torch import Tensor

import atoll

CLASSES, VEHICLES = 43, 10
FILE = "gtsrb-third.zip"
TRAINING, TEST = "GTSRB/Final_Training/Images", "GTSRB/Final_Test"
NEAR = 1e-4
"""What a head solved from clients' sums may differ from the pooled one, in single precision."""


def pixels(content: bytes) -> Tensor:
    """A binary PPM of 32 x 32 pixels as [3, 32, 32] in [0, 1]."""
    head, body = content[: -3 * 32 * 32], content[-3 * 32 * 32 :]
    told = b" ".join(line for line in head.splitlines() if not line.startswith(b"#")).split()
    if told != [b"P6", b"32", b"32", b"255"]:
        raise ValueError(f"not a PPM of 32 x 32 pixels: {content[:20]!r}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1).float() / 255


def signs(path: Path, frames: int, tests: int) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Frames of each kind of sign, over its tracks, dealt to vehicles kind by kind, and frames of the test set."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(TRAINING) and n.endswith(".ppm"))
        kinds = [[n for n in names if f"/{kind:05d}/" in n] for kind in range(CLASSES)]
        chosen = [(n, kind) for kind, own in enumerate(kinds) for n in own[:: max(1, len(own) // frames)][:frames]]
        labels = {
            row["Filename"]: int(row["ClassId"])
            for row in csv.DictReader(io.StringIO(archive.read(f"{TEST}/GT-final_test.csv").decode()), delimiter=";")
        }
        held = sorted(n for n in archive.namelist() if n.startswith(f"{TEST}/Images/") and n.endswith(".ppm"))
        held = held[:: max(1, len(held) // tests)][:tests]
        parts = np.array_split(np.arange(len(chosen)), VEHICLES)
        read = lambda some: torch.stack([pixels(archive.read(n)) for n in some])  # noqa: E731
        vehicles = [(read([chosen[i][0] for i in part]), torch.tensor([chosen[i][1] for i in part])) for part in parts]
        return vehicles, (read(held), torch.tensor([labels[Path(n).name] for n in held]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    command = parser(__doc__ or "")
    command.add_argument("--size", type=int, default=64, help="pixels at which images go through the network")
    command.add_argument("--frames", type=int, default=30, help="training frames of each kind of sign")
    command.add_argument("--tests", type=int, default=1000, help="test frames")
    command.add_argument("--rounds", type=int, default=30, help="rounds of federated averaging")
    options = command.parse_args(arguments)
    if options.quick:
        options.size, options.frames, options.tests, options.rounds = 32, 2, 20, 2
    folder = os.environ.get("ATOLL_DATA")
    if folder is None or not (Path(folder) / FILE).is_file():
        command.error(f"set ATOLL_DATA to a folder with {FILE}: `atoll data traffic_signs` says where it comes from")
    vehicles, test = signs(Path(folder) / FILE, options.frames, options.tests)
    data = atoll.FederatedDataset.from_arrays({f"vehicle {i}": v for i, v in enumerate(vehicles)}, holdout=test)
    module = atoll.pretrained("efficientnet_lite0", classes=CLASSES, size=options.size)
    model = atoll.Model(module, "cross_entropy", ("accuracy",), features="backbone")
    began = time.perf_counter()
    head, cached = atoll.features(model, data)
    seconds = time.perf_counter() - began

    plan = atoll.local_sgd(lr=0.1, epochs=1, batch_size=16)
    runs = {
        "fedncm": (atoll.fedncm(), 1, None),
        "fed3r": (atoll.fed3r(ridge=100.0, scale=5.0), 1, None),
        "fedavg": (atoll.fedavg(plan), options.rounds, None),
    }
    rows: list[list[str]] = []
    numbers: dict[str, dict[str, float]] = {}
    solved: dict[str, Tensor] = {}

    def run(name: str, algorithm: "object", rounds: int, initial: Tensor | None) -> None:
        result = atoll.simulate(head, cached, algorithm=algorithm, rounds=rounds, initial=initial, progress=False)  # type: ignore[arg-type]
        last = result.history[-1]
        solved[name] = result.vector
        sent = sum(r.bytes_up + r.bytes_down for r in result.history) / VEHICLES
        numbers[name] = {"rounds": rounds, "accuracy": last.holdout["accuracy"], "bytes": sent}
        rows.append([name, str(rounds), f"{last.holdout['accuracy']:.3f}", f"{sent / 2**20:.1f}"])

    for name, (algorithm, rounds, initial) in runs.items():
        run(name, algorithm, rounds, initial)
    run("fed3r, then fedavg", atoll.fedavg(plan), options.rounds, solved["fed3r"])
    pooled = atoll.simulate(
        head, cached.pooled(), algorithm=atoll.fed3r(ridge=100.0, scale=5.0), rounds=1, progress=False
    )
    apart = float((pooled.vector - solved["fed3r"]).abs().max())
    numbers["pooled fed3r"] = {"rounds": 1, "accuracy": pooled.history[-1].holdout["accuracy"], "difference": apart}
    rows.append(["fed3r on pooled data", "1", f"{pooled.history[-1].holdout['accuracy']:.3f}", ""])
    count = len(data.train)
    findings = Findings(
        "Traffic signs under a pretrained network",
        [
            f"{VEHICLES} vehicles with {count} frames of GTSRB's training tracks ({options.frames} of each of "
            f"{CLASSES} kinds of sign, dealt out kind by kind: a vehicle knows four or five), {len(test[1])} frames of "
            f"the official test set. EfficientNet-Lite0 at {options.size} x {options.size}, frozen: "
            f"{model.frozen_bytes / 2**20:.1f} MiB that a vehicle needs once; {model.size:,} parameters of a head. "
            f"Features of all frames took {seconds:.0f} s.",
        ],
        [Table("Accuracy on the test frames", ["head", "rounds", "accuracy", "MiB per vehicle"], rows)],
        [
            f"The head that `fed3r` solves from the vehicles' sums differs from the pooled one by {apart:.1e} at most. "
            f"`fedavg` is one local epoch a round with a rate of {plan.lr:g}; rates and ridges were not tuned.",
        ],
        apart < NEAR,
        {"settings": vars(options) | {"out": None}, "seconds": seconds, "heads": numbers},
    )
    return finish("transfer", findings, quick=options.quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
