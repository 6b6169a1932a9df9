"""What methods cost: seconds of a round of each, in rounds of federated averaging on the same clients.

A method's work is told in gradients of its clients' examples: one for each where it trains one model, two where it
trains a personal model beside the shared one. Everything else a method does (corrections, terms of the loss, memory of
clients that is read and written) is overhead, and bounded here.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from reporting import Findings, Table, finish, interval, parser

import atoll
from atoll.algorithms import Algorithm
from atoll.bench import networks, workloads
from atoll.local import Plan

WORKLOADS = ("W1", "W3")
WARMUP = 3
"""Rounds that are not counted: the first of a method choose how its model is trained."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method as it is timed.

    Attributes:
        build: of the local plan.
        work: gradients of each example in a pass.
        allowed: rounds of federated averaging that a round may take.
    """

    build: Callable[[Plan], Algorithm]
    work: int
    allowed: float


METHODS: Mapping[str, Method] = {
    "fedprox": Method(lambda plan: atoll.fedprox(plan, mu=0.1), 1, 1.3),
    "fednova": Method(atoll.fednova, 1, 1.3),
    "scaffold": Method(atoll.scaffold, 1, 1.3),
    "feddyn": Method(lambda plan: atoll.feddyn(plan, alpha=0.1), 1, 1.3),
    "fedavgm": Method(lambda plan: atoll.fedavgm(plan, momentum=0.9), 1, 1.3),
    "ditto": Method(lambda plan: atoll.ditto(plan, lam=0.1), 2, 2.3),
}
"""About 2 is allowed to ditto: 2.3."""


def rounds(load: workloads.Workload, turns: int) -> dict[str, list[float]]:
    """Processor seconds of rounds of every method, one method after the other in every turn, after a warm-up."""
    packed = workloads.examples(load)
    fields = {"x": torch.from_numpy(packed.x), "y": torch.from_numpy(packed.y)}
    data = atoll.FederatedDataset.from_packed(fields, torch.from_numpy(packed.offsets))
    plan = atoll.local_sgd(lr=workloads.LR, epochs=1, batch_size=load.batch)
    contestants = {"fedavg": atoll.fedavg(plan)} | {name: method.build(plan) for name, method in METHODS.items()}
    runs = {
        name: atoll.process(
            atoll.Model(networks.network(load, workloads.initial(load)), "cross_entropy"), algorithm,
            engine="vectorized", workers=1,
        )
        for name, algorithm in contestants.items()
    }  # fmt: skip
    states = {name: run.init(0) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(WARMUP + turns):
        names = [data.clients[i] for i in workloads.cohort(load, number)]
        for name, run in runs.items():
            began = time.process_time()
            states[name], _ = run.next(states[name], data, names)
            if number >= WARMUP:
                taken[name].append(time.process_time() - began)
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    reader = parser(__doc__ or "")
    reader.add_argument("--turns", type=int, default=20, help="rounds of each method that are counted")
    options = reader.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, numbers, claims = list[list[str]](), dict[str, dict[str, list[float]]](), list[bool]()
    try:
        for name in WORKLOADS:
            load = workloads.WORKLOADS[name]
            taken = rounds(workloads.smaller(load) if options.quick else load, 2 if options.quick else options.turns)
            numbers[name] = taken
            plain = np.asarray(taken["fedavg"])
            rows.append([name, "fedavg", "1", f"{1000 * statistics.median(taken['fedavg']):.1f}", "1", "-", "-"])
            for method, told in METHODS.items():
                times = (np.asarray(taken[method]) / plain).tolist()
                low, high = interval(times)
                median = statistics.median(times)
                claims.append(median <= told.allowed)
                rows.append(
                    [
                        name, method, str(told.work), f"{1000 * statistics.median(taken[method]):.1f}",
                        f"{median:.2f} [{low:.2f}, {high:.2f}]", f"{told.allowed:g}",
                        "-" if options.quick else "met" if claims[-1] else "**not met**",
                    ]
                )  # fmt: skip
            print(f"{name} done", file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(threads)
    found = Findings(
        title="What methods cost",
        setting=[
            "Rounds in the vectorized engine, one process, one thread, one local epoch of plain sgd: "
            + "; ".join(str(workloads.WORKLOADS[name]) for name in WORKLOADS)
            + ". scaffold is option II.",
            "Work: gradients of each example in a pass over a client's examples. Methods alternate round by round in "
            f"one process; medians of {options.turns} turns in processor time, and of ratios of neighbouring rounds, "
            f"with 95 % bootstrap intervals. {WARMUP} rounds before are not counted.",
        ],
        tables=[
            Table(
                "A round",
                ["workload", "method", "work", "milliseconds", "times fedavg", "allowed", "verdict"],
                rows,
            )
        ],
        remarks=["The machine's load is told below: milliseconds depend on it, ratios less."],
        passed=all(claims),
        numbers={"seconds": numbers},
    )
    return finish("method_time", found, quick=options.quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
