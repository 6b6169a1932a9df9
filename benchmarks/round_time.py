"""Seconds per round on two small workloads: Atoll's engines against code written by hand for nothing else.

Two models that are bound by overhead rather than by arithmetic, plain federated averaging, one local epoch, synthetic
data. The contestants alternate round by round in one process; start-up and memory are taken from fresh processes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import numpy as np  # noqa: E402 - the clock above starts before the heavy imports, as a user's run does
import torch  # noqa: E402
from reporting import Findings, Table, finish, interval, parser  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import atoll  # noqa: E402

LR = 0.1
TENTH = 0.1
AGREEMENT = 1e-4


@dataclass(frozen=True, slots=True)
class Workload:
    """A model with one hidden layer and the clients that train it.

    Attributes:
        name: in the tables.
        sizes: inputs, hidden units, classes.
        clients: the population.
        examples: of each client.
        cohort: clients in a round.
        batch: examples in a step.
        tile: clients that the batched products train at a time.
    """

    name: str
    sizes: tuple[int, int, int]
    clients: int
    examples: int
    cohort: int
    batch: int
    tile: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {'-'.join(map(str, self.sizes))}, {self.clients} clients x {self.examples} examples, "
            f"cohort {self.cohort}, batch {self.batch}"
        )


W1 = Workload("W1", (30, 64, 2), 1000, 100, 100, 10, 100)
W2 = Workload("W2", (784, 200, 10), 1000, 60, 50, 20, 5)
WORKLOADS = {"W1": W1, "W2": W2}

Round = Callable[[Tensor, Sequence[int], int], Tensor]
"""(model [P], numbers of the cohort's clients, round) -> the model after the round."""


def module(load: Workload) -> nn.Module:
    """The model, with the same values for everyone."""
    inputs, hidden, classes = load.sizes
    layers = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) * layer.in_features**-0.5)
            layer.bias.zero_()
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def examples(load: Workload) -> tuple[Tensor, Tensor]:
    """Synthetic examples x [clients, n, inputs] and labels y [clients, n]."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(load.clients, load.examples, load.sizes[0], generator=draw)
    truth = torch.randn(load.sizes[0], load.sizes[2], generator=draw)
    return x, (x @ truth).argmax(dim=2)


def atoll_rounds(load: Workload, x: Tensor, y: Tensor, engine: str, *, shuffle: bool = True) -> Round:
    """Rounds of a process on an engine."""
    offsets = torch.arange(load.clients + 1) * load.examples
    data = atoll.FederatedDataset.from_packed({"x": x.flatten(0, 1), "y": y.flatten()}, offsets)
    plan = atoll.local_sgd(lr=LR, epochs=1, batch_size=load.batch, shuffle=shuffle)
    process = atoll.process(atoll.Model(module(load), loss="cross_entropy"), atoll.fedavg(plan), engine=engine)
    state = process.init(0)
    names = data.clients

    def play(vector: Tensor, cohort: Sequence[int], number: int) -> Tensor:
        nonlocal state
        state, _ = process.next(state, data, [names[i] for i in cohort])
        return process.vector(state)

    return play


def lean_rounds(load: Workload, x: Tensor, y: Tensor, *, shuffle: bool = True) -> Round:
    """One client after the other with autograd and a step in place: what a careful person writes in a few lines."""
    network = module(load)
    weights = list(network.parameters())

    def play(vector: Tensor, cohort: Sequence[int], number: int) -> Tensor:
        total, loss_sum = torch.zeros(len(vector), dtype=torch.float64), 0.0
        draw = np.random.default_rng((7, number))
        for client in cohort:
            nn.utils.vector_to_parameters(vector.clone(), weights)
            order = torch.from_numpy(draw.permutation(load.examples)) if shuffle else torch.arange(load.examples)
            for taken in order.split(load.batch):
                loss = functional.cross_entropy(network(x[client, taken]), y[client, taken])
                with torch.no_grad():
                    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                        weight.sub_(gradient, alpha=LR)
                loss_sum += float(loss.detach())
            total += nn.utils.parameters_to_vector(weights).detach()
        assert np.isfinite(loss_sum)
        return (total / len(cohort)).to(vector.dtype)

    return play


def batched_rounds(load: Workload, x: Tensor, y: Tensor, *, shuffle: bool = True) -> Round:
    """A tile of clients at a time as batched products, the backward by hand, the step inside the product.

    It knows this model, this loss and that all clients have equally many examples; nothing else can be run with it.
    """
    inputs, hidden, classes = load.sizes
    flat_x, flat_y = x.flatten(0, 1), y.flatten()
    cuts = (hidden * inputs, hidden, classes * hidden, classes)

    def play(vector: Tensor, cohort: Sequence[int], number: int) -> Tensor:
        draw, total, loss_sum = np.random.default_rng((7, number)), torch.zeros(len(vector), dtype=torch.float64), 0.0
        for begin in range(0, len(cohort), load.tile):
            clients = torch.tensor(cohort[begin : begin + load.tile])
            rows = vector.repeat(len(clients), 1)
            w1, b1, w2, b2 = rows.split(cuts, dim=1)
            w1, w2 = w1.unflatten(1, (hidden, inputs)), w2.unflatten(1, (classes, hidden))
            order = torch.arange(load.examples).repeat(len(clients), 1)
            if shuffle:
                order = torch.from_numpy(draw.random((len(clients), load.examples)).argsort(axis=1))
            order = order + clients[:, None] * load.examples
            for taken in order.split(load.batch, dim=1):
                inside, target = flat_x[taken], flat_y[taken][..., None]
                active = torch.baddbmm(b1[:, None], inside, w1.mT).relu_()
                scores = torch.log_softmax(torch.baddbmm(b2[:, None], active, w2.mT), dim=2)
                loss_sum -= float(scores.gather(2, target).sum())
                slope = scores.exp_()
                slope.scatter_add_(2, target, torch.full_like(slope[..., :1], -1.0))
                below = torch.bmm(slope, w2).mul_(active > 0)
                step = -LR / taken.shape[1]
                w2.baddbmm_(slope.mT, active, alpha=step)
                b2.add_(slope.sum(dim=1), alpha=step)
                w1.baddbmm_(below.mT, inside, alpha=step)
                b1.add_(below.sum(dim=1), alpha=step)
            total += rows.sum(dim=0, dtype=torch.float64)
        assert np.isfinite(loss_sum)
        return (total / len(cohort)).to(vector.dtype)

    return play


CONTESTANTS: Mapping[str, Callable[..., Round]] = {
    "Atoll vectorized": lambda load, x, y, **how: atoll_rounds(load, x, y, "vectorized", **how),
    "Atoll loop": lambda load, x, y, **how: atoll_rounds(load, x, y, "loop", **how),
    "hand-written loop": lean_rounds,
    "hand-written batched": batched_rounds,
}
SHOWN = (("first", 1), ("peak", 0), ("above", 0))
FAST = ("Atoll vectorized", "hand-written batched")


def cohort_of(load: Workload, number: int) -> list[int]:
    """The clients of a round, the same for every contestant."""
    return sorted(np.random.default_rng((3, number)).choice(load.clients, load.cohort, replace=False).tolist())


def agreement(load: Workload, x: Tensor, y: Tensor) -> float:
    """The largest difference between the contestants' models after one round without shuffling."""
    start = nn.utils.parameters_to_vector(module(load).parameters()).detach()
    ends = [build(load, x, y, shuffle=False)(start, cohort_of(load, 0), 0) for build in CONTESTANTS.values()]
    return max(float((end - ends[0]).abs().max()) for end in ends)


