"""What a round costs as the cohort grows, and as the population grows: through Atoll's public API.

W1's model. With the population fixed, the time of a round should grow in proportion to the cohort; with the cohort
fixed, it should not grow with the population at all.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCH = HERE.parents[1] / "src" / "atoll" / "bench"
sys.path[:0] = [str(HERE / "contestants"), str(BENCH), str(HERE.parent)]

import numpy as np  # noqa: E402 - the path above comes first
import torch  # noqa: E402
import workloads  # noqa: E402
from modules import module, tensors  # noqa: E402
from reporting import RESULTS, Findings, Table, finish, interval, parser, pyplot  # noqa: E402

import atoll  # noqa: E402

W1 = workloads.WORKLOADS["W1"]
EXAMPLES = 10
POPULATION, COHORT = 20_000, 200
COHORTS = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
FROM = 200
"""The cohort from which on time should be in proportion: below, what a round costs by itself is seen."""
POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
LINEAR = (0.85, 1.15)
"""Allowed exponents of the time in the cohort: 1 is proportional."""
FLAT = 1.15
"""Allowed time with the largest population, as a multiple of the time with the smallest."""

Clock = Callable[[], float]


def clients(population: int) -> atoll.FederatedDataset:
    """W1-shaped clients; in a large population the same examples come again, which costs a round the same."""
    made = workloads.examples(replace(W1, clients=min(population, 10_000), examples=EXAMPLES))
    x, y = tensors(made)
    copies = -(-population // 10_000)
    if copies > 1:
        x, y = x.repeat(copies, 1), y.repeat(copies)
    offsets = np.arange(population + 1, dtype=np.int64) * EXAMPLES
    return atoll.FederatedDataset.from_packed({"x": x, "y": y}, offsets)


def contestant(data: atoll.FederatedDataset, cohort: int, rounds: int) -> Clock:
    """A function that plays some more rounds and says how many seconds each took in the mean."""
    plan = atoll.local_sgd(lr=workloads.LR, epochs=1, batch_size=W1.batch)
    process = atoll.process(atoll.Model(module(W1), loss="cross_entropy"), atoll.fedavg(plan))
    state = process.init(0)
    names, draw = data.clients, np.random.default_rng((11, cohort, len(data.clients)))

    def play() -> float:
        nonlocal state
        cohorts = [np.sort(draw.choice(len(names), cohort, replace=False)).tolist() for _ in range(rounds)]
        chosen = [[names[i] for i in places] for places in cohorts]
        began = time.perf_counter()
        for clients_ in chosen:
            state, _ = process.next(state, data, clients_)
        return (time.perf_counter() - began) / rounds

    return play


def turns(players: Sequence[Clock], count: int) -> list[list[float]]:
    """Seconds of each player's rounds, in turns, each time in another order; a first round of each is left out."""
    for play in players:
        play()
    taken: list[list[float]] = [[] for _ in players]
    for turn in range(count):
        for i in range(len(players)):
            place = (i + turn) % len(players)
            taken[place].append(players[place]())
    return taken


