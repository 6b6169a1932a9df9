"""The commands, and what each takes; the work is done by the module of the same name."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.guard import Debug, guarded

app = typer.Typer(
    name="atoll",
    help="Federated learning over data that stays with its owners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        import atoll

        typer.echo(f"atoll {atoll.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Federated learning over data that stays with its owners."""


@app.command()
@guarded
def demo(
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Divisions into training and test, one run of each arm.")
    ] = 5,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each run; default the recipe's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table, the picture and the report.")] = Path("atoll-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and few rounds, to see that it works.")] = False,
    debug: Debug = False,
) -> None:
    """What federation brings four hospitals: each alone, federated, and all data pooled, side by side."""
    from atoll.cli.demo import demo as show

    show(seeds=2 if quick else seeds, rounds=(rounds or 5) if quick else rounds, out=out)


@app.command()
@guarded
def run(
    app: Annotated[str, typer.Argument(metavar="APP", help="Path of an app.py, or the name of a recipe.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the app; repeat for more.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The table the app's data recipe is bound to.")] = None,
    directory: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --directory.")] = False,
    engine: Annotated[str, typer.Option(help='"auto", "vectorized", "ray" or "loop".')] = "auto",
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the directory.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the run directory and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Run an experiment that an app file defines."""
    from atoll.cli.run import run as start

    start(
        app, settings=settings or [], data=data, directory=directory, resume=resume, engine=engine, report=report,
        quiet=quiet,
    )  # fmt: skip


@app.command()
@guarded
def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds run directories.")] = Path(
        "runs"
    ),
    debug: Debug = False,
) -> None:
    """List runs: state, rounds, last metric."""
    from atoll.cli.runs import runs as show

    show(directory)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="The page; default report.html in the run directory.")] = None,
    debug: Debug = False,
) -> None:
    """Write a page about a run."""
    from atoll.cli.runs import report as write

    write(run, out)


@app.command()
@guarded
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories, two or more.")],
    out: Annotated[Path | None, typer.Option(help="A page (.html) or a picture (.png, .svg, .pdf).")] = None,
    metric: Annotated[str | None, typer.Option(help="What a picture shows; default the first metric.")] = None,
    debug: Debug = False,
) -> None:
    """Put runs side by side: final metrics, and where they differ."""
    from atoll.cli.runs import compare as show

    show(runs, out, metric=metric)


@app.command()
@guarded
def data(
    name: Annotated[str | None, typer.Argument(help="A data set; default: list them.")] = None,
    debug: Debug = False,
) -> None:
    """The data sets that come with Atoll or are fetched by name."""
    from atoll.cli.data import data as show

    show(name)


@app.command()
@guarded
def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Option(metavar="W1,W2...", help="W1 to W6, W4E, N1 to N6; repeat or separate by commas. [W1,W2,W3]"),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to time; default the workload's own.")] = None,
    workers: Annotated[str, typer.Option(help='A number of processes, or "auto".')] = "auto",
    engine: Annotated[str, typer.Option(help='"auto", "vectorized", "ray" or "loop".')] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Two rounds of smaller workloads, to see that it works.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Time Atoll's part of the speed benchmark on this machine, beside the figures that were recorded."""
    from atoll.cli.bench import bench as measure

    measure(workloads or ["W1", "W2", "W3"], rounds=rounds, workers=workers, engine=engine, quick=quick)
