"""`atoll run`: an app file's experiment, in a directory of its own."""

import itertools
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from atoll.cli.guard import INTERRUPTED, console, say
from atoll.cli.recipes import recipe_names, recipe_path
from atoll.errors import Interrupted, InvalidArgument, NonFiniteError, invalid

if TYPE_CHECKING:
    from atoll.experiment import Experiment
    from atoll.result import Result

LISTED = 20
"""Clients in the final table; of more, their spread is shown."""


def run(
    app: str,
    *,
    settings: Sequence[str],
    data: str | None,
    directory: Path | None,
    resume: bool,
    engine: str,
    report: bool,
    quiet: bool,
) -> None:
    """Run an app; see `atoll run --help`."""
    if resume and directory is None:
        raise invalid("--resume", True, "given with --directory", "Name the run to continue; `atoll runs` lists them.")
    path = app_path(app)
    experiment = build(path, parsed(settings), data)
    folder = directory if directory is not None else new_directory(_name(path))
    again = _command(app, settings=settings, data=data, directory=folder, engine=engine, report=report, quiet=quiet)
    try:
        result = experiment.simulate(
            directory=folder,
            resume=resume,
            engine=engine,
            progress=False if quiet else "auto",
            title=experiment.title or _name(path),
        )
    except Interrupted as error:
        where = error.result.history[-1].round if error.result is not None and error.result.history else 0
        say(f"stopped after round {where} of {experiment.rounds}. Continue with:", "yellow")
        say(f"  {again}")
        raise typer.Exit(INTERRUPTED) from None
    except KeyboardInterrupt:
        if (folder / "journal.sqlite").exists():
            say("stopped in the middle of a round, which will be done again. Continue with:", "yellow")
            say(f"  {again}")
            raise typer.Exit(INTERRUPTED) from None
        raise
    except NonFiniteError:
        say(
            f"The rounds before it are in {folder}; look at them with: atoll report {shlex.quote(str(folder))}",
            "yellow",
        )
        raise
    page = result.report(folder / "report.html") if report and result.history else None
    if quiet:
        typer.echo(str(folder))
        return
    show_clients(result)
    show_refused(result)
    out = console()
    out.print(f"run     {folder}", markup=False, soft_wrap=True)
    if page is not None:
        out.print(f"report  {page}", markup=False, soft_wrap=True)


def run_over_sites(
    app: str,
    sites: int,
    *,
    settings: Sequence[str],
    data: str | None,
    directory: Path | None,
    engine: str,
    quiet: bool,
) -> None:
    """Run an app over sites on this machine; see `atoll run --help`."""
    from atoll.cli.local import over_sites
    from atoll.data import FederatedDataset
    from atoll.deployment.prepare import experiment_of
    from atoll.result import Result

    path, given = app_path(app), parsed(settings)
    experiment_of(path, given)
    experiment = build(path, given, data)
    if not isinstance(experiment.data, FederatedDataset):
        raise invalid("--sites", sites, "left out without data", "Give the table with --data PATH.")
    clients = list(experiment.data.clients)
    if len(clients) != sites:
        raise invalid("--sites", sites, f"{len(clients)}, the number of clients in the data: each is a site")
    folder = directory if directory is not None else new_directory(_name(path))
    if folder.exists() and any(folder.iterdir()):
        raise invalid("--directory", str(folder), "a folder that is empty or does not exist")
    tell = (lambda line: None) if quiet else (lambda line: console().print(line, markup=False, soft_wrap=True))
    view = over_sites(
        folder, path, run="run", settings=given, data=data, clients=clients, engine=engine, tell=tell
    )  # fmt: skip
    where = folder / "server" / "runs" / "run"
    if quiet:
        typer.echo(str(where))
    elif view.phase == "finished":
        result = Result.load(where, experiment.model)
        if experiment.data.has("test"):
            found = result.evaluate(experiment.data)
            told = ", ".join(f"{n} {v:.4g}" for n, v in found.metrics.items())
            console().print(f"test, all examples: {told}", markup=False, soft_wrap=True)
        console().print(f"run     {where}", markup=False, soft_wrap=True)
    if view.phase != "finished":
        raise typer.Exit(1)


def app_path(app: str) -> Path:
    """The file of an app: a path, or the name of a recipe.

    Raises:
        InvalidArgument: neither exists.
    """
    path = Path(app)
    if path.is_dir() and (path / "app.py").is_file():
        return path / "app.py"
    if path.is_file():
        return path
    if app in recipe_names():
        return recipe_path(app)
    names = ", ".join(recipe_names())
    raise invalid("APP", app, "the path of a Python file that defines experiment()", f"Or a recipe: {names}.")


