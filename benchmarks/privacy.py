"""What privacy costs: accuracy at epsilon 1, 3 and 8, and time.

Client-level privacy on handwritten digits over simulated clients, example-level privacy on the four hospitals of the
heart-disease data, the time that clipping and noise add to a round, and that of noise for 50 million numbers.

    python benchmarks/privacy.py
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from reporting import Findings, Table, finish, parser
from torch import nn

import atoll
from atoll import privacy, sampling
from atoll.rounds import Process
from atoll.secret import Source
from atoll.transforms import clip_norm, gaussian_noise

EPSILONS = (1.0, 3.0, 8.0, None)
EXPECTED = atoll.aggregators.mean(weights="uniform", denominator="expected")
SECONDS = 2.0
"""Noise for 50 million numbers takes no longer than this."""
SHARE = 1.2
"""A round with clipping and noise takes no longer than this share of one without."""


def digits(clients: int, quick: bool, seed: int) -> tuple[atoll.FederatedDataset, int]:
    """Handwritten digits dealt out to clients, with a test set that is no client's, and the numbers of an image."""
    if quick:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(40 * clients, 64, generator=draw)
        y = x[:, :10].argmax(dim=1)
        parts = {f"c{i}": (x[40 * i : 40 * i + 40], y[40 * i : 40 * i + 40]) for i in range(clients)}
        return atoll.FederatedDataset.from_arrays(parts, holdout=(x, y)), 64
    return atoll.datasets.mnist(clients=clients, seed=seed, flat=True), 784


def clients_at(epsilon: float | None, seed: int, quick: bool) -> float:
    """Accuracy of federated averaging under client-level privacy."""
    data, size = digits(20 if quick else 1000, quick, seed)
    model = atoll.Model(nn.Linear(size, 10), "cross_entropy", metrics=("accuracy",))
    counted = {"delta": 1e-2, "accountant": "rdp"} if quick else {"delta": 1e-4}
    noise = () if epsilon is None else (gaussian_noise(epsilon=epsilon, **counted),)
    result = atoll.simulate(
        model, data, algorithm=atoll.fedavg(atoll.local_sgd(0.1, epochs=1, batch_size=20)), rounds=2 if quick else 60,
        cohort=sampling.poisson(0.1), transforms=(clip_norm(0.5), *noise), aggregator=EXPECTED, seed=seed,
        initial=torch.zeros(model.size), evaluate_every=1000, progress=False,
    )  # fmt: skip
    return float(result.history[-1].holdout["accuracy"])


def patients_at(epsilon: float | None, seed: int, quick: bool) -> float:
    """Mean accuracy over hospitals' test patients under example-level privacy."""
    data = atoll.datasets.heart_disease(seed=seed)
    model = atoll.Model(
        nn.Linear(data.train.fields["x"].shape[1], 1), "binary_cross_entropy", metrics=("accuracy",)
    )  # fmt: skip
    name = "rdp" if quick else "pld"
    told = None if epsilon is None else privacy.example_level(clip=1.0, epsilon=epsilon, delta=1e-3, accountant=name)
    plan = atoll.local_sgd(0.3, steps=2 if quick else 5, batch_size=32, privacy=told)
    result = atoll.simulate(
        model, data, algorithm=atoll.fedavg(plan), rounds=2 if quick else 15, seed=seed, evaluate_every=1000,
        initial=torch.zeros(model.size), progress=False,
    )  # fmt: skip
    return float(result.history[-1].test["accuracy"])


