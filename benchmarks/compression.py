"""Accuracy against bytes on the wire, for every codec, on MNIST and on heart disease; one bit for each number of a CNN.

Bytes are those of the run's history: what a client sends and receives in a round, scales and places included.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from reporting import Findings, Table, finish, parser, pyplot
from robustness import SIDE, images, model
from torch import nn

import atoll
from atoll import aggregators
from atoll.transforms import (
    Transform,
    delta,
    eden,
    ef21,
    entropy_code,
    error_feedback,
    half,
    power_sgd,
    quantize,
    rand_k,
    rotate,
    sign,
    top_k,
)

PARAMETERS = 1_663_370
SMALLER = 30
"""How many times smaller than float32 the update of the CNN must be with one bit for a number."""
ALLOWED = 0.01
"""What one bit may lose of the accuracy on MNIST."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What updates, and models, are sent through.

    Attributes:
        up: stages from a client to the server.
        down: options of the downlink.
        uniform: clients count equally, which EF21 needs.
    """

    up: tuple[Transform, ...] = ()
    down: Any = ()
    uniform: bool = False


ARMS: dict[str, Callable[[], Arm]] = {
    "float32": Arm,
    "half": lambda: Arm((half(),)),
    "bfloat16": lambda: Arm((half("bfloat16"),)),
    "quantize 8": lambda: Arm((quantize(8),)),
    "quantize 8, coded": lambda: Arm((quantize(8), entropy_code())),
    "quantize 4": lambda: Arm((quantize(4),)),
    "quantize 4, coded": lambda: Arm((quantize(4), entropy_code())),
    "rotate, quantize 2": lambda: Arm((rotate(), quantize(2))),
    "eden 4": lambda: Arm((eden(4),)),
    "eden 2": lambda: Arm((eden(2),)),
    "eden 1": lambda: Arm((eden(1),)),
    "EF sign": lambda: Arm((error_feedback(sign()),)),
    "EF top 5 %": lambda: Arm((error_feedback(top_k(0.05)),)),
    "EF top 5 %, 4 bits": lambda: Arm((error_feedback(top_k(0.05), quantize(4)),)),
    "EF top 1 %": lambda: Arm((error_feedback(top_k(0.01)),)),
    "EF21 top 5 %": lambda: Arm((ef21(top_k(0.05)),), uniform=True),
    "random 10 %": lambda: Arm((rand_k(0.1),)),
    "EF PowerSGD 4": lambda: Arm((error_feedback(power_sgd(4)),)),
    "EF PowerSGD 1": lambda: Arm((error_feedback(power_sgd(1)),)),
    "eden 1 up, 8 bits down": lambda: Arm((eden(1),), delta(quantize(8))),
    "eden 1 up, eden 4 down": lambda: Arm((eden(1),), delta(eden(4), full_every=50)),
    "EF top 5 % both ways": lambda: Arm((error_feedback(top_k(0.05)),), delta(top_k(0.05))),
}
"""EF: inside error_feedback; coded: entropy_code behind it."""


def cnn() -> atoll.Model:
    """The network with two convolutions of McMahan et al. 2017."""
    layers = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip
    return atoll.Model(layers, loss="cross_entropy", metrics=("accuracy",))


def logistic(features: int) -> atoll.Model:
    """Logistic regression for two classes."""
    return atoll.Model(nn.Linear(features, 2), loss="cross_entropy", metrics=("accuracy",))


@lru_cache(maxsize=1)
def setting(task: str, seed: int, synthetic: bool) -> tuple[atoll.Model, Any, Any]:
    """A task's model, data and plan."""
    if task == "network":
        return cnn(), atoll.datasets.mnist(5, seed=seed), atoll.local_sgd(lr=0.1, steps=10, batch_size=16)
    if task == "MNIST":
        return model(SIDE), images(seed, SIDE, synthetic), atoll.local_sgd(lr=0.1, steps=10, batch_size=32)
    data = atoll.datasets.heart_disease(seed=seed)
    return logistic(data[data.clients[0]].train["x"].shape[1]), data, atoll.local_sgd(lr=0.05, steps=10, batch_size=16)


