"""Figures: the intervals and the machine that go with them, and those that were recorded."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORDED = Path(__file__).with_name("recorded.json")
"""What a full run of `benchmarks/speed/run.py` wrote; it is not there before the first one."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What one contestant needed for a round of a workload.

    Attributes:
        workload: its name.
        what: the workload in words; figures of a workload that has changed since are not compared with.
        shown: the contestant, as in tables.
        kind: "atoll", "hand" or "framework".
        arguments: how it was called, such as ("--workers", "2").
        milliseconds: the median over runs of a run's median round, and its 95 % interval over runs.
        engine: what Atoll said about its engine; empty for others.
    """

    workload: str
    what: str
    shown: str
    kind: str
    arguments: tuple[str, ...]
    milliseconds: tuple[float, float, float]
    engine: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recorded:
    """The figures of a contest.

    Attributes:
        context: machine, versions, command and date.
        figures: of every contestant on every workload.
    """

    context: Mapping[str, str]
    figures: tuple[Figure, ...]

    def atoll(self, what: str, arguments: Sequence[str] = ()) -> Figure | None:
        """Atoll's figure on a workload in words, called in some way."""
        found = (f for f in self.figures if f.what == what and f.kind == "atoll" and f.arguments == tuple(arguments))
        return next(found, None)

    def best(self, what: str, kind: str) -> Figure | None:
        """The fastest contestant of a kind on a workload in words."""
        there = (f for f in self.figures if f.what == what and f.kind == kind)
        return min(there, key=lambda figure: figure.milliseconds[0], default=None)


def read(path: Path = RECORDED) -> Recorded | None:
    """The recorded figures, or None where there are none."""
    if not path.exists():
        return None
    body = json.loads(path.read_text())
    figures = [
        Figure(**(of | {key: tuple(of[key]) for key in ("arguments", "milliseconds")})) for of in body["figures"]
    ]
    return Recorded(body["context"], tuple(figures))


def interval(
    values: Sequence[float], statistic: Callable[[NDArray[np.float64]], Any] = np.median, *, draws: int = 4000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic.

    Args:
        values: independent measurements, [n].
        statistic: of an array [draws, n] along its last axis (takes `axis=`).
        draws: resamples.
    """
    array = np.asarray(values, dtype=np.float64)
    places = np.random.default_rng(0).integers(0, len(array), (draws, len(array)))
    low, high = np.quantile(statistic(array[places], axis=1), [0.025, 0.975])  # pyright: ignore[reportCallIssue]
    return float(low), float(high)


def cpu() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
