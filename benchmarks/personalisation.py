"""Errors per client of personalised methods against a tuned fedavg: MNIST, twenty clients that see few digits each.

Every method has the same network, rounds, epochs and grid of learning rates. Its rate is chosen by `atoll.tune` on
validation images of the clients, anew for each seed, and what the choice is worth is told on test images that had no
part in it.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from mnist_images import images
from reporting import Findings, Table, finish, parser, processor_minutes, pyplot
from torch import nn

import atoll
from atoll.algorithms import Algorithm
from atoll.experiment import Experiment
from atoll.local import Plan
from atoll.study import Interval, interval

CLIENTS = 20
ALPHA = 0.1
HIDDEN = 100
ROUNDS = 20
EPOCHS = 1
BATCH = 32
GRID = (0.03, 0.1, 0.3, 1.0)
TEST, VALIDATION = 0.2, 0.1
LAMBDA = 0.1
HEAD = ("2.*",)
FEWER = 0.25
"""By how much a method's errors have to be fewer than fedavg's."""

BASELINE, ALONE = "fedavg", "local_only"
METHODS: Mapping[str, Callable[[Plan], Algorithm]] = {
    BASELINE: atoll.fedavg,
    "ditto": lambda plan: atoll.ditto(plan, lam=LAMBDA),
    "fedrep": lambda plan: atoll.fedrep(plan, private=HEAD),
    "fedper": lambda plan: atoll.fedper(plan, private=HEAD),
    "fine_tune": atoll.fine_tune,
    ALONE: atoll.local_only,
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a method came to with a seed.

    Attributes:
        lr: the chosen learning rate.
        validation: accuracy on the validation images for every rate; nan where training diverged.
        errors: wrong answers on each client's test images, [clients].
        images: of each client's test, [clients].
        minutes: of a processor, all rates together.
    """

    lr: float
    validation: dict[float, float]
    errors: list[int]
    images: list[int]
    minutes: float

    @property
    def rates(self) -> list[float]:
        """Share of wrong answers of every client that has test images."""
        return [wrong / of for wrong, of in zip(self.errors, self.images, strict=True) if of]


def model() -> atoll.Model:
    """784-100-10 with rectifiers; the last layer is the head."""
    layers = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    return atoll.Model(layers, loss="cross_entropy", metrics=("accuracy",))


def clients(seed: int, *, synthetic: bool) -> atoll.FederatedDataset:
    """MNIST dealt out by Dirichlet, each client's images cut into training, validation and test."""
    data = images(CLIENTS, partition="dirichlet", alpha=ALPHA, seed=seed, synthetic=synthetic, flat=True, test=TEST)
    return data.split(test=0.0, validation=VALIDATION, seed=seed)


def tuned(method: str, data: atoll.FederatedDataset, seed: int, grid: Sequence[float], rounds: int) -> Run:
    """Choose the learning rate on validation images, and count what the chosen run gets wrong on test images."""
    network, began = model(), processor_minutes()
    initial = network.init(seed)

    def make(*, lr: float, seed: int) -> Experiment:
        plan = atoll.local_sgd(lr=lr, epochs=EPOCHS, batch_size=BATCH)
        return Experiment(
            model=network, data=data, algorithm=METHODS[method](plan), rounds=rounds, initial=initial, seed=seed
        )

    found = atoll.tune(make, {"lr": list(grid)}, search="grid", metric="accuracy", seeds=(seed,), workers=1)
    (result,) = found.results
    evaluated = result.evaluate(data, personal=result.personalised)
    counts = [int(n) for n in evaluated.examples]
    right = evaluated.values[:, evaluated.names.index("accuracy")].tolist()
    return Run(
        found.settings["lr"],
        {t.settings["lr"]: t.value for t in found.trials},
        [round((1 - share) * n) if n else 0 for share, n in zip(right, counts, strict=True)],
        counts,
        processor_minutes() - began,
    )


