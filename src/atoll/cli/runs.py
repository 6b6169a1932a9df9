"""`atoll runs`, `atoll report` and `atoll compare`: looking at what ran."""

from collections.abc import Sequence
from pathlib import Path

from atoll.cli.guard import console
from atoll.errors import AtollError, RunError, invalid
from atoll.report.numbers import UNDEFINED, amount, headline, last_evaluated, metric_names, words
from atoll.report.runs import Run, read_run

_STYLES = (("finished", "green"), ("running", "cyan"), ("interrupted", "yellow"), ("failed", "red"), ("damaged", "red"))


def runs(directory: Path) -> None:
    """List the runs in a folder; see `atoll runs --help`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from atoll.report.html import moment

    if not directory.is_dir():
        raise RunError(
            f"{directory} is not a folder: start a run with `atoll run APP`, or name the folder of your runs."
        )
    folders = [p for p in [directory, *directory.iterdir()] if is_run(p)]
    out = console()
    if not folders:
        out.print(f"{directory} holds no runs.", markup=False)
        return
    rows: list[tuple[float, tuple[str, str, str, str, str, str]]] = []
    for folder in folders:
        try:
            run = read_run(folder)
        except AtollError as error:
            rows.append((folder.stat().st_mtime, (folder.name, "damaged", "", "", "", str(error))))
            continue
        rounds = f"{run.history[-1].round:,}" if run.history else "0"
        if run.planned is not None and run.state != "finished":
            rounds = f"{rounds} of {run.planned:,}"
        when = moment(run.began) if run.began is not None else UNDEFINED
        rows.append((run.began or 0.0, (folder.resolve().name, run.state, rounds, last_metric(run), when, run.name)))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "state", "rounds", "last metric", "began", "title"):
        justify, whole = ("right" if column == "rounds" else "left"), column in ("run", "state")
        table.add_column(column, justify=justify, overflow="fold", no_wrap=whole)
    for _, (name, state, *rest) in sorted(rows, key=lambda row: -row[0]):
        table.add_row(Text(name), Text(state, style=dict(_STYLES).get(state, "")), *(Text(cell) for cell in rest))
    out.print(table)


def report(run: Path, out: Path | None) -> None:
    """Write a page about a run; see `atoll report --help`."""
    from atoll.report.html import report_run

    page = report_run(run, out if out is not None else run / "report.html")
    console().print(str(page), markup=False, soft_wrap=True)


def compare(directories: Sequence[Path], out: Path | None, *, metric: str | None) -> None:
    """Put runs side by side; see `atoll compare --help`."""
    from rich.table import Table
    from rich.text import Text

    from atoll.report.html import comparison_sheet, write_comparison
    from atoll.report.plot import plot_comparison
    from atoll.spec import differences

    if len(directories) < 2:
        raise invalid("RUN", [str(d) for d in directories], "two run directories or more")
    if out is not None and out.suffix.lower() not in (".html", ".png", ".svg", ".pdf"):
        raise invalid("--out", str(out), "the name of a .html, .png, .svg or .pdf file")
    named = dict(zip(_names(directories), map(read_run, directories), strict=True))
    first, *others = named
    lines = {
        name: differences(named[first].spec.get("experiment"), named[name].spec.get("experiment")) for name in others
    }
    sheet = comparison_sheet(named)
    table = Table()
    for place, column in enumerate(sheet.columns):
        table.add_column(Text(column), justify="right" if place else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))
    printer = console()
    printer.print(table)
    for name, differing in lines.items():
        printer.print(f"{name}, against {first}:", markup=False, style="bold", soft_wrap=True)
        for line in differing or ["the same experiment"]:
            printer.print(f"  {line}", markup=False, soft_wrap=True)
    if out is None:
        return
    if out.suffix.lower() == ".html":
        write_comparison(named, lines, out)
    else:
        histories = {name: run.history for name, run in named.items()}
        every = metric_names(r for history in histories.values() for r in history)
        plot_comparison(histories, metric or (every[0] if every else "train_loss"), out)
    printer.print(str(out), markup=False, soft_wrap=True)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return path.is_dir() and ((path / "journal.sqlite").exists() or (path / "result.json").exists())


def last_metric(run: Run) -> str:
    """The metric to look at first, of the newest evaluation."""
    record = last_evaluated(run.history)
    if record is None:
        return f"loss {amount(run.history[-1].loss)}" if run.history else UNDEFINED
    found = headline(record)
    assert found is not None
    part, name, value = found
    return f"{part} {words(name)} {amount(value)}"


def _names(directories: Sequence[Path]) -> list[str]:
    """Short names that are all different."""
    short = [d.resolve().name for d in directories]
    if len(set(short)) == len(short):
        return short
    full = [str(d) for d in directories]
    if len(set(full)) != len(full):
        raise invalid("RUN", full, "different run directories")
    return full
