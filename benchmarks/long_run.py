"""Ten thousand clients for a thousand rounds: does a long run's memory grow?

Four runs, each in a process of its own: federated averaging, which keeps nothing for clients, and SCAFFOLD, which keeps
a row for each; with a run directory (journal, checkpoints, client memory in a mapped file) and without one. Cohorts go
through the whole population again and again, so that every client has its row after the first pass; from then on memory
must stay where it is.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import Findings, Table, finish, parser, pyplot
from torch import nn

import atoll

FEATURES, HIDDEN, CLASSES, EXAMPLES = 20, 8, 2, 10
ALLOWED = 4.0
"""MiB a thousand rounds may add once every client has been visited: about two for the records of the history, and as
much again for a journal that is kept in memory."""

METHODS = {"fedavg": atoll.fedavg, "scaffold": atoll.scaffold}


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a run is.

    Attributes:
        clients: the population.
        cohort: clients in a round.
        rounds: how many.
        every: rounds between two looks at the memory.
    """

    clients: int
    cohort: int
    rounds: int
    every: int

    @property
    def settled(self) -> int:
        """The round by which every client has been visited three times.

        The first visit makes a client's row; a run directory keeps those of its last checkpoints beside the present
        ones.
        """
        return 3 * -(-self.clients // self.cohort)

    @property
    def checkpoint(self) -> int:
        """Rounds between two checkpoints; by the clock, a run this fast would hardly make any."""
        return self.rounds // 20


FULL = Scale(10_000, 50, 1000, 10)
SMALL = Scale(2_000, 50, 200, 10)
QUICK = Scale(200, 50, 40, 4)


def population(scale: Scale) -> atoll.FederatedDataset:
    """Synthetic clients of ten examples each, and a few held-out ones."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(scale.clients * EXAMPLES, FEATURES, generator=draw)
    y = (x[:, 0] > 0).long()
    return atoll.FederatedDataset.from_packed(
        {"x": x, "y": y}, torch.arange(scale.clients + 1) * EXAMPLES, holdout=(x[:200], y[:200])
    )


def run(method: str, scale: Scale, directory: Path | None) -> dict[str, Any]:
    """Run one configuration in this process and look at its memory.

    Args:
        method: a name in `METHODS`.
        scale: how large.
        directory: a run directory, or None.

    Returns:
        Rounds looked at; resident memory and its anonymous part there, in MiB; MiB of the history; seconds; accuracy.
    """
    data = population(scale)
    order = np.random.default_rng(0).permutation(scale.clients)
    names = list(data.clients)
    cohorts = [[names[i] for i in order[a : a + scale.cohort]] for a in range(0, scale.clients, scale.cohort)]
    network = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    model = atoll.Model(network, loss="cross_entropy", metrics=("accuracy",))
    looks: dict[str, list[float]] = {"round": [], "resident": [], "anonymous": []}

    def look(record: atoll.Record) -> None:
        if record.round % scale.every == 0:
            gc.collect()
            for name, value in zip(looks, (record.round, *memory()), strict=True):
                looks[name].append(value)

    result = atoll.simulate(
        model,
        data,
        algorithm=METHODS[method](atoll.local_sgd(lr=0.05, epochs=1, batch_size=5)),
        rounds=scale.rounds,
        cohort=atoll.sampling.sequence(cohorts),
        initial=model.init(0),
        evaluate_every=10,
        directory=directory,
        checkpoint_every=scale.checkpoint,
        progress=False,
        callbacks=[look],
    )
    return {
        **looks,
        "history": sum(map(held_by, result.history)) / 2**20,
        "seconds": sum(sum(record.seconds.values()) for record in result.history),
        "accuracy": result.history[-1].holdout["accuracy"],
    }


def held_by(value: Any) -> int:
    """Bytes of a record and what it holds."""
    inside: list[Any] = []
    if is_dataclass(value):
        inside = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, (tuple, list)):
        inside = list(value)
    return sys.getsizeof(value) + sum(map(held_by, inside))


def memory() -> tuple[float, float]:
    """This process's resident memory and its anonymous part (all but mapped files), in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("long_run reads /proc/self/status, which only Linux has: run it there.")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) / 2**10 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def slope(rounds: Sequence[float], values: Sequence[float], settled: int) -> tuple[float, float, float]:
    """Growth in MiB per thousand rounds after round `settled`: least squares, with a 95 % interval.

    The interval is a bootstrap of blocks of a tenth of the looks, since neighbouring looks resemble each other.
    """
    x, y = (np.asarray(v, dtype=np.float64) for v in (rounds, values))
    x, y = x[x > settled] / 1000, y[x > settled]
    line = np.polyfit(x, y, 1)
    rest, length = y - np.polyval(line, x), max(1, len(x) // 10)
    draw = np.random.default_rng(0)
    found: list[float] = []
    for _ in range(1000):
        begins = draw.integers(0, len(x) - length + 1, -(-len(x) // length))
        taken = np.concatenate([rest[b : b + length] for b in begins])[: len(x)]
        found.append(float(np.polyfit(x, np.polyval(line, x) + taken, 1)[0]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(line[0]), float(low), float(high)


def here(method: str, scale: Scale, *, directory: bool) -> dict[str, Any]:
    """`run` in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return run(method, scale, Path(folder) / "run" if directory else None)


def fresh(method: str, scale: Scale, *, directory: bool) -> dict[str, Any]:
    """`run` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = [str(n) for n in (scale.clients, scale.cohort, scale.rounds, scale.every)]
        where = str(Path(folder) / "run") if directory else ""
        command = [sys.executable, __file__, "--alone", method, where, *numbers]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    reader.add_argument("--alone", nargs=6, help=argparse.SUPPRESS)
    options = reader.parse_args(arguments)
    if options.alone:
        torch.set_num_threads(1)
        method, where, *numbers = options.alone
        print(json.dumps(run(method, Scale(*map(int, numbers)), Path(where) if where else None)))
        return 0
    scale = QUICK if options.quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, runs = list[list[str]](), dict[str, dict[str, Any]]()
    kept: list[bool] = []
    for method in METHODS:
        for directory in (False, True):
            found = (here if options.quick else fresh)(method, scale, directory=directory)
            name = f"{method}, {'with' if directory else 'without'} a directory"
            first = next(i for i, number in enumerate(found["round"]) if number > scale.settled)
            fits = {kind: slope(found["round"], found[kind], scale.settled) for kind in ("resident", "anonymous")}
            within = fits["anonymous"][1] <= ALLOWED
            kept.append(within)
            runs[name] = {**found, "slopes": fits}
            rows.append(
                [
                    name,
                    f"{found['resident'][first]:.1f}",
                    f"{found['resident'][-1]:.1f}",
                    *(f"{fit[0]:+.2f} [{fit[1]:+.2f}, {fit[2]:+.2f}]" for fit in fits.values()),
                    f"{1000 * found['history'] / scale.rounds:.2f}",
                    f"{1000 * found['seconds'] / scale.rounds:.1f}",
                    "-" if options.quick else "steady" if within else "**grows**",
                ]
            )
            print(f"{name}: done in {found['seconds']:.0f} s", file=sys.stderr)
    torch.set_num_threads(before)

    def draw(path: Path) -> None:
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        for name, found in runs.items():
            axis.plot(found["round"], found["resident"], linewidth=1, label=name)
        axis.axvline(scale.settled, color="grey", linewidth=0.8, linestyle="--", label="fitted from here on")
        axis.set(xlabel="round", ylabel="resident memory, MiB", ylim=(0, None))
        axis.legend(fontsize=8, loc="lower right")
        figure.savefig(path, dpi=120)
        plt.close(figure)

    found_out = Findings(
        title="Memory of a long run",
        setting=[
            f"{scale.clients:,} clients of {EXAMPLES} examples, {scale.cohort} in each round, {scale.rounds:,} rounds "
            f"of one epoch, network {FEATURES}-{HIDDEN}-{CLASSES}, an evaluation every ten rounds, one thread. Cohorts "
            f"go through the population in a fixed order; every client has been visited after "
            f"{-(-scale.clients // scale.cohort)} rounds, and lines are fitted from round {scale.settled} on. A run "
            f"directory has a checkpoint every {scale.checkpoint} rounds; it keeps the rows of the last two beside the "
            "present ones where they differ, in a mapped file: at most three for each client.",
            "Growth is the slope of a least-squares line, with a 95 % block bootstrap interval. Resident: all memory "
            "of the process; anonymous: without mapped files, such as the client memory of a run directory; history: "
            "what the records of the rounds hold, which a run keeps; a journal without a directory holds as much "
            "again.",
            f"A run counts as steady when its anonymous memory is not shown to grow by more than {ALLOWED:g} MiB per "
            "1,000 rounds, which is what the records take.",
        ],
        tables=[
            Table(
                "Memory, MiB",
                [
                    "run",
                    "settled",
                    "end",
                    "resident per 1,000 rounds",
                    "anonymous per 1,000 rounds",
                    "history per 1,000 rounds",
                    "ms per round",
                    "verdict",
                ],
                rows,
            )
        ],
        remarks=[],
        passed=all(kept),
        numbers={"scale": [scale.clients, scale.cohort, scale.rounds], "runs": runs},
        figures={"resident": draw},
    )
    return finish("long_run", found_out, quick=options.quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
