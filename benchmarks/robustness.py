"""Rules against attacks on MNIST: accuracy, and how often a trigger works, for every pair.

Every rule is told how many malicious clients there are. What counts for a rule is its worst case over all attacks.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import Findings, Table, finish, parser, pyplot
from torch import nn

import atoll
from atoll import aggregators, attacks
from atoll.aggregators import Aggregator
from atoll.attacks import Attack, Poison
from atoll.attacks.poisoning import triggered

CLIENTS = 25
TARGET = 7
DEFAULT = "nnm, trimmed mean"
"""The rule the documents name: it is judged over all attacks, like the others."""
ALLOWED = 0.05
"""What the default may lose, with a fifth of the clients malicious, against the mean without an attack."""


@dataclass(frozen=True, slots=True)
class Threat:
    """An attack on data, on updates, or both."""

    data: Poison | None = None
    updates: Attack | None = None


THREATS: dict[str, Threat] = {
    "none": Threat(),
    "label flip": Threat(attacks.label_flip()),
    "sign flip x 4": Threat(updates=attacks.sign_flip(4.0)),
    "gaussian": Threat(updates=attacks.gaussian(10.0)),
    "backdoor": Threat(attacks.backdoor(target=TARGET)),
    "backdoor, replacement": Threat(attacks.backdoor(target=TARGET), attacks.model_replacement()),
    "alie": Threat(updates=attacks.alie()),
    "alie, z = 1.5": Threat(updates=attacks.alie(1.5)),
    "ipm 0.5": Threat(updates=attacks.ipm(0.5)),
    "ipm 5": Threat(updates=attacks.ipm(5.0)),
    "mimic": Threat(updates=attacks.mimic()),
    "min-max": Threat(updates=attacks.min_max()),
    "min-sum": Threat(updates=attacks.min_sum()),
    "lying weight": Threat(updates=attacks.lying_weight(1e6)),
    "non-finite": Threat(updates=attacks.non_finite()),
    "free rider": Threat(updates=attacks.free_rider()),
    "stale": Threat(updates=attacks.stale()),
}

RULES: dict[str, Callable[[int], Aggregator]] = {
    "mean": lambda f: aggregators.mean(),
    "norm bound": lambda f: aggregators.norm_bound(),
    "median": lambda f: aggregators.median(),
    "trimmed mean": lambda f: aggregators.trimmed_mean(drop=f),
    "meamed": lambda f: aggregators.meamed(byzantine=f),
    "krum": lambda f: aggregators.krum(byzantine=f),
    "multi-krum": lambda f: aggregators.multi_krum(byzantine=f),
    "bulyan": lambda f: aggregators.bulyan(byzantine=f),
    "mda": lambda f: aggregators.mda(byzantine=f),
    "geometric median": lambda f: aggregators.geometric_median(),
    "centred clipping": lambda f: aggregators.centered_clipping(radius=1.0, iterations=3),
    "nnm, trimmed mean": lambda f: aggregators.nnm(byzantine=f, then=aggregators.trimmed_mean(drop=f)),
    "nnm, geometric median": lambda f: aggregators.nnm(byzantine=f, then=aggregators.geometric_median()),
    "buckets of 2, median": lambda f: aggregators.bucketing(size=2, then=aggregators.median()),
}


def model() -> atoll.Model:
    """784-64-10 with rectifiers."""
    return atoll.Model(
        nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)), loss="cross_entropy", metrics=("accuracy",)
    )


def images(seed: int, *, synthetic: bool) -> atoll.FederatedDataset:
    """MNIST dealt out by Dirichlet(1), or noise of the same shape."""
    if not synthetic:
        return atoll.datasets.mnist(CLIENTS, partition="dirichlet", alpha=1.0, flat=True, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (CLIENTS * 20 + 200,), generator=draw)
    pixels = torch.rand(len(labels), 784, generator=draw) * 0.2
    pixels[torch.arange(len(labels)), labels * 70] += 2.0
    held = slice(CLIENTS * 20, None)
    return atoll.partition.dirichlet(
        (pixels[: CLIENTS * 20], labels[: CLIENTS * 20]),
        CLIENTS,
        alpha=1.0,
        seed=seed,
        test=(pixels[held], labels[held]),
    )


def trial(
    data: atoll.FederatedDataset, rule: Aggregator, threat: Threat, fraction: float, *, rounds: int, seed: int
) -> tuple[float, float]:
    """Accuracy on the held-out images at the end, nan when the run broke; and how often the trigger wins there."""
    network = model()
    if threat.data is not None:
        data = attacks.apply(data, threat.data, fraction=fraction, seed=seed)
    if threat.updates is not None:
        rule = attacks.apply(rule, threat.updates, fraction=fraction, seed=seed)
    try:
        result = atoll.simulate(
            network,
            data,
            algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1, steps=10, batch_size=32)),
            rounds=rounds,
            aggregator=rule,
            evaluate_every=rounds,
            initial=network.init(seed),
            seed=seed,
            workers=1,
            progress=False,
        )
    except atoll.errors.NonFiniteError:
        return float("nan"), float("nan")
    assert data.holdout is not None
    others = data.holdout["x"][data.holdout["y"] != TARGET]
    wins = (result.predict(triggered(others)).argmax(dim=1) == TARGET).float().mean()
    return result.history[-1].holdout["accuracy"], float(wins)


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "", seeds=(0,))
    reader.add_argument("--rounds", type=int, default=25, help="of every run")
    reader.add_argument("--fractions", type=float, nargs="+", default=[0.2], help="of the clients that are malicious")
    reader.add_argument("--synthetic", action="store_true", help="noise of MNIST's shape, for --quick runs")
    options = reader.parse_args(arguments)
    torch.set_num_threads(1)
    if options.synthetic and not options.quick:
        reader.error("--synthetic is for --quick runs: its accuracies say nothing about MNIST")
    rules = {n: RULES[n] for n in ("mean", "median", DEFAULT)} if options.quick else RULES
    threats = {n: THREATS[n] for n in ("none", "backdoor, replacement", "alie")} if options.quick else THREATS
    rounds = 2 if options.quick else options.rounds
    cells = list[dict[str, Any]]()
    for seed in options.seeds[:1] if options.quick else options.seeds:
        data, began = images(seed, synthetic=options.synthetic), time.monotonic()
        for fraction in options.fractions:
            bad = len(attacks.chosen(list(data.clients), fraction, seed))
            for rule, build in rules.items():
                least = build(bad).least(CLIENTS)
                for name, threat in threats.items():
                    found = float("nan"), float("nan")
                    if least <= CLIENTS:
                        found = trial(data, build(bad), threat, fraction, rounds=rounds, seed=seed)
                    cells.append(
                        {"rule": rule, "attack": name, "fraction": fraction, "seed": seed, "fits": least <= CLIENTS,
                         "accuracy": found[0], "trigger": found[1]}
                    )  # fmt: skip
                print(f"{rule}, {fraction:g}, seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr)

    def value(rule: str, attack: str, fraction: float, key: str) -> float:
        """The mean over seeds; a run that broke counts as accuracy 0."""
        own = [c for c in cells if (c["rule"], c["attack"], c["fraction"]) == (rule, attack, fraction)]
        if not all(c["fits"] for c in own):
            return float("nan")
        return sum(0.0 if c[key] != c[key] else c[key] for c in own) / len(own)

    hostile = [n for n in threats if n != "none"]
    tables, worst = list[Table](), dict[float, dict[str, float]]()
    for fraction in options.fractions:
        at = {r: [value(r, a, fraction, "accuracy") for a in threats] for r in rules}
        worst[fraction] = {
            r: min(v for a, v in zip(threats, row, strict=True) if a in hostile) for r, row in at.items()
        }
        tables.append(
            Table(
                f"Accuracy in percent, {fraction:.0%} of the clients malicious",
                ["rule", *threats, "worst"],
                [[r, *(_percent(v) for v in row), _percent(worst[fraction][r])] for r, row in at.items()],
            )
        )
        doors = [n for n, t in threats.items() if n == "none" or (t.data is not None and t.data.name == "backdoor")]
        tables.append(
            Table(
                f"Images of other digits with the trigger that are taken for a {TARGET}, in percent, {fraction:.0%}",
                ["rule", *doors],
                [[r, *(_percent(value(r, a, fraction, "trigger")) for a in doors)] for r in rules],
            )
        )
    first = options.fractions[0]
    clean = value("mean", "none", first, "accuracy")
    lost = clean - worst[first][DEFAULT]
    best = max((r for r in rules if worst[first][r] == worst[first][r]), key=lambda r: worst[first][r])

    def draw(path: Path) -> None:
        plt = pyplot()
        count = len(options.fractions)
        figure, axes = plt.subplots(count, 1, figsize=(11, 5.2 * count), layout="constrained", squeeze=False)
        for axis, fraction in zip(axes[:, 0], options.fractions, strict=True):
            grid = [[100 * value(r, a, fraction, "accuracy") for a in threats] for r in rules]
            axis.imshow(grid, cmap="RdYlGn", vmin=10, vmax=100, aspect="auto")
            axis.set_xticks(range(len(threats)), list(threats), rotation=40, ha="right")
            axis.set_yticks(range(len(rules)), list(rules))
            for i, row in enumerate(grid):
                for j, cell in enumerate(row):
                    axis.text(j, i, "-" if cell != cell else f"{cell:.0f}", ha="center", va="center", fontsize=8)
            axis.set_title(f"accuracy in percent, {fraction:.0%} of {CLIENTS} clients malicious")
        figure.savefig(path, dpi=120)
        plt.close(figure)

    what = "noise of MNIST's shape" if options.synthetic else "MNIST"
    found_out = Findings(
        title="Robust rules against attacks",
        setting=[
            f"{what}, {CLIENTS} clients by Dirichlet(1), all of them in each of {rounds} rounds, ten local steps with "
            "batches of 32 at learning rate 0.1, network 784-64-10. Malicious clients are the same in every round and "
            "see all honest updates. Every rule is told how many they are. Accuracy on the official test images after "
            "the last round, mean over seeds; a run that could not go on counts as 0, a cohort too small for a rule is "
            "`-`.",
            "`lying weight` claims a million times its examples for a flipped update; rules other than the mean do not "
            "look at weights. The trigger is nine pixels in the last row.",
        ],
        tables=tables,
        remarks=[
            f"`{DEFAULT}` is the default the documents name. With {first:.0%} malicious clients its worst case is "
            f"{_percent(worst[first][DEFAULT])} %, {100 * lost:.1f} points below the mean without an attack "
            f"({_percent(clean)} %).",
            f"The best worst case in this table has `{best}`: {_percent(worst[first][best])} %.",
        ],
        passed=lost <= ALLOWED,
        numbers={
            "allowed": ALLOWED,
            "default": DEFAULT,
            "cells": [{k: None if v != v else v for k, v in c.items()} for c in cells],
        },
        figures={"heat": draw},
    )
    return finish("robustness", found_out, quick=options.quick, out=options.out, arguments=arguments)


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
