"""A million clients, populations that are drawn when they are asked for, and a model of a hundred million parameters.

Each in a process of its own, one worker. The same million clients are trained packed in memory and mapped from a
directory, ten thousand in a round, for many short rounds; drawn from a generator and from Parquet, a thousand in a
round. Examples are a function of a client's number, so that runs with equal cohorts must end with the same bits. The
large model's memory is counted in vectors of its parameters.
"""

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reporting import Findings, Table, finish, interval, parser
from torch import Tensor, nn

import atoll

EXAMPLES, FEATURES, HIDDEN, CLASSES = 3, 10, 16, 2
CHUNK = 10_000
"""Clients whose examples are made at once."""
ROW_GROUP = 30_000
"""Rows of a row group of the Parquet file: ten thousand clients."""
LARGE_CLIENTS, LARGE_EXAMPLES, LARGE_BATCH = 4, 4, 2

STEADY = 1.15
"""Allowed processor time of a round in the last third of many, as a multiple of the first third's."""
GROWTH = 24.0
"""MiB that anonymous memory may grow by in the last third of many rounds: a million clients' keys are kept once they
have been hashed, some 150 bytes each, and a tenth of the clients in those rounds come for the first time."""
VECTORS = 4.5
"""Allowed peak memory of the large model above its data and the module it was given, in vectors of its parameters: the
parameters, a partial sum, and the sum in double precision, which is two; its activations, and what clients saw."""

POPULATIONS: Mapping[str, str] = {
    "memory": "packed in memory",
    "disk": "mapped from a directory",
    "source": "drawn from a generator",
    "parquet": "drawn from Parquet",
}
PAIRS = (("memory", "disk"), ("source", "parquet"))
"""Populations that are trained by the same cohorts."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        clients: the population.
        cohort: clients in a round of a packed population.
        rounds: how many such rounds.
        drawn: clients in a round of a population that is drawn.
        draws: how many such rounds.
        width: of the large model, which has twice as many hidden units.
    """

    clients: int
    cohort: int
    rounds: int
    drawn: int
    draws: int
    width: int


FULL = Scale(1_000_000, 10_000, 300, 1_000, 20, 5_000)
QUICK = Scale(2_000, 200, 6, 50, 3, 60)


def examples(first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Examples x [n, FEATURES] and labels y [n] of `count` clients from client `first` on.

    A hash (splitmix64) of each number's place makes it, so that a client's examples do not depend on how many clients
    are made at once.
    """
    numbers = EXAMPLES * FEATURES
    z = np.arange(first * numbers, (first + count) * numbers, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = ((z >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)).reshape(-1, FEATURES)
    return x, (x[:, 0] > x[:, 1]).astype(np.int64)


def packed(clients: int) -> atoll.FederatedDataset:
    """All clients' examples in memory, made chunk by chunk."""
    x, y = torch.empty(clients * EXAMPLES, FEATURES), torch.empty(clients * EXAMPLES, dtype=torch.int64)
    for first in range(0, clients, CHUNK):
        count = min(CHUNK, clients - first)
        place = slice(first * EXAMPLES, (first + count) * EXAMPLES)
        x[place], y[place] = map(torch.from_numpy, examples(first, count))
    return atoll.FederatedDataset.from_packed({"x": x, "y": y}, torch.arange(clients + 1) * EXAMPLES)


def write_parquet(clients: int, path: Path) -> None:
    """The population as one file, a client's rows side by side."""
    import pyarrow
    from pyarrow import parquet

    names = [f"f{i}" for i in range(FEATURES)]
    kinds = {"client": pyarrow.int64(), **dict.fromkeys(names, pyarrow.float32()), "label": pyarrow.int64()}
    with parquet.ParquetWriter(path, pyarrow.schema(kinds.items())) as writer:
        for first in range(0, clients, CHUNK):
            count = min(CHUNK, clients - first)
            x, y = examples(first, count)
            owner = np.repeat(np.arange(first, first + count), EXAMPLES)
            columns = {"client": owner, **dict(zip(names, x.T, strict=True)), "label": y}
            writer.write_table(pyarrow.table(columns), row_group_size=ROW_GROUP)


def load(client: str) -> tuple[Tensor, Tensor]:
    """One client's examples, as a generator of populations would make them."""
    x, y = examples(int(client), 1)
    return torch.from_numpy(x), torch.from_numpy(y)


def population(kind: str, clients: int, folder: Path) -> Any:
    """A population of a kind of `POPULATIONS`; disk and Parquet have been written to the folder."""
    if kind == "memory":
        return packed(clients)
    if kind == "disk":
        return atoll.FederatedDataset.open(folder / "clients")
    if kind == "source":
        return atoll.FederatedDataset.from_source(clients, load, sizes=np.full(clients, EXAMPLES))
    return atoll.FederatedDataset.from_parquet(folder / "clients.parquet", client="client", target="label")


def train(kind: str, scale: Scale, folder: Path) -> dict[str, Any]:
    """Train a population in this process.

    Returns:
        Seconds to have the population, until the first round ended and of every later round, and of the processor in
        these; anonymous memory after every round and peak resident memory while training, in MiB; a digest of the final
        model.
    """
    lazy = kind in ("source", "parquet")
    rounds, cohort = (scale.draws, scale.drawn) if lazy else (scale.rounds, scale.cohort)
    began = time.perf_counter()
    data = population(kind, scale.clients, folder)
    ready = time.perf_counter() - began
    network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    model = atoll.Model(network, loss="cross_entropy")
    ends, used, anonymous = list[float](), list[float](), list[float]()

    def look(record: atoll.Record) -> None:
        ends.append(time.perf_counter())
        used.append(time.process_time())
        anonymous.append(status("RssAnon"))

    forget_peak()
    began = time.perf_counter()
    result = atoll.simulate(
        model,
        data,
        algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1, epochs=1, batch_size=EXAMPLES)),
        rounds=rounds,
        cohort=cohort,
        initial=model.init(0),
        evaluate_every=0,
        workers=1,
        progress=False,
        callbacks=[look],
    )
    return {
        "ready": ready,
        "first": ends[0] - began,
        "seconds": np.diff(ends).tolist(),
        "processor": np.diff(used).tolist(),
        "anonymous": anonymous,
        "peak": status("VmHWM"),
        "digest": hashlib.sha256(result.vector.numpy().tobytes()).hexdigest(),
        "loss": result.history[-1].loss,
    }


