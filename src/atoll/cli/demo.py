"""`atoll demo`: what federation brings four hospitals, measured."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.cli.guard import console
from atoll.cli.recipes import recipe_path

if TYPE_CHECKING:
    from atoll.result import Result
    from atoll.study import Study

ARMS = (("alone", "alone"), ("federated", "federated"), ("pooled", "pooled"))
"""Each arm's name and the recipe's method; pooling is what the hospitals cannot do, the yardstick."""

TITLE = "Four hospitals, one model: what federation brought"


def demo(*, seeds: int, rounds: int | None, out: Path) -> None:
    """Run the study of the healthcare recipe and write what it found; see `atoll demo --help`."""
    began = time.perf_counter()
    study = healthcare_study(range(seeds), rounds=rounds)
    show(study)
    written = write(study, out)
    console().print(
        f"{len(study.arms) * len(study.seeds)} runs in {time.perf_counter() - began:.1f} s. Written: "
        + ", ".join(map(str, written)),
        markup=False,
        soft_wrap=True,
    )


def healthcare_study(seeds: "range | list[int]", *, rounds: int | None = None) -> "Study":
    """Heart disease at four hospitals: each alone, federated, and all patients pooled.

    Args:
        seeds: each divides the patients anew and starts training from other values.
        rounds: of each run; default the recipe's own.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from atoll.experiment import load_app
    from atoll.study import study

    # The model is so small that more threads only wait for each other.
    torch.set_num_threads(1)
    factory = load_app(recipe_path("healthcare"))
    chosen = {} if rounds is None else {"rounds": rounds}
    arms = {arm: {"method": method, **chosen} for arm, method in ARMS}
    live = sys.stderr.isatty()
    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not live, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("heart disease", total=len(arms) * len(seeds))

        def ran(arm: str, seed: int, result: "Result") -> None:
            bar.update(task, advance=1, description=f"heart disease, seed {seed}, {arm}")
            if not live:
                print(f"seed {seed}  {arm}  {len(result.history)} rounds", file=sys.stderr, flush=True)

        return study(factory, arms, list(seeds), on_run=ran)


def show(study: "Study") -> None:
    """Print a study's table and what it says in words."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from atoll.report.html import interval
    from atoll.report.numbers import words

    out = console()
    for metric in study.metrics:
        if metric == "loss":
            continue
        title = (
            f"{words(metric)} on each hospital's test patients: mean of {len(study.seeds)} seeds\n"
            f"± half of the {study.confidence:.0%} interval; difference is federated − alone"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("hospital")
        for arm in study.arms:
            table.add_column(arm, justify="right")
        table.add_column("difference", justify="right")
        for client in [*study.clients, None]:
            cells = [interval(study.interval(arm, metric, client)) for arm in study.arms]
            change = study.difference("federated", "alone", metric, client)
            style = "green" if change.low > 0 else "red" if change.high < 0 else ""
            if client is None:
                table.add_section()
            table.add_row(Text(client or "mean"), *cells, Text(interval(change, sign=True), style=style))
        out.print(table)
    for verdict in study.verdicts("federated", "alone"):
        mark = {"better": "[green]▲[/green]", "worse": "[red]▼[/red]", "mixed": "[yellow]◆[/yellow]"}.get(
            verdict.kind, "○"
        )
        out.print(mark, Text(verdict.text), soft_wrap=False)
    out.print()


def write(study: "Study", folder: Path) -> list[Path]:
    """Write a study's values, picture and page into a folder; returns the files."""
    from atoll.report import plot_client_panels, write_study

    folder.mkdir(parents=True, exist_ok=True)
    panels = {metric: study.table(metric) for metric in study.metrics if metric != "loss"}
    pictures = [folder / "hospitals.png", folder / "hospitals.svg"]
    for picture in pictures:
        plot_client_panels(panels, picture, title="Heart disease at four hospitals")
    page = write_study(
        study,
        folder / "report.html",
        title=TITLE,
        arm="federated",
        baseline="alone",
        introduction=(
            "Four hospitals want to tell from 13 measurements whether a patient has heart disease, and none may hand "
            "out its patients' records. The same logistic regression is trained three ways: by each hospital alone; "
            "federated, where only models travel; and with all patients pooled in one place, the yardstick that "
            "privacy forbids. Every model is judged on each hospital's own test patients.",
        ),
        cautions=(
            "The hyper-parameters were fixed beforehand and are the same in all arms; none was tuned on test patients.",
            "Switzerland has 8 healthy patients of 123, so 2 or 3 of them are in a test: its AUC rests on them.",
            "UCI Heart Disease: Janosi, Steinbrunn, Pfisterer and Detrano 1989, doi:10.24432/C52P4X, CC BY 4.0.",
        ),
    )
    return [page, *pictures, study.save(folder / "study.json")]
