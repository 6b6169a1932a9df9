"""Defences against attacks on MNIST: accuracy, and how often a trigger works, for every pair, fraction and seed.

Every rule is told how many malicious clients there are. What counts for a rule is its worst case over all attacks.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from reporting import Findings, Table, finish, parser, pyplot
from torch import Tensor, nn
from torch.nn import functional

import atoll
from atoll import aggregators, attacks, transforms
from atoll.aggregators import Aggregator
from atoll.attacks import Attack, Poison
from atoll.attacks.poisoning import triggered
from atoll.transforms import Transform

CLIENTS = 25
TARGET = 7
DEFAULT = "nnm, trimmed mean"
"""The rule the documents name: it is judged over all attacks, like the others."""
ALLOWED = 0.05
"""What the default may lose, with a fifth of the clients malicious, against the mean without an attack."""
JUDGED = 0.2
"""The fraction of malicious clients at which the default is judged."""
SIDE, SMALL = 28, 14
"""Pixels of an image's side: where the default is judged, and in the table of all rules, which it makes affordable."""


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
    "lying weight x 100": Threat(updates=attacks.lying_weight(100.0)),
    "lying weight x 1e9": Threat(updates=attacks.lying_weight(1e9)),
    "non-finite": Threat(updates=attacks.non_finite()),
    "free rider": Threat(updates=attacks.free_rider()),
    "stale": Threat(updates=attacks.stale()),
}


@dataclass(frozen=True, slots=True)
class Defence:
    """A rule, and what stands before it.

    Attributes:
        rule: (malicious clients) -> rule.
        stages: of the update pipeline.
        root: whether the server holds a hundred of the training examples.
    """

    rule: Callable[[int], Aggregator]
    stages: tuple[Transform, ...] = field(default=())
    root: bool = False


def _mixed(f: int) -> Aggregator:
    return aggregators.nnm(byzantine=f, then=aggregators.trimmed_mean(drop=f))


def _geometric() -> Aggregator:
    # The iteration ends at steps of a millionth of the honest distances, far below what accuracy can tell.
    return aggregators.geometric_median(tolerance=1e-6)


RULES: dict[str, Defence] = {
    "mean": Defence(lambda f: aggregators.mean()),
    "norm bound": Defence(lambda f: aggregators.norm_bound()),
    "median": Defence(lambda f: aggregators.median()),
    "trimmed mean": Defence(lambda f: aggregators.trimmed_mean(drop=f)),
    "meamed": Defence(lambda f: aggregators.meamed(byzantine=f)),
    "krum": Defence(lambda f: aggregators.krum(byzantine=f)),
    "multi-krum": Defence(lambda f: aggregators.multi_krum(byzantine=f)),
    "bulyan": Defence(lambda f: aggregators.bulyan(byzantine=f)),
    "mda": Defence(lambda f: aggregators.mda(byzantine=f)),
    "geometric median": Defence(lambda f: _geometric()),
    "centred clipping": Defence(lambda f: aggregators.centered_clipping(radius=1.0, iterations=3)),
    "fltrust": Defence(lambda f: aggregators.fltrust(root="server"), root=True),
    "buckets of 2, median": Defence(lambda f: aggregators.bucketing(size=2, then=aggregators.median())),
    "nnm, geometric median": Defence(lambda f: aggregators.nnm(byzantine=f, then=_geometric())),
    DEFAULT: Defence(_mixed),
    f"momentum, {DEFAULT}": Defence(_mixed, stages=(transforms.client_momentum(0.9),)),
}


def model(side: int) -> atoll.Model:
    """A hidden layer with rectifiers: 64 of them for whole images, 32 for small ones."""
    width = 64 if side == SIDE else 32
    return atoll.Model(
        nn.Sequential(nn.Linear(side * side, width), nn.ReLU(), nn.Linear(width, 10)),
        loss="cross_entropy",
        metrics=("accuracy",),
    )


