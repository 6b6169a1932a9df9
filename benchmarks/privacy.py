"""What privacy costs: accuracy at epsilon 1, 3 and 8, and time.

Every mechanism of client-level privacy on handwritten digits over simulated clients, example-level privacy on the four
hospitals of the heart-disease data (beside FLamby's figures too), the time that clipping and noise add to a round, that
of clipped gradients of examples, and that of noise for 50 million numbers.

    python benchmarks/privacy.py
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flamby_heart
import torch
from reporting import Findings, Table, finish, parser, pyplot
from torch import Tensor, nn

import atoll
from atoll import privacy, sampling
from atoll.engines import private
from atoll.rounds import Process
from atoll.secret import Source
from atoll.transforms import clip_norm, correlated_noise, gaussian_noise, local_noise, secure_sum, skellam

EPSILONS = (1.0, 3.0, 8.0, None)
CLIENTS, COHORT, ROUNDS, CLIP, DELTA = 1000, 100, 60, 0.5, 1e-4
NAMES = {
    "gaussian": "gaussian_noise, Poisson cohorts",
    "correlated": "correlated_noise, any cohorts ten rounds apart",
    "skellam": "skellam under secure_sum",
    "local": "local_noise",
}
"""Mechanisms of client-level privacy, from the one that trusts most to the one that trusts nobody."""
FLAMBY = (
    (None, None, "0.712 ± 0.021"),
    (1.0, 1e-3, "0.702"),
    (0.1, 1e-3, "0.629 ± 0.077"),
    (0.1, 1e-4, "0.606 ± 0.109"),
)
"""FLamby's DP-FedAvg on the heart-disease data: epsilon, delta, mean accuracy as published."""
EXPECTED = atoll.aggregators.mean(weights="uniform", denominator="expected")
SECONDS = 2.0
"""Noise for 50 million numbers takes no longer than this."""
SHARE = 1.2
"""A round with clipping and noise takes no longer than this share of one without."""
TIMES = 3.0
"""A round by examples' gradients takes no longer than so many plain ones, its noise not counted."""


def digits(clients: int, quick: bool, seed: int) -> tuple[atoll.FederatedDataset, int]:
    """Handwritten digits dealt out to clients, with a test set that is no client's, and the numbers of an image."""
    if quick:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(40 * clients, 64, generator=draw)
        y = x[:, :10].argmax(dim=1)
        parts = {f"c{i}": (x[40 * i : 40 * i + 40], y[40 * i : 40 * i + 40]) for i in range(clients)}
        return atoll.FederatedDataset.from_arrays(parts, holdout=(x, y)), 64
    return atoll.datasets.mnist(clients=clients, seed=seed, flat=True), 784


def mechanism(name: str, epsilon: float | None, quick: bool) -> dict[str, Any]:
    """Cohorts, stages and channel of a mechanism; without epsilon it clips and adds nothing."""
    cohort = 10 if quick else COHORT
    noise: dict[str, Any] = {"epsilon": epsilon, "delta": 1e-2 if quick else DELTA}
    fixed = sampling.min_separation(cohort, 2 if quick else 10)
    if epsilon is None:
        return {"cohort": sampling.poisson(0.1), "transforms": (clip_norm(CLIP),), "aggregator": EXPECTED}
    if name == "gaussian":
        stages = (clip_norm(CLIP), gaussian_noise(**noise, accountant="rdp" if quick else "pld"))
        return {"cohort": sampling.poisson(0.1), "transforms": stages, "aggregator": EXPECTED}
    if name == "correlated":
        return {"cohort": fixed, "transforms": (clip_norm(CLIP), correlated_noise(**noise)), "aggregator": EXPECTED}
    uniform: dict[str, Any] = {"cohort": fixed, "aggregator": atoll.aggregators.mean(weights="uniform")}
    if name == "local":
        return {**uniform, "transforms": (local_noise(clip=CLIP, **noise),)}
    stage = skellam(clip=CLIP, survivors=cohort, clients=cohort, **noise)
    return {**uniform, "transforms": (stage,), "channel": secure_sum(clip=1.0, least=cohort)}