def trial(job: tuple[str, int, str, int, bool]) -> dict[str, Any]:
    """A run: accuracy along it, and bytes a client sends and receives in a round on average.

    Args:
        job: task, seed, arm, rounds, and whether images are noise.
    """
    task, seed, name, rounds, synthetic = job
    torch.set_num_threads(1)
    (network, data, plan), arm = setting(task, seed, synthetic), ARMS[name]()
    assert task != "network" or network.size == PARAMETERS
    result = atoll.simulate(
        network,
        data,
        algorithm=atoll.fedavg(plan),
        rounds=rounds,
        transforms=arm.up,
        downlink=arm.down,
        aggregator=aggregators.mean(weights="uniform") if arm.uniform else None,
        evaluate_every=rounds if task == "network" else max(1, rounds // 5),
        initial=network.init(seed),
        seed=seed,
        workers=1,
        progress=False,
    )
    curve = [(r.round, _accuracy(r)) for r in result.history if _accuracy(r) is not None]
    clients = len(data.clients)
    up, down = (sum(getattr(r, f"bytes_{way}") for r in result.history) / clients / rounds for way in ("up", "down"))
    return {"seed": seed, "curve": curve, "accuracy": curve[-1][1], "up": up, "down": down}


def _accuracy(record: atoll.Record) -> float | None:
    return record.holdout.get("accuracy", record.test.get("accuracy"))


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "", seeds=(0,))
    reader.add_argument("--rounds", type=int, default=20, help="of every run on MNIST and heart disease")
    reader.add_argument("--cnn-rounds", type=int, default=12, help="of the convolutional network")
    reader.add_argument("--heart-seeds", type=int, nargs="+", default=[0, 1, 2], help="of heart disease")
    reader.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    reader.add_argument("--synthetic", action="store_true", help="noise of MNIST's shape, for --quick runs")
    options = reader.parse_args(arguments)
    torch.set_num_threads(1)
    if options.synthetic and not options.quick:
        reader.error("--synthetic is for --quick runs: its accuracies say nothing about MNIST")
    quick = options.quick
    arms = {n: ARMS[n] for n in ("float32", "eden 1 up, eden 4 down", "quantize 4, coded")} if quick else ARMS
    rounds, most = (3, 1) if quick else (options.rounds, None)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {t: {n: [] for n in arms} for t in ("MNIST", "heart disease")}
    seeds = {"MNIST": options.seeds[:most], "heart disease": options.heart_seeds[:most]}
    # The longest first: the network.
    jobs = [] if quick else [("network", options.seeds[0], n, options.cnn_rounds, False) for n in ("float32", "eden 1")]
    jobs += [(t, s, n, rounds, options.synthetic) for t in found for n in arms for s in seeds[t]]
    large, began = dict[str, dict[str, Any]](), time.monotonic()
    with ProcessPoolExecutor(options.jobs) if options.jobs > 1 else nullcontext() as pool:
        results = map(trial, jobs) if pool is None else pool.map(trial, jobs)
        for (task, seed, name, *_), result in zip(jobs, results, strict=True):
            if task == "network":
                large[name] = result
            else:
                found[task][name].append(result)
            print(f"{task}, {name}, seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    tables = [table(task, own) for task, own in found.items()]
    remarks = []
    passed = True
    if large:
        ratio = 4 * PARAMETERS / large["eden 1"]["up"]
        lost = large["float32"]["accuracy"] - large["eden 1"]["accuracy"]
        passed = ratio >= SMALLER and lost <= ALLOWED
        tables.append(
            Table(
                f"A network with two convolutions, {PARAMETERS:,} parameters, {options.cnn_rounds} rounds on MNIST",
                ["codec", "bytes up", "times smaller than float32", "bytes down", "accuracy in percent"],
                [
                    [
                        n,
                        f"{r['up']:,.0f}",
                        f"{4 * PARAMETERS / r['up']:.1f}",
                        f"{r['down']:,.0f}",
                        _percent(r["accuracy"]),
                    ]
                    for n, r in large.items()
                ],
            )
        )
        remarks.append(
            f"With one bit for a number the network's update is {ratio:.1f} times smaller than its float32 numbers (at "
            f"least {SMALLER} is asked for), and its accuracy after the same rounds differs by {-100 * lost:+.2f} "
            f"points; it may lose {100 * ALLOWED:g}."
        )
    least = {task: min(own, key=lambda n: own[n][0]["up"] + own[n][0]["down"]) for task, own in found.items()}
    remarks.append(
        "Fewest bytes both ways: " + ", ".join(f"`{name}` on {task}" for task, name in least.items()) + ". On heart "
        "disease a model has fewer numbers than the headers of some codecs: eden fills its block up to 256 numbers."
    )
    what = "noise of MNIST's shape" if options.synthetic else "MNIST"
    findings = Findings(
        title="Accuracy against bytes",
        setting=[
            f"{what}: 25 clients by Dirichlet(1), network 784-64-10, learning rate 0.1, batches of 32; accuracy on the "
            "official test images. Heart disease: four hospitals, logistic regression, learning rate 0.05, batches of "
            "16; accuracy on the hospitals' held-out patients. Everybody takes part in every round, ten local steps, "
            f"{rounds} rounds, federated averaging. Accuracy after the last round: mean over seeds "
            f"{_list(seeds['MNIST'])} and {_list(seeds['heart disease'])}, in brackets the lowest and the highest.",
            "Bytes are for one client and one round. `down` counts the first, whole model too. EF: "
            "inside error_feedback. `coded`: with entropy_code behind it. The network with convolutions: five clients "
            "with images dealt out at random, ten steps with batches of 16 at learning rate 0.1 for each of them in "
            f"a round, seed {options.seeds[0]}.",
        ],
        tables=tables,
        remarks=remarks,
        passed=passed,
        numbers={"allowed": ALLOWED, "smaller": SMALLER, "runs": found, "network": large},
        figures={"bytes": lambda path: draw(path, found)},
    )
    return finish("compression", findings, quick=quick, out=options.out, arguments=arguments)


def table(task: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """All codecs on one task."""
    whole = runs["float32"]
    base = _mean(whole, "accuracy")
    rows = [
        [
            name, f"{_mean(own, 'up'):,.0f}", f"{_mean(whole, 'up') / _mean(own, 'up'):.1f}",
            f"{_mean(own, 'down'):,.0f}",
            f"{_percent(_mean(own, 'accuracy'))} [{_percent(min(r['accuracy'] for r in own))}, "
            f"{_percent(max(r['accuracy'] for r in own))}]",
            f"{100 * (_mean(own, 'accuracy') - base):+.2f}",
        ]
        for name, own in runs.items()
    ]  # fmt: skip
    return Table(task, ["codec", "bytes up", "times smaller", "bytes down", "accuracy in percent", "points"], rows)


def draw(path: Path, found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Above: accuracy at the end against bytes up; below: along the run against all bytes so far."""
    plt = pyplot()
    from matplotlib import ticker

    figure, axes = plt.subplots(2, len(found), figsize=(13, 10), layout="constrained", squeeze=False)
    for column, (task, runs) in enumerate(found.items()):
        end, way = axes[0][column], axes[1][column]
        for i, (name, own) in enumerate(runs.items()):
            style = {"color": plt.get_cmap("tab20")(i % 20), "marker": "osD^v"[i // 5 % 5]}
            accuracy = 100 * _mean(own, "accuracy")
            end.plot([_mean(own, "up")], [accuracy], linestyle="", label=name, **style)
            each = (_mean(own, "up") + _mean(own, "down")) / 1e3
            steps = [r for r, _ in own[0]["curve"]]
            curve = [100 * statistics.mean(run["curve"][j][1] for run in own) for j in range(len(steps))]
            way.plot([each * r for r in steps], curve, linewidth=1, markersize=3, **style)
        end.set(xscale="log", title=f"{task}: at the end", xlabel="bytes up, a client and round", ylabel="accuracy, %")
        way.set(
            xscale="log",
            title=f"{task}: along the run",
            xlabel="kilobytes up and down, a client so far",
            ylabel="accuracy, %",
        )
        for axis in (end, way):
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
