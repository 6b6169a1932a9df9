"""Progress while a run is at work: a live bar in a terminal, a line for each round elsewhere."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal

from atoll.errors import invalid
from atoll.history import Record
from atoll.report.numbers import amount, headline, rate, span, words

REFRESH_SECONDS = 0.15
"""A live bar is redrawn at most this often, however short the rounds are."""

_WINDOW = 200

Show = Callable[[Record], None]


@contextmanager
def progress_for(progress: bool | Literal["auto"], total: int, done: int, title: str) -> Generator[Show]:
    """Show how a run gets on, on standard error.

    Args:
        progress: True and "auto": a bar in a terminal, a line for each round elsewhere; False: nothing.
        total: rounds of the whole run.
        done: rounds it already has, for instance before it was resumed.
        title: what is shown before the bar.

    Yields:
        A callable that takes the record of each finished round.

    Raises:
        InvalidArgument: `progress` is something else.
    """
    if progress not in (True, False, "auto"):
        raise invalid("progress", progress, 'True, False or "auto"')
    if progress is False:
        yield _nothing
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(total, done, title) as show:
            yield show
    else:
        yield _lines(total, done)


def line_for(record: Record, total: int, pace: float) -> str:
    """One line about a round.

    Args:
        record: of the round.
        total: rounds of the whole run.
        pace: rounds a second; 0 when it is not known.
    """
    parts = [f"round {record.round:>{len(str(total))}}/{total}", f"loss {amount(record.loss)}"]
    found = headline(record)
    if found is not None:
        part, name, value = found
        parts.append(f"{part} {words(name)} {amount(value)}")
    if record.refusals:
        parts.append(f"{record.refusals:,} refused")
    if record.epsilon is not None:
        parts.append(f"epsilon {amount(record.epsilon)}")
    parts.append(span(sum(record.seconds.values())))
    if pace > 0:
        parts.append(rate(pace))
    return "  ".join(parts)


def _nothing(_record: Record) -> None:
    """Show nothing."""


class _Pace:
    """Rounds a second over the latest rounds, by the wall clock."""

    def __init__(self, done: int) -> None:
        self._marks: deque[tuple[int, float]] = deque([(done, time.monotonic())], maxlen=_WINDOW)

    def at(self, round: int) -> float:
        """Mark the end of a round; returns the rate."""
        now = time.monotonic()
        first, began = self._marks[0]
        self._marks.append((round, now))
        return (round - first) / (now - began) if now > began else 0.0


def _lines(total: int, done: int) -> Show:
    pace = _Pace(done)

    def show(record: Record) -> None:
        print(line_for(record, total, pace.at(record.round)), file=sys.stderr, flush=True)

    return show


@contextmanager
def _bar(total: int, done: int, title: str) -> Generator[Show]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TextColumn("[cyan]{task.fields[pace]}"),
        TextColumn("[dim]{task.fields[left]}"),
        console=Console(stderr=True),
        expand=True,
        auto_refresh=False,
    )
    pace, shown, latest = _Pace(done), time.monotonic(), dict[str, str]()

    def draw() -> None:
        bar.update(
            task, completed=int(latest["round"]), values=latest["values"], pace=latest["pace"], left=latest["left"]
        )
        bar.refresh()

    def show(record: Record) -> None:
        nonlocal shown
        current = pace.at(record.round)
        found = headline(record)
        if found is not None:
            latest["metric"] = f"  {found[0]} {words(found[1])} [bold]{amount(found[2])}[/bold]"
        now = time.monotonic()
        if now - shown < REFRESH_SECONDS and record.round < total:
            latest["round"] = str(record.round)
            return
        shown = now
        latest["round"] = str(record.round)
        latest["values"] = f"loss [bold]{amount(record.loss)}[/bold]{latest.get('metric', '')}"
        latest["pace"] = rate(current)
        latest["left"] = f"{span((total - record.round) / current)} left" if current and record.round < total else ""
        draw()

    with bar:
        task = bar.add_task(escape(title) or "training", total=total, completed=done, values="", pace="", left="")
        bar.refresh()
        try:
            yield show
        finally:
            # A run that stops early leaves the round it reached on the screen.
            if "values" in latest:
                draw()