def clients_at(name: str, epsilon: float | None, seed: int, quick: bool) -> float:
    """Accuracy of federated averaging under a mechanism of client-level privacy."""
    data, size = digits(20 if quick else CLIENTS, quick, seed)
    model = atoll.Model(nn.Linear(size, 10), "cross_entropy", metrics=("accuracy",))
    result = atoll.simulate(
        model, data, algorithm=atoll.fedavg(atoll.local_sgd(0.1, epochs=1, batch_size=20)),
        rounds=2 if quick else ROUNDS, seed=seed, initial=torch.zeros(model.size), evaluate_every=1000,
        progress=False, **mechanism(name, epsilon, quick),
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


def flamby_at(epsilon: float | None, delta: float | None, seed: int, quick: bool) -> float:
    """Mean accuracy over test patients in FLamby's setting, its hospitals' patients protected one by one."""
    own, told = flamby_heart.patients().own, None
    if epsilon is not None and delta is not None:
        told = privacy.example_level(clip=1.1, epsilon=epsilon, delta=delta, accountant="rdp")
    plan = atoll.local_sgd(0.001, steps=flamby_heart.STEPS, batch_size=flamby_heart.BATCH, privacy=told)
    result = atoll.simulate(
        flamby_heart.model(), own, algorithm=atoll.fedavg(plan), rounds=2 if quick else flamby_heart.ROUNDS, seed=seed,
        initial=flamby_heart.start(seed), evaluate_every=1000, progress=False,
    )  # fmt: skip
    return float(result.history[-1].test["accuracy"])


def without_noise(multiplier: float, source: Source) -> Callable[[Tensor, float], Tensor]:
    """In the place of `releasing`: the clipped sums as they are, to time what they cost alone."""
    return lambda total, bound: total


def rounds(quick: bool) -> dict[str, list[float]]:
    """Processor seconds of W2's rounds, plain and under privacy, one kind after the other in every turn.

    W2 is an MLP 784-200-10, 50 of 1,000 clients with 60 examples, batches of 20.
    """
    clients, cohort, size = (20, 5, 64) if quick else (1000, 50, 784)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60 * clients, size, generator=draw), torch.randint(0, 10, (60 * clients,), generator=draw)
    data = atoll.FederatedDataset.from_arrays(
        {f"c{i}": (x[60 * i : 60 * i + 60], y[60 * i : 60 * i + 60]) for i in range(clients)}
    )
    model = atoll.Model(nn.Sequential(nn.Linear(size, 200), nn.ReLU(), nn.Linear(200, 10)), "cross_entropy")
    seconds: dict[str, list[float]] = {"plain": [], "clients": [], "gradients": [], "examples": []}
    runs = dict[str, Process]()
    for kind in seconds:
        told = privacy.example_level(clip=1.0, noise_multiplier=1.0) if kind in ("gradients", "examples") else None
        runs[kind] = Process(
            model, atoll.fedavg(atoll.local_sgd(0.1, epochs=1, batch_size=20, privacy=told)), aggregator=EXPECTED,
            transforms=(clip_norm(0.5), gaussian_noise(1.0)) if kind == "clients" else (), workers=1,
        )  # fmt: skip
    states = {kind: run.init() for kind, run in runs.items()}
    for number in range(3 if quick else 23):
        names = sampling.fixed(cohort).cohort(0, number, data.clients)
        for kind, run in runs.items():
            with patch.object(private, "releasing", without_noise if kind == "gradients" else private.releasing):
                began = time.process_time()
                states[kind], _ = run.next(states[kind], data, names, expected=float(cohort))
            if number >= (1 if quick else 3):
                seconds[kind].append(time.process_time() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], kind: str) -> float:
    """Median of the ratios of neighbouring rounds: of a kind, and plain."""
    return statistics.median(b / a for a, b in zip(seconds["plain"], seconds[kind], strict=True))


def fifty_million(quick: bool) -> tuple[float, float]:
    """Processor and wall-clock seconds to add noise to 50 million numbers."""
    values = torch.zeros(10**5 if quick else 50 * 10**6, dtype=torch.float64)
    source = Source()
    source.add_normal(values[:1000], 1.0)  # the table is made once
    began, seen = time.process_time(), time.perf_counter()
    source.add_normal(values, 1.0)
    return time.process_time() - began, time.perf_counter() - seen


def drawn(known: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]]) -> Callable[[Path], None]:
    """What draws the accuracy of every mechanism over epsilon."""

    def draw(path: Path) -> None:
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
        for name, title in NAMES.items():
            axis.plot(known, [statistics.mean(f) for f in curves[name][: len(known)]], marker="o", label=title)
        axis.axhline(statistics.mean(curves["gaussian"][-1]), color="gray", linestyle="--", label="clipped, no noise")
        axis.set(xscale="log", xlabel="epsilon", ylabel="test accuracy", ylim=(0, 1), title="1,000 clients, MNIST")
        axis.set_xticks(known, [f"{e:g}" for e in known], minor=False)
        axis.minorticks_off()
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)

    return draw


