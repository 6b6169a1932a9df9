"""MNIST with label skew by Dirichlet(0.5): a row of NIID-Bench, by fedavg, scaffold, fedprox and fednova.

Source: Li, Diao, Chen & He 2022, "Federated learning on non-IID data silos: an experimental study" (NIID-Bench): ten
parties, 50 rounds of ten local epochs, batches of 64, sgd with rate 0.01 and momentum 0.9, a small CNN. The accuracies
compared with are those of a published replication of the row.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mnist_images import images
from reporting import Findings, Table, finish, parser, processor_minutes, pyplot
from torch import nn

import atoll
from atoll.algorithms import Algorithm

PARTIES = 10
ALPHA = 0.5
ROUNDS, PUBLISHED_ROUNDS = 7, 50
EPOCHS = 10
BATCH = 64
LR, MOMENTUM = 0.01, 0.9
PLAIN_LR = 0.05
"""Of scaffold, which takes no momentum: half of LR / (1 - MOMENTUM), by which a steady gradient would move the model as
far in a step; at that rate accuracy fell again after the third round."""
MU = 0.01
PUBLISHED: Mapping[str, float] = {"fedavg": 0.9889, "scaffold": 0.9907, "fedprox": 0.9902, "fednova": 0.9803}
TOLERANCE = 0.005

METHODS: Mapping[str, Callable[[int], Algorithm]] = {
    "fedavg": lambda epochs: atoll.fedavg(plan(epochs)),
    "scaffold": lambda epochs: atoll.scaffold(atoll.local_sgd(lr=PLAIN_LR, epochs=epochs, batch_size=BATCH)),
    "fedprox": lambda epochs: atoll.fedprox(plan(epochs), mu=MU),
    "fednova": lambda epochs: atoll.fednova(plan(epochs)),
}


def plan(epochs: int) -> "atoll.local.Plan":
    """The benchmark's local training."""
    return atoll.local_sgd(lr=LR, momentum=MOMENTUM, epochs=epochs, batch_size=BATCH)


def model() -> atoll.Model:
    """The benchmark's small CNN: 5x5 convolutions of 6 and 16 channels, pooled, then 120 and 84 units."""
    layers = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip
    return atoll.Model(layers, loss="cross_entropy", metrics=("accuracy",))


def curve(
    method: str, data: atoll.FederatedDataset, seed: int, *, rounds: int, epochs: int, workers: int
) -> list[float]:
    """Accuracy on the held-out images after each round."""
    network, began = model(), time.monotonic()

    def tell(record: atoll.Record) -> None:
        took = time.monotonic() - began
        accuracy = record.holdout["accuracy"]
        print(
            f"{method}, seed {seed}: round {record.round}, accuracy {accuracy:.4f}, {took:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    result = atoll.simulate(
        network,
        data,
        algorithm=METHODS[method](epochs),
        rounds=rounds,
        initial=network.init(seed),
        seed=seed,
        workers=workers,
        progress=False,
        callbacks=[tell],
    )
    return [record.holdout["accuracy"] for record in result.history]


def verdict(found: float, published: float) -> str:
    """What the table says of an accuracy."""
    if found < published - TOLERANCE:
        return "**below**"
    return "within" if found <= published + TOLERANCE else "above"


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "", seeds=(0,))
    reader.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"rounds of each run (published: {PUBLISHED_ROUNDS})"
    )
    reader.add_argument("--workers", type=int, default=2, help="processes that share a round")
    options = reader.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, rounds, epochs = options.seeds, options.rounds, EPOCHS
    if options.quick:
        seeds, rounds, epochs = seeds[:1], 1, 1
    curves, began, sizes = dict[str, dict[int, list[float]]](), processor_minutes(), list[int]()
    for seed in seeds:
        data = images(PARTIES, partition="dirichlet", alpha=ALPHA, seed=seed, synthetic=options.quick)
        sizes += data.train.sizes.tolist()
        for method in METHODS:
            found = curve(method, data, seed, rounds=rounds, epochs=epochs, workers=options.workers)
            curves.setdefault(method, {})[seed] = found
    minutes = processor_minutes() - began
    last = {method: statistics.mean(found[-1] for found in of.values()) for method, of in curves.items()}
    verdicts = {method: verdict(last[method], PUBLISHED[method]) for method in METHODS}
    rows = [
        [
            method,
            f"{100 * PUBLISHED[method]:.2f}",
            f"{100 * last[method]:.2f}",
            f"{100 * (last[method] - PUBLISHED[method]):+.2f}",
            ", ".join(f"{100 * found[-1]:.2f}" for found in curves[method].values()),
            "-" if options.quick else verdicts[method],
        ]
        for method in METHODS
    ]

    def draw(path: Path) -> None:
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
        for i, (method, of) in enumerate(curves.items()):
            for found in of.values():
                shown = f"{method} (published: {100 * PUBLISHED[method]:.2f} after {PUBLISHED_ROUNDS} rounds)"
                axis.plot(
                    range(1, len(found) + 1), [100 * a for a in found], color=f"C{i}", marker=".", linewidth=1,
                    label=shown if found is next(iter(of.values())) else None,
                )  # fmt: skip
            axis.axhline(100 * PUBLISHED[method], color=f"C{i}", linewidth=0.8, linestyle=":")
        axis.set(xlabel="round", ylabel="test accuracy, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="lower right", fontsize=8)
        figure.savefig(path, dpi=120)
        plt.close(figure)

    cut = (
        f" {rounds} rounds were run, not {PUBLISHED_ROUNDS}, so that all methods fit half an hour on two cores; "
        f"`--rounds {PUBLISHED_ROUNDS}` runs them all."
        if rounds < PUBLISHED_ROUNDS
        else ""
    )
    return finish(
        "niid_mnist",
        Findings(
            title="NIID-Bench: MNIST by Dirichlet(0.5)",
            setting=[
                f"{'Noise of the shape of MNIST' if options.quick else 'MNIST'}, dealt out to {PARTIES} parties by "
                f"Dirichlet({ALPHA:g}) ({min(sizes)} to {max(sizes)} images each), all of them in each round, "
                f"{epochs} local epochs, batches of {BATCH}, sgd with rate {LR:g} and momentum {MOMENTUM:g}; two "
                f"convolutions of 6 and 16 channels and three linear layers, {model().size:,} parameters. fedprox: mu "
                f"{MU:g}. scaffold (option II) is defined for plain sgd and runs with rate {PLAIN_LR:g} and no "
                f"momentum, half of the {LR / (1 - MOMENTUM):g} at which a steady gradient moves the model as far. "
                "That rate was tried first: accuracy rose to 97.7 and fell to 91.2 in the fifth round, and a plain "
                "loop on a fifth of the images did likewise. The published code adds the corrections beside the "
                "momentum. Nothing else was tuned.",
                "Accuracy in percent on the official 10,000 test images after the last round, mean over seeds "
                f"{', '.join(map(str, seeds))}; published: a replication of the row with one seed.{cut} A method is "
                f"within when it is no more than {100 * TOLERANCE:g} points from the published figure; above is better "
                "than that.",
            ],
            tables=[
                Table("Accuracy", ["method", "published", "Atoll", "difference", "by seed", "verdict"], rows),
            ],
            remarks=[f"All runs together took {minutes:.0f} minutes of a processor."],
            passed="**below**" not in verdicts.values(),
            numbers={
                "rounds": rounds, "epochs": epochs, "published": PUBLISHED, "processor minutes": minutes,
                "workers": options.workers, "curves": curves,
            },
            figures={"curves": draw},
        ),
        quick=options.quick,
        out=options.out,
        arguments=arguments,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