def race(load: Workload, x: Tensor, y: Tensor, *, turns: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per round of every contestant, in turns.

    Args:
        load: the workload.
        x: examples.
        y: labels.
        turns: how often everyone comes up, each time in another order.
        repeats: rounds in a turn of a fast contestant, whose single round is shorter than a disturbance.
    """
    plays = {name: build(load, x, y) for name, build in CONTESTANTS.items()}
    start = nn.utils.parameters_to_vector(module(load).parameters()).detach()
    vectors = {name: play(start, cohort_of(load, 0), 0) for name, play in plays.items()}
    taken: dict[str, list[float]] = {name: [] for name in plays}
    names, number = list(plays), 1
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rounds = repeats if name in FAST else 1
            cohorts = [cohort_of(load, number + i) for i in range(rounds)]
            began = time.perf_counter()
            for i, cohort in enumerate(cohorts):
                vectors[name] = plays[name](vectors[name], cohort, number + i)
            taken[name].append((time.perf_counter() - began) / rounds)
        number += repeats
    return taken


def alone(load: Workload, name: str, rounds: int) -> dict[str, float]:
    """This fresh process runs one contestant: seconds to the end of round one, memory in MiB."""
    x, y = examples(load)
    vector = nn.utils.parameters_to_vector(module(load).parameters()).detach()
    held = _peak()
    play = CONTESTANTS[name](load, x, y)
    first = 0.0
    for number in range(rounds):
        vector = play(vector, cohort_of(load, number), number)
        first = first or time.perf_counter() - BEGAN
    return {"first": first, "peak": _peak(), "above": _peak() - held}


def fresh(load: Workload, name: str, threads: int, rounds: int) -> dict[str, float]:
    """`alone` in a process of its own."""
    command = [sys.executable, __file__, "--alone", load.name, name, str(threads), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would also count what the parent held when it started this process.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    reader.add_argument("--turns", type=int, default=10, help="how often every contestant comes up")
    reader.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads torch may use in an operation")
    reader.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    options = reader.parse_args(arguments)
    if options.alone:
        load, name, threads, rounds = options.alone
        torch.set_num_threads(int(threads))
        print(json.dumps(alone(WORKLOADS[load], name, int(rounds))))
        return 0
    turns, threads = (2, [1]) if options.quick else (options.turns, options.threads)
    loads = (replace(W1, clients=100, cohort=10, tile=10),) if options.quick else (W1, W2)
    rows, numbers, claims = list[list[str]](), list[dict[str, Any]](), list[bool]()
    differences: dict[str, float] = {}
    remarks = list[str]()
    before = torch.get_num_threads()
    for load in loads:
        x, y = examples(load)
        for count in threads:
            torch.set_num_threads(count)
            if load.name not in differences:
                differences[load.name] = agreement(load, x, y)
                if differences[load.name] > AGREEMENT:
                    raise SystemExit(
                        f"{load.name}: the contestants differ by {differences[load.name]:.2e} after a round"
                    )
            taken = race(load, x, y, turns=turns, repeats=1 if options.quick else 5)
            starts = {name: fresh(load, name, count, 3) for name in (FAST[:1] if options.quick else CONTESTANTS)}
            base = np.asarray(taken["Atoll vectorized"])
            for name, seconds in taken.items():
                ratios = (np.asarray(seconds) / base).tolist()
                low, high = interval(ratios)
                numbers.append(
                    {
                        "workload": load.name,
                        "threads": count,
                        "contestant": name,
                        "seconds": seconds,
                        "ratio": [statistics.median(ratios), low, high],
                        **starts.get(name, {}),
                    }
                )
                spread = interval(seconds)
                rows.append(
                    [
                        load.name,
                        str(count),
                        name,
                        f"{1e3 * statistics.median(seconds):.1f} [{1e3 * spread[0]:.1f}, {1e3 * spread[1]:.1f}]",
                        f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]",
                        *(f"{starts[name][key]:.{digits}f}" if name in starts else "-" for key, digits in SHOWN),
                    ]
                )
            ratio = np.asarray(taken["Atoll vectorized"]) / np.asarray(taken["Atoll loop"])
            low, high = interval(ratio.tolist())
            median = float(np.median(ratio))
            hand = np.asarray(taken["Atoll vectorized"]) / np.asarray(taken["hand-written batched"])
            if load == W1:
                claims.append(median <= TENTH)
            promise = ""
            if load == W1:
                promise = f" (at most {TENTH:g} is promised: {'met' if median <= TENTH else '**not met**'})"
            remarks.append(
                f"{load.name}, {count} thread(s): a round of Atoll's vectorized engine takes {median:.3f} "
                f"[{low:.3f}, {high:.3f}] of the loop engine's{promise} and {float(np.median(hand)):.2f} times that of "
                "the batched products written by hand."
            )
            print(remarks[-1], file=sys.stderr)
    torch.set_num_threads(before)
    found = Findings(
        title="Seconds per round",
        setting=[
            "Plain federated averaging, learning rate 0.1, one local epoch, cross-entropy, weights by examples, "
            "synthetic data, the same initial weights and cohorts for everyone. " + ". ".join(map(str, loads)) + ".",
            "`hand-written loop`: one client after the other, autograd, no optimiser objects. `hand-written batched`: "
            "clients as rows, batched products, the backward written out, the step inside the product; "
            f"{W1.tile} rows at a time for W1, {W2.tile} for W2. Both know the model and that all clients are equally "
            "large; they check nothing, count nothing and keep no history.",
            f"Medians of {turns} turns that alternate in one process, with 95 % bootstrap intervals; ratios are of "
            "neighbouring turns. First: seconds from the start of a fresh process to the end of its first round, "
            "imports and data included. Peak: its peak resident memory; above: how much of that came after the data "
            "were made.",
        ],
        tables=[
            Table(
                "A round",
                [
                    "workload",
                    "threads",
                    "contestant",
                    "milliseconds",
                    "times Atoll vectorized",
                    "first, s",
                    "peak, MiB",
                    "above, MiB",
                ],
                rows,
            )
        ],
        remarks=[
            *remarks,
            "After one round without shuffling all contestants hold the same model: largest differences "
            + ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
            + ".",
        ],
        passed=all(claims),
        numbers={"rounds": numbers, "largest difference": differences},
    )
    return finish("round_time", found, quick=options.quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
