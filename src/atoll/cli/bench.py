"""`atoll bench`: Atoll's own part of the speed benchmark on this machine, beside the figures that were recorded."""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from atoll.cli.guard import console, say
from atoll.errors import invalid, unknown

if TYPE_CHECKING:
    from atoll.bench.figures import Figure, Recorded
    from atoll.bench.workloads import Workload

QUICK_ROUNDS = 2


def bench(workloads: Sequence[str], *, rounds: int | None, workers: str, engine: str, quick: bool) -> None:
    """Time workloads and print them beside the recorded figures; see `atoll bench --help`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from atoll.bench import figures
    from atoll.bench.workloads import ROUNDS, WORKLOADS, smaller

    names = [name for given in workloads for name in given.replace(",", " ").split()]
    for name in names or [""]:
        if name not in WORKLOADS:
            raise unknown("--workloads", name, tuple(WORKLOADS))
    count = workers_of(workers)
    recorded = None if quick else figures.read()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    beside = () if recorded is None else ("recorded", "ratio", "by hand there")
    for column in ("workload", "ms per round", *beside, "workers"):
        table.add_column(column, justify="left" if column == "workload" else "right", no_wrap=True)
    table.add_column("path", overflow="fold")
    asked, missing = arguments(engine, workers), list[str]()
    for name in dict.fromkeys(names):
        load = smaller(WORKLOADS[name]) if quick else WORKLOADS[name]
        say(f"{load} ...", "dim")
        seconds, found = timed(load, rounds or (QUICK_ROUNDS if quick else ROUNDS[name]), engine, count)
        low, high = figures.interval(seconds)
        middle = statistics.median(seconds)
        cells = list[str]()
        if recorded is not None:
            own, hand = compared(recorded, load, asked)
            cells = [
                "" if own is None else spread(own.milliseconds),
                "" if own is None else f"{1e3 * middle / own.milliseconds[0]:.2f}",
                "" if hand is None else f"{hand.milliseconds[0]:.1f}",
            ]
            if own is None or own.arguments != asked:
                missing.append(name)
        times = spread((1e3 * middle, 1e3 * low, 1e3 * high))
        table.add_row(name, times, *cells, str(found.get("workers", 1)), Text(path(found)))
    out = console()
    out.print(table)
    here = f"{figures.cpu()}, {os.cpu_count()} cores, torch {version('torch')}"
    out.print(f"here      {here}", markup=False, soft_wrap=True)
    for line in remarks(recorded, missing, quick=quick):
        out.print(line, markup=False, soft_wrap=True)


def timed(
    load: "Workload", rounds: int, engine: str, workers: int | Literal["auto"]
) -> tuple[list[float], Mapping[str, Any]]:
    """Seconds of each timed round of a workload, and which path ran.

    W5, an experiment that was published as a whole, is one run without a warm-up, as where the figures come from.
    """
    from atoll.bench.timing import played
    from atoll.bench.workloads import WARMUP, cohort, examples

    whole = load.name == "W5"
    warmup = 0 if whole else WARMUP
    seconds, began = list[float](), [0.0]

    def start() -> None:
        began[0] = time.perf_counter()

    def stop() -> None:
        now = time.perf_counter()
        seconds.append(now - began[0])
        began[0] = now

    cohorts = [cohort(load, i).tolist() for i in range(warmup + rounds)]
    with played(
        load, examples(load), cohorts, start=start, stop=stop, whole=whole, engine=engine, workers=workers
    ) as found:
        return seconds[warmup:], found.engine


def arguments(engine: str, workers: str) -> tuple[str, ...]:
    """How a recorded contestant with these options was called."""
    made = () if engine in ("auto", "vectorized") else ("--engine", engine)
    return made if workers == "auto" else (*made, "--workers", workers)


def compared(recorded: "Recorded", load: "Workload", asked: tuple[str, ...]) -> tuple["Figure | None", "Figure | None"]:
    """The recorded figures of Atoll, called alike where it was and else as it chooses, and of the best code by hand."""
    what = str(load)
    return recorded.atoll(what, asked) or recorded.atoll(what), recorded.best(what, "hand")


def remarks(recorded: "Recorded | None", missing: Sequence[str], *, quick: bool) -> list[str]:
    """What a reader should know about the numbers."""
    if quick:
        return ["A quick run, of smaller workloads: it shows that everything works; its figures mean nothing."]
    lines = ["Milliseconds: the median over rounds after a warm-up, and its 95 % interval over rounds."]
    if recorded is None:
        lines.append("No figures are recorded in this version: there is nothing to compare with.")
        return lines
    context = recorded.context
    lines.insert(0, f"recorded  {context['CPU']}, torch {context['torch']}, {context['date']}: {context['command']}")
    lines.append(
        "Ratio: milliseconds here over milliseconds recorded, which says how fast this machine is as much as anything. "
        "Only ratios of one machine compare programs: by hand there is the fastest code written by hand for the "
        "workload, on the machine of the recorded figures. benchmarks/speed/run.py in the repository races them here."
    )
    if missing:
        lines.append(
            f"Not recorded with these options: {', '.join(missing)}; compared with Atoll's own choice, if any."
        )
    return lines


def spread(milliseconds: Sequence[float]) -> str:
    """A median and its interval."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*milliseconds)


def path(engine: Mapping[str, Any]) -> str:
    """Which path ran, in a few words."""
    tile = engine.get("tile", 1)
    return f"{engine['engine']}, {engine['strategy']}" + (f", {tile} in a tile" if tile > 1 else "")


def workers_of(given: str) -> int | Literal["auto"]:
    """The number of workers meant by a text.

    Raises:
        InvalidArgument: it is neither "auto" nor a number of at least 1.
    """
    if given == "auto":
        return "auto"
    if not given.isdecimal() or int(given) < 1:
        raise invalid("--workers", given, '"auto" or a number of at least 1')
    return int(given)
