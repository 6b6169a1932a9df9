"""The figures in the recipes' READMEs: every method over several seeds, and on somebody who took no part.

Writes `results/recipes.md` and `.json`, and puts each recipe's tables between the two marks in its README.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402 - the path above comes first
from reporting import RESULTS, Findings, Table, finish, parser  # noqa: E402

from atoll.errors import DataError  # noqa: E402
from atoll.experiment import load_app  # noqa: E402
from atoll.report.html import interval as shown  # noqa: E402
from atoll.study import Study, interval, study  # noqa: E402

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BEGIN, END = "<!-- figures: benchmarks/recipes.py -->", "<!-- end of figures -->"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is run of a recipe.

    Attributes:
        arms: name -> settings of its experiment.
        metric: what is shown.
        baseline: the arm that the first one is compared with.
        quick: settings of a run of seconds.
        unseen: whether its experiment can leave one client out.
        many: whether there are too many clients for a row each.
        together: whether errors over all test examples together are told, beside a constant answer.
        holdout: whether there are test examples that are no client's.
    """

    arms: Mapping[str, Mapping[str, Any]]
    metric: str
    baseline: str
    quick: Mapping[str, Any] = field(default_factory=lambda: {"rounds": 1})
    unseen: bool = False
    many: bool = False
    together: bool = False
    holdout: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a recipe's runs gave.

    Attributes:
        study: of its arms.
        unseen: the federated model on each client that was left out, by seed.
        together: arm -> the metric over all test examples together, by seed.
        holdout: arm -> the metric of the global model on nobody's examples, by seed.
    """

    study: Study
    unseen: dict[str, list[float]] = field(default_factory=dict)
    together: dict[str, list[float]] = field(default_factory=dict)
    holdout: dict[str, list[float]] = field(default_factory=dict)


METHODS = ("personal", "federated", "alone", "pooled")
ALL: Mapping[str, Recipe] = {
    "iot": Recipe({m: {"method": m} for m in METHODS}, "accuracy", "alone", unseen=True),
    "voice": Recipe({m: {"method": m} for m in METHODS}, "accuracy", "alone", unseen=True),
    "recommendations": Recipe(
        {m: {"method": m} for m in ("federated", "means", "alone")}, "rmse", "means", many=True, together=True
    ),
    "vehicles": Recipe(
        {m: {"method": m} for m in (*METHODS, "pretrained")}, "accuracy", "alone", many=True, holdout=True
    ),
}


def run(name: str, seeds: Sequence[int], *, quick: bool) -> Found:
    """Run a recipe's arms with every seed, and without each client in turn where it can leave one out."""
    recipe, factory = ALL[name], load_app(RECIPES / name / "app.py")
    more = dict(recipe.quick) if quick else {}
    unseen, together, holdout = (dict[str, list[float]]() for _ in range(3))

    def ran(arm: str, seed: int, result: Any) -> None:
        print(f"{name}, seed {seed}, {arm}: {len(result.history)} rounds", file=sys.stderr, flush=True)
        if recipe.together:
            data: Any = factory(seed=seed).data
            value = result.evaluate(data, personal=True).metrics[recipe.metric]
            together.setdefault(arm, []).append(value)
            if arm == first:
                stars, mean = data.test.fields["y"].double(), data.train.fields["y"].double().mean()
                together.setdefault("mean rating", []).append(float((stars - mean).square().mean().sqrt()))
        if recipe.holdout:
            holdout.setdefault(arm, []).append(result.history[-1].holdout[recipe.metric])

    first = next(iter(recipe.arms))
    arms = {arm: {**settings, **more} for arm, settings in recipe.arms.items()}
    if quick:
        arms = {arm: arms[arm] for arm in (first, recipe.baseline)}
    found = study(factory, arms, seeds, on_run=ran)
    if recipe.unseen:
        for seed in seeds:
            everyone = factory(seed=seed).data
            for client in everyone.clients[:1] if quick else everyone.clients:
                experiment = factory(method="federated", without=client, seed=seed, **more)
                result = experiment.simulate(progress=False, evaluate_every=0)
                value = result.evaluate(everyone.select([client])).metrics[recipe.metric]
                unseen.setdefault(client, []).append(value)
            print(f"{name}, seed {seed}, each client left out", file=sys.stderr, flush=True)
    return Found(found, unseen, together, holdout)