def shown(values: Sequence[float]) -> str:
    """Mean of some accuracies, with their standard deviation where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write it down."""
    options = parser((__doc__ or "").splitlines()[0], seeds=(0, 1, 2)).parse_args(arguments)
    quick = bool(options.quick)
    seeds = list(options.seeds)[: 1 if quick else None]
    torch.set_num_threads(1)
    numbers: dict[str, Any] = {"seeds": seeds}
    curves: dict[str, list[list[float]]] = {name: [] for name in (*NAMES, "patients")}
    epsilons = EPSILONS[-2:] if quick else EPSILONS
    for epsilon in epsilons:
        for name, found in curves.items():
            if epsilon is None and name not in ("gaussian", "patients"):
                continue
            at = patients_at if name == "patients" else partial(clients_at, name)
            found.append([at(epsilon, seed, quick) for seed in seeds])
            print(f"{name} at epsilon {epsilon}: {found[-1]}", file=sys.stderr, flush=True)
    levels = ["none" if e is None else f"{e:g}" for e in epsilons]
    numbers["accuracy"] = {name: dict(zip(levels, found, strict=False)) for name, found in curves.items()}
    published = [
        [flamby_at(epsilon, delta, seed, quick) for seed in flamby_heart.SEEDS[: 1 if quick else None]]
        for epsilon, delta, _ in FLAMBY[: 2 if quick else None]
    ]
    numbers["flamby"] = published
    seconds = rounds(quick)
    share, gradients, examples = (ratio(seconds, kind) for kind in ("clients", "gradients", "examples"))
    noise, wall = fifty_million(quick)
    numbers |= {
        "rounds": seconds, "ratio": share, "ratio of examples' gradients": gradients,
        "ratio of examples' gradients and noise": examples, "noise for 50 million": noise,
        "noise for 50 million by the clock": wall,
    }  # fmt: skip
    found = Findings(
        title="What privacy costs",
        setting=[
            "Client-level: MNIST dealt out to 1,000 clients of 60 images, cohorts of a tenth, 60 rounds of one local "
            "epoch (batches of 20, learning rate 0.1), a linear model of 7,850 numbers that starts at nought, clip "
            "norm 0.5, delta 1e-4, noise calibrated for epsilon; accuracy on the 10,000 test images, which are no "
            "client's. The row without noise clips as well. Only Poisson cohorts, drawn secretly, count on sampling; "
            "correlated noise counts on ten rounds between a client's participations; local noise on how often a "
            "client takes part; under secure_sum every round counts for everybody, and the server is not trusted with "
            "anything but sums. The noise of local_noise hides each update from the server itself.",
            "Example-level: the four hospitals of the heart-disease data, logistic regression, 15 rounds of 5 local "
            "steps on Poisson batches of 32 expected patients (learning rate 0.3, clip norm 1), delta 1e-3; accuracy "
            "on the hospitals' test patients. No setting was tuned for any row.",
            "FLamby's setting: its preprocessing and split, fedavg of 15 rounds of 100 steps with batches of 4, "
            "learning rate 0.001; here clip norm 1.1, Poisson batches, seeds 42 to 46, and accuracy over all test "
            "patients. FLamby's own clip norm, and which mean its figures are, were not at hand, so that the columns "
            "stand beside each other and nothing is held to them.",
            f"Seeds {', '.join(map(str, seeds))}: of data and cohorts; private noise, and private cohorts, have none.",
        ],
        tables=[
            Table(
                "Accuracy under client-level privacy, MNIST",
                ["epsilon", *NAMES.values()],
                [
                    [level, *(shown(curves[name][i]) if i < len(curves[name]) else "" for name in NAMES)]
                    for i, level in enumerate(levels)
                ],
            ),
            Table(
                "Accuracy under example-level privacy, heart disease",
                ["epsilon", "accuracy"],
                [[level, shown(found)] for level, found in zip(levels, curves["patients"], strict=True)],
            ),
            Table(
                "FLamby's setting",
                ["epsilon", "delta", "published", "Atoll"],
                [
                    [
                        "none" if epsilon is None else f"{epsilon:g}",
                        "" if delta is None else f"{delta:g}",
                        said,
                        shown(f),
                    ]
                    for (epsilon, delta, said), f in zip(FLAMBY, published, strict=False)
                ],
            ),
            Table(
                "Time",
                ["what", "measured", "bound"],
                [
                    ["W2's round with clipping and noise / without, paired", f"{share:.2f}", f"{SHARE:g}"],
                    ["W2's round by clipped gradients of examples / plain, paired", f"{gradients:.2f}", f"{TIMES:g}"],
                    ["the same with noise in every local step", f"{examples:.2f}", ""],
                    ["noise for 50 million numbers, processor time", f"{noise:.2f} s", f"{SECONDS:g} s"],
                    ["the same by the clock", f"{wall:.2f} s", ""],
                ],
            ),
        ],
        remarks=[
            "Four hospitals cannot have client-level privacy: a noise that hides one of four hides the others too, and "
            "Poisson sampling has nobody to hide among. Example-level privacy protects their patients instead.",
            "Ratios are medians over pairs of rounds that follow each other in one process, of processor time. The "
            "machine's load is told below: seconds depend on it, ratios less.",
            "Under example-level privacy every one of a client's local steps draws as many numbers of noise as the "
            "model has parameters. What they cost is told apart from what examples' gradients cost.",
        ],
        figures={"curves": drawn([e for e in epsilons if e is not None], curves)},
        passed=share <= SHARE and gradients <= TIMES and noise <= SECONDS,
        numbers=numbers,
    )
    return finish("privacy", found, quick=quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