def finished(keep: Path | None, settings: str) -> dict[tuple[str, int], Run]:
    """The runs under these settings that a file keeps, by method and seed."""
    found = dict[tuple[str, int], Run]()
    for line in keep.read_text().splitlines() if keep is not None and keep.exists() else ():
        body = json.loads(line)
        if body["settings"] == settings:
            rates = {float(lr): value for lr, value in body["run"].pop("validation").items()}
            found[body["method"], body["seed"]] = Run(validation=rates, **body["run"])
    return found


def told(found: Interval, digits: int = 1, *, percent: bool = False) -> str:
    """A mean and its interval."""
    scale, unit = (100, " %") if percent else (1, "")
    mean, low, high = (f"{scale * value:.{digits}f}" for value in found)
    return f"{mean}{unit}" if math.isnan(found.low) else f"{mean}{unit} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "", seeds=(0, 1, 2))
    reader.add_argument("--keep", type=Path, help="a file that finished runs are kept in, to go on after a stop")
    options = reader.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = options.seeds[:1] if options.quick else options.seeds
    grid, rounds = (GRID[1:3], 2) if options.quick else (GRID, ROUNDS)
    settings = f"{grid}, {rounds} rounds{', noise' if options.quick else ''}"
    kept, runs = finished(options.keep, settings), {name: dict[int, Run]() for name in METHODS}
    overlap, sizes = 0.0, list[int]()
    for seed in seeds:
        data = clients(seed, synthetic=options.quick)
        assert data.test is not None
        overlap = len(data.test) / len(data.train) if len(seeds) > 1 else 0.0
        sizes += data.train.sizes.tolist()
        for method in METHODS:
            run = kept.get((method, seed)) or tuned(method, data, seed, grid, rounds)
            runs[method][seed] = run
            if options.keep is not None and (method, seed) not in kept:
                with options.keep.open("a") as file:
                    told_of = {"settings": settings, "method": method, "seed": seed, "run": asdict(run)}
                    file.write(json.dumps(told_of) + "\n")
            print(
                f"seed {seed}, {method}: rate {run.lr:g}, {sum(run.errors)} errors, {run.minutes:.1f} minutes",
                file=sys.stderr,
                flush=True,
            )
    minutes = sum(run.minutes for of in runs.values() for run in of.values())

    def over_seeds(value: Callable[[Run], float], method: str) -> Interval:
        return interval([value(runs[method][seed]) for seed in seeds], overlap=overlap)

    fewer = {
        method: interval(
            [1 - sum(of[seed].errors) / max(1, sum(runs[BASELINE][seed].errors)) for seed in seeds], overlap=overlap
        )
        for method, of in runs.items()
    }
    rows, verdicts = list[list[str]](), dict[str, bool]()
    for method, of in runs.items():
        pairs = [
            (mine, theirs)
            for seed in seeds
            for mine, theirs in zip(of[seed].errors, runs[BASELINE][seed].errors, strict=True)
        ]
        better, worse = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        verdict = ""
        if method not in (BASELINE, ALONE):
            verdicts[method] = not math.isnan(fewer[method].low) and fewer[method].low >= FEWER
            verdict = "-" if options.quick else "within" if verdicts[method] else "**outside**"
        rows.append(
            [
                method,
                ", ".join(f"{of[seed].lr:g}" for seed in seeds),
                told(over_seeds(lambda run: sum(run.errors) / CLIENTS, method)),
                told(over_seeds(lambda run: sum(run.errors) / sum(run.images), method), 2, percent=True),
                told(over_seeds(lambda run: float(np.mean(run.rates)), method), 2, percent=True),
                "" if method == BASELINE else told(fewer[method], 0, percent=True),
                "" if method == BASELINE else f"{better} / {len(pairs) - better - worse} / {worse}",
                verdict,
            ]
        )
    choices = [
        [method, *(f"{100 * (1 - float(np.mean([of[s].validation[lr] for s in seeds]))):.2f} %" for lr in grid)]
        for method, of in runs.items()
    ]
    edges = [
        f"{method} (seed {seed}: {run.lr:g})"
        for method, of in runs.items()
        for seed, run in of.items()
        if run.lr in (grid[0], grid[-1])
    ]

    def draw(path: Path) -> None:
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        for i, of in enumerate(runs.values()):
            rates = 100 * np.array([rate for seed in seeds for rate in of[seed].rates])
            places = i + np.linspace(-0.25, 0.25, len(rates))
            axis.plot(places, np.sort(rates), ".", markersize=4, label="a client with one seed" if i == 0 else None)
            axis.plot([i - 0.3, i + 0.3], [rates.mean()] * 2, "k-", linewidth=1.2, label="mean" if i == 0 else None)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, 1, 2, 5, 10, 20, 50], ["0", "1", "2", "5", "10", "20", "50"])
        axis.set_xticks(range(len(runs)), list(runs))
        axis.set(ylabel="wrong answers on the client's test, %", ylim=(-0.1, 120))
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        plt.close(figure)

    held = f"{TEST:.0%} of each client's images are its test and {VALIDATION:.0%} of the rest are for the choice"
    return finish(
        "personalisation",
        Findings(
            title="Errors per client: personalised methods against a tuned fedavg",
            setting=[
                f"{'Noise of the shape of MNIST' if options.quick else 'MNIST'}, training images only, dealt out to "
                f"{CLIENTS} clients by Dirichlet({ALPHA:g}); a seed draws the partition, the cuts, the initial weights "
                f"and the orders. Clients train on {min(sizes)} to {max(sizes)} images; {held}. "
                f"Network 784-{HIDDEN}-10; {rounds} rounds, all clients in each, {EPOCHS} local epoch, batches of "
                f"{BATCH}, plain sgd at a constant rate, updates weighted by examples.",
                f"The rate is chosen from {', '.join(f'{lr:g}' for lr in grid)} for every method and seed by the "
                "accuracy on the validation images of all clients: of each client's own model where the method has "
                "them, of the global one for fedavg. Nothing else was tuned: ditto pulls by "
                f"{LAMBDA:g} and trains its personal models as it trains the global one; fedrep and fedper keep the "
                "last layer, fedrep trains it for one epoch and then the rest for one; fine_tune trains the global "
                "model for one more epoch at the client. ditto and fedrep so take twice the passes over the data.",
                f"Seeds {', '.join(map(str, seeds))}. Means with 95 % intervals of Student's t over seeds, widened for "
                "test images that several seeds have in common (Nadeau and Bengio 2003). A method is within when the "
                f"whole interval of how many fewer errors it makes than fedavg is at or above {FEWER:.0%}; "
                "`local_only` is shown beside and not counted.",
            ],
            tables=[
                Table(
                    "Errors on the clients' test images",
                    [
                        "method", "learning rates", "errors per client", "error rate, all images",
                        "error rate, mean over clients", "fewer errors than fedavg",
                        "clients better / same / worse", "verdict",
                    ],
                    rows,
                ),
                Table(
                    "Errors on the validation images, by learning rate, mean over seeds",
                    ["method", *(f"{lr:g}" for lr in grid)],
                    choices,
                ),
            ],
            remarks=[
                "Errors per client are wrong answers on a client's test images, averaged over clients, so that large "
                "clients count for more; the mean over clients of error rates counts every client alike.",
                f"Chosen at an end of the grid: {'; '.join(edges) or 'none'}.",
                f"All runs together took {minutes:.0f} minutes of a processor.",
            ],
            passed=all(verdicts.values()),
            numbers={
                "grid": grid, "rounds": rounds, "epochs": EPOCHS, "batch": BATCH, "lambda": LAMBDA,
                "processor minutes": minutes,
                "runs": {method: {seed: asdict(run) for seed, run in of.items()} for method, of in runs.items()},
                "fewer": fewer,
            },
            figures={"clients": draw},
        ),
        quick=options.quick,
        out=options.out,
        arguments=arguments,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