def train_large(scale: Scale) -> dict[str, Any]:
    """Train the large model for two rounds and look at the memory of the second.

    Returns:
        Parameters, MiB of a vector of them, MiB before and after its module was made, peak MiB in round two, seconds of
        each round and which path ran.
    """
    width = scale.width
    draw = torch.Generator().manual_seed(0)
    count = LARGE_CLIENTS * LARGE_EXAMPLES
    x, y = torch.randn(count, width, generator=draw), torch.randn(count, width, generator=draw)
    offsets = torch.arange(LARGE_CLIENTS + 1) * LARGE_EXAMPLES
    data = atoll.FederatedDataset.from_packed({"x": x, "y": y}, offsets)
    begin = atoll.process  # what this imports are libraries, and counted before
    gc.collect()
    before = status("VmRSS")
    network = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
    given = status("VmRSS")
    parameters = sum(p.numel() for p in network.parameters())
    model = atoll.Model(network, loss="mse")
    del network
    plan = atoll.local_sgd(lr=1e-3, epochs=1, batch_size=LARGE_BATCH)
    process = begin(model, atoll.fedavg(plan), workers=1)
    state, seconds = process.init(0), list[float]()
    for _ in range(2):
        forget_peak()
        began = time.perf_counter()
        state, _ = process.next(state, data)
        seconds.append(time.perf_counter() - began)
    return {
        "parameters": parameters,
        "vector": 4 * parameters / 2**20,
        "before": before,
        "given": given,
        "peak": status("VmHWM"),
        "seconds": seconds,
        "engine": dict(process.engine.describe()),
    }


def run(case: str, scale: Scale, folder: Path) -> dict[str, Any]:
    """A population of `POPULATIONS`, or "large"."""
    return train_large(scale) if case == "large" else train(case, scale, folder)


def status(name: str) -> float:
    """A line of this process's memory, in MiB."""
    path = Path("/proc/self/status")
    if not path.exists():
        raise SystemExit("scale reads /proc/self/status, which only Linux has: run it there.")
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10