def parsed(settings: Sequence[str]) -> dict[str, str]:
    """`name=value` texts as a mapping.

    Raises:
        InvalidArgument: one has no `=` or no name, or a name is given twice.
    """
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise invalid("--set", setting, "of the form name=value, such as rounds=20")
        if name in found:
            raise invalid("--set", setting, f"given once for {name}")
        found[name] = value
    return found


def build(path: Path, settings: Mapping[str, str], data: str | None) -> "Experiment":
    """An app's experiment, over the data named on the command line if there is any.

    An app that has to see its data before it can build its model takes a parameter `data`; others bring a recipe
    (`atoll.table`) that is bound to it.
    """
    from atoll.experiment import configure, load_app, parameters

    factory = load_app(path)
    if data is not None and "data" in parameters(factory):
        if "data" in settings:
            raise InvalidArgument("data is given twice: with --data and with --set data=. Leave one out.")
        return configure(factory, {**settings, "data": data})
    experiment = configure(factory, settings)
    return experiment if data is None else experiment.bind(data)


def show_clients(result: "Result") -> None:
    """Print the final metrics of every client, or their spread where there are many."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from atoll.report.numbers import amount, last_evaluated, words

    record = last_evaluated(result.history)
    if record is None:
        console().print(f"loss {amount(result.history[-1].loss)}; nothing was evaluated.")
        return
    out = console()
    names = {"personal": "own model", "global": "global model"}
    kinds = {k: names[k] for k in names if k in result.clients}
    metrics = list(dict.fromkeys(m for of in result.clients.values() for values in of.values() for m in values))
    if result.clients and len(next(iter(result.clients.values()))) <= LISTED:
        table = Table(title=Text(f"{result.spec.get('title') or 'run'}, test examples"), title_justify="left")
        table.add_column("client")
        for kind in kinds:
            for metric in metrics:
                table.add_column(words(metric) + (f"\n{kinds[kind]}" if len(kinds) > 1 else ""), justify="right")
        for client in next(iter(result.clients.values())):
            cells = [amount(result.clients[k][client].get(m)) for k in kinds for m in metrics]
            table.add_row(Text(client), *cells)
        overall = [amount((record.personal if k == "personal" else record.test).get(m)) for k in kinds for m in metrics]
        table.add_section()
        table.add_row("all examples", *overall, style="bold")
        out.print(table)
        _show_notes(record.notes)
        return
    title = Text(f"{result.spec.get('title') or 'run'}, after round {record.round}: all examples, and over clients")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "all examples", "mean", "worst decile", "std", "undefined"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for part, values, spread in (
        ("test", record.test, record.spread), ("own models", record.personal, record.personal_spread),
        ("validation", record.validation, {}), ("holdout", record.holdout, {}),
    ):  # fmt: skip
        for name, value in values.items():
            over = spread.get(name, {})
            undefined = over.get("undefined", math.nan)
            cells = [amount(over.get(k)) for k in ("mean", "worst_decile", "std")]
            table.add_row(
                f"{part} {words(name)}", amount(value), *cells, f"{undefined:.0f}" if math.isfinite(undefined) else ""
            )
    out.print(table)
    _show_notes(record.notes)


def show_refused(result: "Result") -> None:
    """Print whose updates had no part in rounds, how often and why; nothing where everybody's had."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from atoll.report.html import refused_sheet

    sheet = refused_sheet(result.history)
    if sheet is None:
        return
    table = Table(title=Text("refused updates"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in sheet.columns:
        table.add_column(
            column, justify="left" if column in ("client", "reason") else "right", no_wrap=column != "reason"
        )
    for row in sheet.rows[:LISTED]:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)
    left = len(sheet.rows) - LISTED
    _show_notes([sheet.note, *([f"{left:,} more clients are in the report."] if left > 0 else [])])


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        say(note, "dim")


def new_directory(name: str, folder: Path = Path("runs")) -> Path:
    """A run directory that does not exist yet, named after the app and the time."""
    base = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    others = (folder / f"{base}-{number}" for number in itertools.count(2))
    return next(path for path in itertools.chain([folder / base], others) if not path.exists())


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.name == "app.py" else path.stem


def _command(
    app: str, *, settings: Sequence[str], data: str | None, directory: Path, engine: str, report: bool, quiet: bool
) -> str:
    words = ["atoll", "run", app]
    for setting in settings:
        words += ["--set", setting]
    if data is not None:
        words += ["--data", data]
    if engine != "auto":
        words += ["--engine", engine]
    if not report:
        words.append("--no-report")
    if quiet:
        words.append("--quiet")
    return shlex.join([*words, "--directory", str(directory), "--resume"])
