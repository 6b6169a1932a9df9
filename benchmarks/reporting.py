"""What the benchmarks share: their command line, the machine, intervals, tables, and the files a result is kept in."""

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atoll.bench.figures import cpu
from atoll.bench.figures import interval as interval  # what the benchmarks take from here

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a result.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: cells as text, one row after the other.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        shown.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(shown)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a benchmark found out.

    Attributes:
        title: of the page.
        setting: what was run, in paragraphs of markdown.
        tables: what came out.
        remarks: what a reader should know, one paragraph each.
        passed: whether what the benchmark holds Atoll to was met.
        numbers: everything measured, as JSON values.
        figures: name of each picture and a function that draws it to a path.
    """

    title: str
    setting: Sequence[str]
    tables: Sequence[Table]
    remarks: Sequence[str]
    passed: bool
    numbers: Mapping[str, Any]
    figures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)


def parser(description: str, *, seeds: Sequence[int] = ()) -> argparse.ArgumentParser:
    """The command line every benchmark has.

    Args:
        description: what it measures.
        seeds: the default of `--seeds`; empty where there is nothing to repeat.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a run of seconds that shows that everything works")
    made.add_argument(
        "--out",
        type=Path,
        help="where to write, without suffix: .md, .json, -*.png; a quick run writes nothing by default",
    )
    if seeds:
        made.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="seeds to repeat the runs with")
    return made


def machine() -> dict[str, str]:
    """The machine and the versions that a measurement depends on."""
    import torch

    import atoll

    return {
        "CPU": f"{cpu()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f} processes at work in the last minute, this one included",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "atoll": atoll.__version__,
    }


def processor_minutes() -> float:
    """What this process and the children it has waited for have used of all processors so far, in minutes.

    Unlike the time on the wall it does not depend on what else the machine does.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used) / 60


def finish(name: str, found: Findings, *, quick: bool, out: Path | None, arguments: Sequence[str] | None) -> int:
    """Print what was found and write it down.

    Args:
        name: of the benchmark.
        found: what came out.
        quick: whether it was a quick run, whose figures mean nothing and are only written where `out` says so.
        out: path without suffix; default `benchmarks/results/NAME`.
        arguments: the command line, default the process's own.

    Returns:
        The exit status: 1 when a full run does not meet what the benchmark holds Atoll to.
    """
    for table in found.tables:
        print(f"\n{table.title}\n\n{table}")
    print("\n" + "\n\n".join(found.remarks))
    stem = out or (None if quick else RESULTS / name)
    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        given = list(sys.argv[1:] if arguments is None else arguments)
        context = {
            **machine(),
            "command": shlex.join(["python", f"benchmarks/{name}.py", *_shown(given)]),
            "date": datetime.date.today().isoformat(),
        }
        drawn: list[str] = []
        for figure, draw in found.figures.items():
            drawn.append(f"{stem.name}-{figure}.png")
            draw(stem.with_name(drawn[-1]))
        stem.with_suffix(".json").write_text(
            json.dumps({"context": context, "quick": quick, "passed": found.passed, **found.numbers}, indent=1) + "\n"
        )
        stem.with_suffix(".md").write_text(_page(found, context, drawn, quick))
        print(f"\nWritten: {stem}.md, {stem}.json" + "".join(f", {picture}" for picture in drawn))
    return 0 if found.passed or quick else 1


def pyplot() -> Any:
    """matplotlib, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _page(found: Findings, context: Mapping[str, str], pictures: Sequence[str], quick: bool) -> str:
    parts = [f"# {found.title}"]
    if quick:
        parts.append("**A quick run: it shows that the script works; its figures mean nothing.**")
    parts += found.setting
    for table in found.tables:
        parts += [f"## {table.title}", str(table)]
    parts += found.remarks
    parts += [f"![{picture}]({picture})" for picture in pictures]
    parts += ["## Where and when", "\n".join(f"- {key}: {value}" for key, value in context.items())]
    return "\n\n".join(parts) + "\n"


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command line as a page tells it: without where it wrote, and of files of the machine their names alone."""
    return [Path(a).name if Path(a).is_absolute() else a for a in _without_out(arguments)]


def _without_out(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--out" and not argument.startswith("--out="):
            kept.append(argument)
        skip = argument == "--out"
    return kept