def exponent(sizes: Sequence[int], taken: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The slope of log time over log size through the turns' times, with its 95 % interval over turns."""
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    slopes = [float(np.polyfit(logs, np.log(turn), 1)[0]) for turn in np.asarray(taken).T]
    return float(np.median(slopes)), *interval(slopes)


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    reader.add_argument("--turns", type=int, default=9, help="how often every size comes up")
    options = reader.parse_args(arguments)
    quick = options.quick
    count = 2 if quick else options.turns
    population, cohort = (200, 10) if quick else (POPULATION, COHORT)
    cohorts, populations = ((10, 20, 40), (200, 400)) if quick else (COHORTS, POPULATIONS)
    torch.manual_seed(0)
    data = clients(population)
    by_cohort = turns([contestant(data, size, max(1, 1_000 // size)) for size in cohorts], count)
    del data
    worlds = [clients(size) for size in populations]
    by_population = turns([contestant(world, cohort, 2 if quick else 10) for world in worlds], count)

    first = 0 if quick else cohorts.index(FROM)
    slope = exponent(cohorts[first:], by_cohort[first:])
    ratios = (np.asarray(by_population[-1]) / np.asarray(by_population[0])).tolist()
    growth = (float(np.median(ratios)), *interval(ratios))
    linear, flat = LINEAR[0] <= slope[0] <= LINEAR[1], growth[0] <= FLAT

    def rows(sizes: Sequence[int], taken: Sequence[Sequence[float]], per: Sequence[int]) -> list[list[str]]:
        return [
            [f"{size:,}", f"{1e3 * float(np.median(t)):.1f}", f"{1e6 * float(np.median(t)) / clients_:.0f}"]
            for size, t, clients_ in zip(sizes, taken, per, strict=True)
        ]

    def draw(path: Path) -> None:
        plt = pyplot()
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=False)
        panels: list[tuple[Any, str, Sequence[int], Sequence[Sequence[float]]]] = [
            (axes[0], f"clients in a round, of {population:,}", cohorts, by_cohort),
            (axes[1], f"clients there are, {cohort:,} in a round", populations, by_population),
        ]
        for axis, label, sizes, taken in panels:
            middle = [1e3 * float(np.median(t)) for t in taken]
            spread = [interval(t) for t in taken]
            axis.errorbar(
                sizes,
                middle,
                yerr=[
                    [m - 1e3 * low for m, (low, _) in zip(middle, spread, strict=True)],
                    [1e3 * high - m for m, (_, high) in zip(middle, spread, strict=True)],
                ],
                marker="o",
                color="#0b7285",
                capsize=3,
                label="measured",
            )
            expected = [middle[-1] * s / sizes[-1] for s in sizes] if axis is axes[0] else [middle[0]] * len(sizes)
            axis.plot(sizes, expected, "--", color="#adb5bd", label="in proportion" if axis is axes[0] else "constant")
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds per round")
            if axis is axes[1]:
                axis.set_ylim(min(middle) / 4, max(middle) * 4)
            axis.legend(frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    columns = ["clients", "milliseconds", "microseconds for each client trained"]
    findings = Findings(
        title="Cost of a round by cohort and population",
        setting=[
            f"W1's model ({W1.what}), {EXAMPLES} examples a client, batch {W1.batch}, plain federated averaging "
            "through `atoll.process` with its own choice of engine. In large populations the same examples come again, "
            f"which costs a round the same. Medians of {count} turns of every size, with 95 % bootstrap intervals.",
        ],
        tables=[
            Table(f"By cohort, of {population:,} clients", columns, rows(cohorts, by_cohort, cohorts)),
            Table(
                f"By population, {cohort:,} in a round",
                columns,
                rows(populations, by_population, [cohort] * len(populations)),
            ),
        ],
        remarks=[
            f"From {cohorts[first]:,} clients on, the time of a round grows as the cohort to the power of "
            + "{:.2f} [{:.2f}, {:.2f}] ".format(*slope)
            + f"({LINEAR[0]:g} to {LINEAR[1]:g} is held to: {'met' if linear else '**not met**'}).",
            f"With {populations[-1]:,} clients a round takes "
            + "{:.2f} [{:.2f}, {:.2f}] ".format(*growth)
            + f"times as long as with {populations[0]:,} (at most {FLAT:g}: {'met' if flat else '**not met**'}).",
        ],
        passed=linear and flat,
        numbers={
            "cohort": [{"clients": s, "seconds": t} for s, t in zip(cohorts, by_cohort, strict=True)],
            "population": [{"clients": s, "seconds": t} for s, t in zip(populations, by_population, strict=True)],
            "exponent": slope,
            "growth": growth,
        },
        figures={"chart": draw},
    )
    out = options.out or (None if quick else RESULTS / "scaling")
    return finish("speed/scaling", findings, quick=quick, out=out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
