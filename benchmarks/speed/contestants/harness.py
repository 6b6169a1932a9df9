"""What every contestant shares: its command line, its clock, its memory, and the line of JSON it prints.

Standard library, numpy and `workloads` only: it is imported in the environment of every framework. Workloads and
networks are files of Atoll's package that need nothing of it; they are imported by their folder.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src" / "atoll" / "bench"))

import digest
import numpy as np
import workloads
from numpy.typing import NDArray
from workloads import Packed, Workload


@dataclass(slots=True)
class Race:
    """One contestant's run of one workload, and the times of its rounds.

    Attributes:
        contestant: its name.
        options: the command line.
        load: the workload.
        data: its examples.
        seconds: of every round so far, warm-up included.
        first: seconds from the start of this process to the end of round one.
    """

    contestant: str
    options: argparse.Namespace
    load: Workload
    data: Packed
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    _began: float = 0.0

    @property
    def total(self) -> int:
        """Rounds to play, warm-up included."""
        return self.options.warmup + self.options.rounds

    def cohorts(self) -> list[list[int]]:
        """The clients of every round."""
        return [workloads.cohort(self.load, i).tolist() for i in range(self.total)]

    def start(self) -> None:
        """A round begins now."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """The round that began last has ended; the next one may follow at once."""
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self.first = self.first or age()
        self._began = now

    def play(self, turn: Callable[[int, list[int]], Any]) -> None:
        """Play all rounds of a contestant that is a function of (number of the round, its clients)."""
        for number, clients in enumerate(self.cohorts()):
            self.start()
            turn(number, clients)
            self.stop()

    def report(self, vector: NDArray[np.float32], variant: str, packages: Sequence[str], **more: Any) -> None:
        """Print the one line that is this contestant's result.

        Args:
            vector: the final model [P], in the order of `workloads.shapes`.
            variant: how it ran.
            packages: whose versions matter.
            more: whatever else is worth keeping.
        """
        peak = peak_mib()  # before the digest, which is not part of the contest
        if len(self.seconds) != self.total:
            raise SystemExit(f"{self.contestant} played {len(self.seconds)} rounds instead of {self.total}")
        line = {
            "contestant": self.contestant,
            "workload": self.load.name,
            "variant": variant,
            "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
            "seconds": self.seconds[self.options.warmup :],
            "first": self.first,
            "peak_mib": peak,
            "data": self.data.source,
            "final_digest_or_norm": digest.digest(self.load, vector, self.data),
            **more,
        }
        print(json.dumps(line), flush=True)


def reader(description: str | None) -> argparse.ArgumentParser:
    """The command line every contestant has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("workload", choices=tuple(workloads.WORKLOADS))
    made.add_argument("--rounds", type=int, default=5, help="rounds to time")
    made.add_argument("--warmup", type=int, default=1, help="rounds before that")
    made.add_argument("--threads", type=int, default=1, help="threads of an operation")
    made.add_argument("--fixed", action="store_true", help="take examples in order, so that all models must be equal")
    made.add_argument("--small", action="store_true", help="few clients, to try things out")
    return made


def begin(contestant: str, options: argparse.Namespace) -> Race:
    """Make the workload's examples."""
    load = workloads.WORKLOADS[options.workload]
    load = workloads.smaller(load) if options.small else load
    return Race(contestant, options, load, workloads.examples(load))


def age() -> float:
    """Seconds since this process was started by the kernel, interpreter and imports included."""
    ticks = int(_fields(os.getpid())[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Peak resident memory of this process and its descendants, in MiB.

    A process alone is what the kernel says. With descendants, which share pages with each other, it is the sum of
    their peaks, less what each of them shares as of now.
    """
    tree = [os.getpid(), *descendants(os.getpid())]
    return sum(_peak_of(pid, shared=len(tree) > 1) for pid in tree) / 2**10


def descendants(root: int) -> list[int]:
    """Processes below a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children.setdefault(int(_fields(int(entry.name))[1]), []).append(int(entry.name))
            except OSError:
                continue  # it has ended meanwhile
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; the name before it may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _peak_of(pid: int, *, shared: bool) -> float:
    """Peak resident KiB of a process; with `shared`, less the pages that are counted elsewhere."""
    try:
        peak = _kib(Path(f"/proc/{pid}/status"), "VmHWM")
        if not shared:
            return peak
        now = Path(f"/proc/{pid}/smaps_rollup")
        return peak - _kib(now, "Rss") + _kib(now, "Pss")
    except (OSError, StopIteration):
        return 0.0  # it has ended meanwhile


def _kib(file: Path, key: str) -> float:
    return float(next(line for line in file.read_text().splitlines() if line.startswith(f"{key}:")).split()[1])