def ratio(quick: bool) -> tuple[float, float, float]:
    """Seconds of a round without and with clipping and noise, and the median of the ratios of neighbouring rounds.

    The round is W2's: an MLP 784-200-10, 50 of 1,000 clients with 60 examples, batches of 20.
    """
    clients, cohort, size = (20, 5, 64) if quick else (1000, 50, 784)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60 * clients, size, generator=draw), torch.randint(0, 10, (60 * clients,), generator=draw)
    data = atoll.FederatedDataset.from_arrays(
        {f"c{i}": (x[60 * i : 60 * i + 60], y[60 * i : 60 * i + 60]) for i in range(clients)}
    )
    model = atoll.Model(nn.Sequential(nn.Linear(size, 200), nn.ReLU(), nn.Linear(200, 10)), "cross_entropy")
    algorithm = atoll.fedavg(atoll.local_sgd(0.1, epochs=1, batch_size=20))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    runs = {
        private: Process(
            model, algorithm, aggregator=EXPECTED, workers=1,
            transforms=(clip_norm(0.5), gaussian_noise(1.0)) if private else (),
        )
        for private in (False, True)
    }  # fmt: skip
    states = {private: run.init() for private, run in runs.items()}
    for number in range(3 if quick else 23):
        names = sampling.fixed(cohort).cohort(0, number, data.clients)
        for private, run in runs.items():
            began = time.perf_counter()
            states[private], _ = run.next(states[private], data, names, expected=float(cohort))
            if number >= (1 if quick else 3):
                seconds[private].append(time.perf_counter() - began)
    pairs = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    return statistics.median(seconds[False]), statistics.median(seconds[True]), statistics.median(pairs)


def fifty_million(quick: bool) -> float:
    """Seconds to add noise to 50 million numbers."""
    values = torch.zeros(10**5 if quick else 50 * 10**6, dtype=torch.float64)
    source = Source()
    source.add_normal(values[:1000], 1.0)  # the table is made once
    began = time.perf_counter()
    source.add_normal(values, 1.0)
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write it down."""
    options = parser(__doc__.splitlines()[0], seeds=(0,)).parse_args(arguments)
    quick, seeds = bool(options.quick), list(options.seeds)
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {"seeds": seeds}
    rows: list[list[str]] = []
    for epsilon in EPSILONS[-2:] if quick else EPSILONS:
        row = ["none" if epsilon is None else f"{epsilon:g}"]
        for name, run in (("clients", clients_at), ("patients", patients_at)):
            found = [run(epsilon, seed, quick) for seed in seeds]
            numbers[f"{name} at {row[0]}"] = found
            row.append(" ".join(f"{value:.3f}" for value in found))
        rows.append(row)
    plain, private, share = ratio(quick)
    noise = fifty_million(quick)
    numbers |= {"round": plain, "round with noise": private, "ratio": share, "noise for 50 million": noise}
    found = Findings(
        title="What privacy costs",
        setting=[
            "Client-level: MNIST dealt out to 1,000 clients of 60 images, Poisson cohorts of a tenth, 60 rounds of one "
            "local epoch (batches of 20, learning rate 0.1), a linear model of 7,850 numbers that starts at nought, "
            "clip norm 0.5, delta 1e-4, noise calibrated for epsilon; accuracy on the 10,000 test images, which are no "
            "client's. The row without noise clips as well.",
            "Example-level: the four hospitals of the heart-disease data, logistic regression, 15 rounds of 5 local "
            "steps on Poisson batches of 32 expected patients (learning rate 0.3, clip norm 1), delta 1e-3; accuracy "
            "on the hospitals' test patients. No setting was tuned for any row.",
            f"Seeds {', '.join(map(str, seeds))}: of data and cohorts; private noise, and private cohorts, have none.",
        ],
        tables=[
            Table("Accuracy", ["epsilon", "1,000 clients, MNIST", "patients, heart disease"], rows),
            Table(
                "Time",
                ["what", "measured", "bound"],
                [
                    ["W2's round with clipping and noise / without, paired", f"{share:.2f}", f"{SHARE:g}"],
                    ["noise for 50 million numbers, one core", f"{noise:.2f} s", f"{SECONDS:g} s"],
                ],
            ),
        ],
        remarks=[
            "Four hospitals cannot have client-level privacy: a noise that hides one of four hides the others too, and "
            "Poisson sampling has nobody to hide among. Example-level privacy protects their patients instead.",
            "The ratio is the median over pairs of rounds that follow each other in one process. The machine's load is "
            "told below: seconds depend on it, ratios less.",
        ],
        passed=share <= SHARE and noise <= SECONDS,
        numbers=numbers,
    )
    return finish("privacy", found, quick=quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