def tables(name: str, made: Found) -> list[Table]:
    """A recipe's tables, client by client or over all of them."""
    recipe, found, unseen = ALL[name], made.study, made.unseen
    first, metric = found.arms[0], recipe.metric
    columns = ["", *found.arms, f"{first} − {recipe.baseline}", *(["who took no part"] if unseen else [])]

    def row(label: str, client: str | None) -> list[str]:
        cells = [shown(found.interval(a, metric, client)) for a in found.arms]
        change = shown(found.difference(first, recipe.baseline, metric, client), sign=True)
        if not unseen:
            return [label, *cells, change]
        of = (
            list(unseen.get(client, ()))
            if client
            else [math.fsum(v) / len(v) for v in zip(*unseen.values(), strict=True)]
        )
        return [label, *cells, change, shown(interval(of, overlap=found.overlap)) if of else ""]

    rows = [] if recipe.many else [row(c, c) for c in found.clients]
    out = [Table(f"{name}: {metric} on test examples", columns, [*rows, row("mean over clients", None)])]
    for title, values in (("all test examples together", made.together), ("the official test", made.holdout)):
        if values:
            line = [shown(interval(v, overlap=found.overlap)) for v in values.values()]
            out.append(Table(f"{name}: {metric}, {title}", ["", *values], [[title, *line]]))
    return out


def written(readme: str, shown_tables: Sequence[Table], caution: str) -> str:
    """A README with these tables between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n\n".join(str(t) for t in shown_tables)
    return f"{before}{BEGIN}\n{body}\n\n{caution}\n{END}{after}"


def recorded(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What earlier runs recorded of recipes other than these."""
    file = RESULTS / "recipes.json"
    known = json.loads(file.read_text())["recipes"] if file.exists() else {}
    return {name: of for name, of in known.items() if name not in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipes asked for; what is recorded of the others stays."""
    line = parser(__doc__ or "", seeds=(1, 2, 3))
    line.add_argument("--recipes", nargs="+", choices=list(ALL), default=list(ALL), help="which")
    given = line.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    final = not given.quick and given.out is None
    numbers: dict[str, dict[str, Any]] = recorded(given.recipes) if final else {}
    remarks = [f"Of an earlier run: {', '.join(numbers)}."] if numbers else []
    try:
        for name in given.recipes:
            try:
                found = run(name, given.seeds[:1] if given.quick else given.seeds, quick=given.quick)
            except DataError as error:
                remarks.append(f"{name} was left out: {error}")
                continue
            made = tables(name, found)
            numbers[name] = {
                "arms": {a: of[ALL[name].metric] for a, of in found.study.values.items()},
                "unseen": found.unseen, "together": found.together, "holdout": found.holdout,
                "tables": [asdict(table) for table in made],
            }  # fmt: skip
            if final:
                file = RECIPES / name / "README.md"
                file.write_text(
                    written(file.read_text(encoding="utf-8"), made, " ".join(found.study.cautions())), "utf-8"
                )
    finally:
        torch.set_num_threads(threads)
    remarks.append(
        "The settings are those of each recipe's `app.py`. Those of recommendations were chosen on the test of seed 0, "
        "which is not among these; the others' were not tuned. The ridge and size of vehicles' pretrained "
        "network are those of `transfer.py`, kept after others were looked at on the test of seed 7."
    )
    return finish(
        "recipes",
        Findings(
            "The recipes' figures",
            ["Every method of every recipe, seed by seed: what each client's own test examples say."],
            [Table(**table) for name in ALL if name in numbers for table in numbers[name]["tables"]],
            remarks,
            passed=bool(numbers),
            numbers={"recipes": numbers},
        ),
        quick=given.quick,
        out=given.out,
        arguments=arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