def forget_peak() -> None:
    """Let this process's peak memory begin at what it has now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def fresh(case: str, scale: Scale, folder: Path) -> dict[str, Any]:
    """`run` in a process of its own."""
    command = [sys.executable, __file__, "--alone", case, str(folder), *map(str, astuple(scale))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def thirds(seconds: Sequence[float]) -> float:
    """Median time of a round in the last third, as a multiple of the first third's."""
    length = max(1, len(seconds) // 3)
    return float(np.median(seconds[-length:]) / np.median(seconds[:length]))


def growth(anonymous: Sequence[float]) -> float:
    """MiB by which anonymous memory grew over the last third."""
    return anonymous[-1] - anonymous[-1 - len(anonymous) // 3]


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    reader.add_argument("--alone", nargs=8, help=argparse.SUPPRESS)
    options = reader.parse_args(arguments)
    if options.alone:
        torch.set_num_threads(1)
        case, folder, *numbers = options.alone
        print(json.dumps(run(case, Scale(*map(int, numbers)), Path(folder))))
        return 0
    scale = QUICK if options.quick else FULL
    play: Callable[[str, Scale, Path], dict[str, Any]] = run if options.quick else fresh
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        began = time.perf_counter()
        data = packed(scale.clients)
        made = time.perf_counter()
        data.save(folder / "clients")
        saved = time.perf_counter()
        del data
        write_parquet(scale.clients, folder / "clients.parquet")
        written = time.perf_counter()
        sizes = {
            "directory": sum(path.stat().st_size for path in (folder / "clients").rglob("*")) / 2**20,
            "Parquet": (folder / "clients.parquet").stat().st_size / 2**20,
        }
        for case in (*POPULATIONS, "large"):
            found[case] = play(case, scale, folder)
            print(f"{case}: {float(np.median(found[case]['seconds'])):.3f} s a round", file=sys.stderr, flush=True)
    torch.set_num_threads(before)

    checks: list[tuple[str, str, bool]] = []
    for one, other in PAIRS:
        same = found[one]["digest"] == found[other]["digest"]
        what = f"{POPULATIONS[one]} and {POPULATIONS[other]}: the same bits"
        checks.append((what, "the same" if same else "**different**", same))
    for kind in ("memory", "disk"):
        slower, grown = thirds(found[kind]["processor"]), growth(found[kind]["anonymous"])
        last = f"{POPULATIONS[kind]}: the last third of {scale.rounds:,} rounds"
        checks.append(
            (
                f"{last} takes at most {STEADY:g} times the processor time of the first",
                f"{slower:.2f}",
                slower <= STEADY,
            )
        )
        what = f"{POPULATIONS[kind]}: anonymous memory grows by at most {GROWTH:g} MiB in the last third"
        checks.append((what, f"{grown:+.1f} MiB", grown <= GROWTH))
    large = found["large"]
    above = {key: (large["peak"] - large[key]) / large["vector"] for key in ("before", "given")}
    what = f"the large model needs at most {VECTORS:g} vectors beside its module and its data"
    checks.append((what, f"{above['given']:.1f}", above["given"] <= VECTORS))

    rows: list[list[str]] = []
    for kind, shown in POPULATIONS.items():
        of = found[kind]
        cohort = scale.drawn if kind in ("source", "parquet") else scale.cohort
        middle, (low, high) = float(np.median(of["seconds"])), interval(of["seconds"])
        rows.append(
            [
                shown,
                f"{cohort:,}",
                f"{len(of['seconds']) + 1:,}",
                f"{of['ready']:.2f}",
                f"{of['first']:.2f}",
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                f"{1e6 * middle / cohort:.0f}",
                f"{of['peak']:.0f}",
                f"{of['anonymous'][-1]:.0f}",
            ]
        )
    findings = Findings(
        title="Scale",
        setting=[
            f"{scale.clients:,} clients of {EXAMPLES} examples with {FEATURES} features, network "
            f"{FEATURES}-{HIDDEN}-{CLASSES}, federated averaging by `atoll.simulate` with one local epoch, clients "
            "drawn anew for each round, no evaluation; one process, one thread, every run in a process of its own. "
            "Ready: seconds until the population is there; first: from then to the end of round one; later rounds: "
            "median and 95 % bootstrap interval. Peak: resident memory while training, interpreter and libraries "
            "included; anonymous: at the end, without mapped files.",
            f"Making the examples took {made - began:.1f} s, saving them {saved - made:.1f} s "
            f"({sizes['directory']:.0f} MiB), the Parquet file {written - saved:.1f} s ({sizes['Parquet']:.0f} MiB, "
            f"row groups of {ROW_GROUP:,} rows). Cohorts are scattered over the whole population: a round from Parquet "
            "reads nearly every row group. The remedy is to `save` such a population once.",
            f"The large model: {large['parameters']:,} parameters in two linear layers, {LARGE_CLIENTS} clients of "
            f"{LARGE_EXAMPLES} examples, batches of {LARGE_BATCH}, by `atoll.process`. Memory is the peak of round two "
            "above what the process had with its data, and with its data and the module it was given, in vectors of "
            f"the parameters ({large['vector']:,.0f} MiB). The first round tries the paths there are.",
        ],
        tables=[
            Table(
                "Populations",
                [
                    "population",
                    "cohort",
                    "rounds",
                    "ready, s",
                    "first, s",
                    "seconds per round",
                    "µs per client",
                    "peak, MiB",
                    "anonymous, MiB",
                ],
                rows,
            ),
            Table(
                "A large model",
                [
                    "parameters",
                    "MiB of a vector",
                    "peak above data",
                    "and module",
                    "first, s",
                    "second round, s",
                    "path",
                ],
                [
                    [
                        f"{large['parameters']:,}",
                        f"{large['vector']:,.1f}",
                        *(f"{value:.1f}" for value in above.values()),
                        *(f"{value:.1f}" for value in large["seconds"]),
                        str(large["engine"]["strategy"]),
                    ]
                ],
            ),
            Table(
                "What Atoll is held to",
                ["what", "found", ""],
                [
                    [what, shown, "-" if options.quick else "met" if met else "**not met**"]
                    for what, shown, met in checks
                ],
            ),
        ],
        remarks=[],
        passed=all(met for _, _, met in checks),
        numbers={"scale": list(astuple(scale)), "runs": found, "vectors": above},
    )
    return finish("scale", findings, quick=options.quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