@cache
def images(seed: int, side: int, synthetic: bool) -> atoll.FederatedDataset:
    """MNIST dealt out by Dirichlet(1), or noise of the same shape; of small images each pixel is the mean of four."""
    if not synthetic:
        data = atoll.datasets.mnist(CLIENTS, partition="dirichlet", alpha=1.0, flat=True, seed=seed)
    else:
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (CLIENTS * 20 + 200,), generator=draw)
        pixels = torch.rand(len(labels), 784, generator=draw) * 0.2
        pixels[torch.arange(len(labels)), labels * 70] += 2.0
        held = slice(CLIENTS * 20, None)
        data = atoll.partition.dirichlet(
            (pixels[: CLIENTS * 20], labels[: CLIENTS * 20]),
            CLIENTS,
            alpha=1.0,
            seed=seed,
            test=(pixels[held], labels[held]),
        )
    if side == SIDE:
        return data
    assert data.holdout is not None
    return atoll.FederatedDataset(
        data.clients,
        replace(data.train, fields={**data.train.fields, "x": _small(data.train.fields["x"], side)}),
        holdout={**data.holdout, "x": _small(data.holdout["x"], side)},
        name=f"{data.name}, {side} x {side}",
    )


def _small(x: Tensor, side: int) -> Tensor:
    return functional.avg_pool2d(x.reshape(-1, 1, SIDE, SIDE), SIDE // side).flatten(1)


def _root(data: atoll.FederatedDataset) -> dict[str, Tensor]:
    """A hundred training examples, four of each client's, which the server holds."""
    parts = [data[client].train for client in data.clients]
    return {name: torch.cat([part[name][:4] for part in parts]) for name in ("x", "y")}


@dataclass(frozen=True, slots=True)
class Trial:
    """A run: which defence against which attack."""

    rule: str
    attack: str
    fraction: float
    seed: int
    side: int
    rounds: int
    synthetic: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: accuracy on the held-out images, how often the trigger wins there; nan: it could not be."""

    fits: bool
    accuracy: float = float("nan")
    trigger: float = float("nan")


def run(trial: Trial) -> Outcome:
    """Run a trial."""
    torch.set_num_threads(1)
    network, data = model(trial.side), images(trial.seed, trial.side, trial.synthetic)
    defence, threat = RULES[trial.rule], THREATS[trial.attack]
    rule = defence.rule(len(attacks.chosen(list(data.clients), trial.fraction, trial.seed)))
    if rule.least(CLIENTS) > CLIENTS:
        return Outcome(False)
    root = _root(data) if defence.root else None
    if threat.data is not None:
        data = attacks.apply(data, threat.data, fraction=trial.fraction, seed=trial.seed)
    if threat.updates is not None:
        rule = attacks.apply(rule, threat.updates, fraction=trial.fraction, seed=trial.seed)
    try:
        result = atoll.simulate(
            network,
            data,
            algorithm=atoll.fedavg(atoll.local_sgd(lr=0.3, steps=10, batch_size=32)),
            rounds=trial.rounds,
            transforms=defence.stages,
            aggregator=rule,
            server_data=root,
            evaluate_every=trial.rounds,
            initial=network.init(trial.seed),
            seed=trial.seed,
            workers=1,
            progress=False,
        )
    except atoll.errors.NonFiniteError:
        return Outcome(True)
    assert data.holdout is not None
    others = data.holdout["x"][data.holdout["y"] != TARGET]
    wins = (result.predict(triggered(others)).argmax(dim=1) == TARGET).float().mean()
    return Outcome(True, result.history[-1].holdout["accuracy"], float(wins))


def every(trials: Sequence[Trial], jobs: int, keep: Path | None) -> dict[Trial, Outcome]:
    """Outcomes of trials, several at a time; those that a file keeps are not done again."""
    began, found = time.monotonic(), dict[Trial, Outcome]()
    for line in keep.read_text().splitlines() if keep is not None and keep.exists() else ():
        told = json.loads(line)
        found[Trial(**told["trial"])] = Outcome(**told["outcome"])
    left = [t for t in trials if t not in found]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for count, (trial, outcome) in enumerate(zip(left, pool.imap(run, left), strict=True), 1):
            found[trial] = outcome
            if keep is not None:
                with keep.open("a") as file:
                    file.write(json.dumps({"trial": asdict(trial), "outcome": asdict(outcome)}) + "\n")
            if count % 50 == 0:
                print(f"{count} of {len(left)} runs: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return {t: found[t] for t in trials}


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "", seeds=(0, 1))
    reader.add_argument("--rounds", type=int, default=25, help="of every run")
    reader.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="of malicious clients")
    reader.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    reader.add_argument("--keep", type=Path, help="a file that finished runs are kept in, to go on after a stop")
    reader.add_argument("--synthetic", action="store_true", help="noise of MNIST's shape, for --quick runs")
    options = reader.parse_args(arguments)
    if options.synthetic and not options.quick:
        reader.error("--synthetic is for --quick runs: its accuracies say nothing about MNIST")
    some = ("mean", "fltrust", DEFAULT, f"momentum, {DEFAULT}")
    rules = {n: RULES[n] for n in some} if options.quick else RULES
    threats = {n: THREATS[n] for n in ("none", "backdoor, replacement", "alie")} if options.quick else THREATS
    rounds, seeds = (2, options.seeds[:1]) if options.quick else (options.rounds, options.seeds)
    fractions = options.fractions[:1] if options.quick else options.fractions
    judged = [
        Trial(rule, attack, JUDGED, seed, SIDE, rounds, options.synthetic)
        for seed in seeds
        for rule, attack in [("mean", "none"), *((DEFAULT, a) for a in threats)]
    ]
    grid = [
        Trial(rule, attack, fraction, seed, SMALL, rounds, options.synthetic)
        for seed in seeds
        for fraction in fractions
        for rule in rules
        for attack in threats
    ]
    found = every([*judged, *grid], options.jobs, options.keep)

    def values(rule: str, attack: str, fraction: float, key: str, side: int = SMALL) -> list[float]:
        """One for each seed; a run that broke counts as accuracy 0, a cohort too small as nan."""
        own = [found[Trial(rule, attack, fraction, seed, side, rounds, options.synthetic)] for seed in seeds]
        each = [getattr(o, key) for o in own]
        return [(0.0 if v != v else v) if o.fits else float("nan") for o, v in zip(own, each, strict=True)]

    def value(rule: str, attack: str, fraction: float, key: str, side: int = SMALL) -> float:
        own = values(rule, attack, fraction, key, side)
        return sum(own) / len(own)

    hostile, tables = [n for n in threats if n != "none"], list[Table]()
    clean = value("mean", "none", JUDGED, "accuracy", SIDE)
    at = {a: values(DEFAULT, a, JUDGED, "accuracy", SIDE) for a in threats}
    worst_attack = min(hostile, key=lambda a: sum(at[a]))
    worst_judged = sum(at[worst_attack]) / len(seeds)
    lost = clean - worst_judged
    tables.append(
        Table(
            f"`{DEFAULT}` on whole images, {JUDGED:.0%} of the clients malicious: accuracy in percent by seed",
            ["attack", *(f"seed {seed}" for seed in seeds), "mean", "below the mean without attack"],
            [
                [a, *(_percent(v) for v in row), _percent(sum(row) / len(row)), _percent(clean - sum(row) / len(row))]
                for a, row in at.items()
            ],
        )
    )
    worst = dict[float, dict[str, float]]()
    for fraction in fractions:
        cells = {r: [value(r, a, fraction, "accuracy") for a in threats] for r in rules}
        worst[fraction] = {
            r: min(v for a, v in zip(threats, row, strict=True) if a in hostile) for r, row in cells.items()
        }
        tables.append(
            Table(
                f"Accuracy in percent, {fraction:.0%} of the clients malicious",
                ["rule", *threats, "worst", "worst attack"],
                [
                    [r, *(_percent(v) for v in row), _percent(worst[fraction][r]), _place(threats, row, hostile)]
                    for r, row in cells.items()
                ],
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
    plain = {f: value("mean", "none", f, "accuracy") for f in fractions}
    remarks = [
        f"`{DEFAULT}` is the default the documents name. On whole images with {JUDGED:.0%} malicious clients its worst "
        f"case, `{worst_attack}`, is {_percent(worst_judged)} %, {100 * lost:.1f} points below the mean without an "
        f"attack ({_percent(clean)} %).",
    ]
    for fraction in fractions:
        ranked = sorted(
            (r for r in rules if worst[fraction][r] == worst[fraction][r]), key=lambda r: -worst[fraction][r]
        )
        held = [r for r in ranked if plain[fraction] - worst[fraction][r] <= ALLOWED]
        remarks.append(
            f"At {fraction:.0%} the best worst case on small images has `{ranked[0]}` "
            f"({_percent(worst[fraction][ranked[0]])} %; the mean without an attack {_percent(plain[fraction])} %). "
            f"Within {100 * ALLOWED:.0f} points of no attack stay: {', '.join(f'`{r}`' for r in held) or 'none'}."
        )

    def draw(path: Path) -> None:
        plt = pyplot()
        count = len(fractions)
        figure, axes = plt.subplots(count, 1, figsize=(12, 6.0 * count), layout="constrained", squeeze=False)
        columns = [*threats, "worst"]
        for axis, fraction in zip(axes[:, 0], fractions, strict=True):
            grid = [
                [*(100 * value(r, a, fraction, "accuracy") for a in threats), 100 * worst[fraction][r]] for r in rules
            ]
            axis.imshow(grid, cmap="RdYlGn", vmin=10, vmax=100, aspect="auto")
            axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
            axis.set_yticks(range(len(rules)), list(rules))
            axis.axvline(len(threats) - 0.5, color="black", linewidth=1.5)
            for i, row in enumerate(grid):
                for j, cell in enumerate(row):
                    axis.text(j, i, "-" if cell != cell else f"{cell:.0f}", ha="center", va="center", fontsize=8)
            axis.set_title(f"accuracy in percent, {fraction:.0%} of {CLIENTS} clients malicious")
        figure.savefig(path, dpi=110)
        plt.close(figure)

    what = "noise of MNIST's shape" if options.synthetic else "MNIST"
    found_out = Findings(
        title="Robust rules against attacks",
        setting=[
            f"{what}, {CLIENTS} clients by Dirichlet(1), all of them in each of {rounds} rounds, ten local steps with "
            "batches of 32 at learning rate 0.3. The default is judged on whole images (28 x 28, network 784-64-10); "
            "the tables of all rules are on images of 14 x 14 (means of four pixels, network 196-32-10), which makes "
            "them affordable. Malicious clients are the same in every round and see all honest updates. Every rule is "
            "told how many they are. Accuracy on the official test images after the last round, mean over seeds; a run "
            "that could not go on counts as 0, a cohort too small for a rule is `-`.",
            "`lying weight` claims a hundred, or a thousand million, times its examples for a flipped update; what is "
            "above the cap is left out, and rules other than the mean do not look at weights. The trigger is nine "
            "pixels in the last row. `fltrust` holds a hundred of the training images. `momentum` is client momentum "
            "with beta 0.9, which takes a few rounds to gather speed.",
            f"{len(found)} runs, {options.jobs} at a time.",
        ],
        tables=tables,
        remarks=remarks,
        passed=lost <= ALLOWED,
        numbers={
            "allowed": ALLOWED,
            "default": DEFAULT,
            "cells": [{k: None if v != v else v for k, v in (asdict(t) | asdict(o)).items()} for t, o in found.items()],
        },
        figures={"heat": draw},
    )
    return finish("robustness", found_out, quick=options.quick, out=options.out, arguments=arguments)


def _place(threats: Sequence[str] | dict[str, Any], row: Sequence[float], hostile: Sequence[str]) -> str:
    """Which attack is the worst of a row."""
    among = {a: v for a, v in zip(threats, row, strict=True) if a in hostile and v == v}
    return min(among, key=lambda a: among[a]) if among else "-"


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
