"""Seconds per round: Atoll, code written by hand, and other frameworks, each in an environment of its own.

Every run is a fresh process. The contestants of a workload take turns, in another order in every repetition; a ratio is
of two medians of one repetition. Before that, each trains one round with its examples in order, and all must end with
the same model. Other frameworks take part when `environments.py` has built their environments.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCH = HERE.parents[1] / "src" / "atoll" / "bench"
sys.path[:0] = [str(HERE), str(BENCH), str(HERE.parent)]

import environments  # noqa: E402 - the path above comes first
import numpy as np  # noqa: E402
import workloads  # noqa: E402
from figures import RECORDED  # noqa: E402
from reporting import RESULTS, Findings, Table, finish, interval, parser, pyplot  # noqa: E402

AGREEMENT = 1e-3
DENSE = ("W1", "W2", "W4", "W4E", "W5")
OTHERS = ("W1", "W2", "W3", "W5")
MODELS = ("N1", "N2", "N3", "N4", "N5", "N6")
DEFAULT = ("W1", "W2", "W3", "W4", "W4E", "W5", *MODELS)
ALL = tuple(workloads.WORKLOADS)
LIMIT = 900.0


@dataclass(frozen=True, slots=True)
class Contestant:
    """A script and how it is called.

    Attributes:
        name: on the command line.
        shown: in tables and pictures.
        kind: "atoll", "hand" or "framework".
        script: below `contestants/`.
        arguments: besides workload, rounds and warm-up.
        loads: the workloads it runs.
        environment: whose; None: the one that runs the benchmark.
        slow: whether it plays fewer rounds.
    """

    name: str
    shown: str
    kind: str
    script: str
    arguments: tuple[str, ...]
    loads: tuple[str, ...]
    environment: str | None = None
    slow: bool = False


def _two(threads: str) -> tuple[str, ...]:
    return ("--threads", threads)


CONTESTANTS: Mapping[str, Contestant] = {
    made.name: made
    for made in (
        Contestant("atoll", "Atoll", "atoll", "atoll_.py", (), ALL),
        Contestant("atoll-1", "Atoll, 1 worker", "atoll", "atoll_.py", ("--workers", "1"), ("W1", "W2", "W3")),
        Contestant("atoll-2", "Atoll, 2 workers", "atoll", "atoll_.py", ("--workers", "2"), ("W1", "W2", "W3")),
        Contestant(
            "atoll-ray", "Atoll, Ray", "atoll", "atoll_.py", ("--engine", "ray", "--workers", "2"), ("W3",), slow=True
        ),
        Contestant("batched-1", "batched products, 1 thread", "hand", "hand_batched.py", _two("1"), DENSE),
        Contestant("batched-2", "batched products, 2 threads", "hand", "hand_batched.py", _two("2"), DENSE),
        Contestant("rows-1", "rows, 1 thread", "hand", "hand_rows.py", _two("1"), ("W1", "W2", "W5", *MODELS)),
        Contestant("rows-2", "rows, 2 threads", "hand", "hand_rows.py", _two("2"), ("W1", "W2", "W5", *MODELS)),
        Contestant("vmap", "vmap(grad)", "hand", "hand_vmap.py", (), ("W1", "W2", "W3", "W4")),
        Contestant("vmap-compiled", "vmap(grad), compiled", "hand", "hand_vmap.py", ("--compile",), ("W1", "W2")),
        Contestant("loop-1", "loop, 1 thread", "hand", "hand_loop.py", (), ALL, slow=True),
        Contestant(
            "loop-2", "loop, 2 processes", "hand", "hand_loop.py", ("--processes", "2"), ("W1", "W2", "W3"), slow=True
        ),
        Contestant(
            "loop-1-last",
            "loop, 1 thread, channels last",
            "hand",
            "hand_loop.py",
            ("--channels-last",),
            ("W3",),
            slow=True,
        ),
        Contestant(
            "loop-2-last",
            "loop, 2 processes, channels last",
            "hand",
            "hand_loop.py",
            ("--processes", "2", "--channels-last"),
            ("W3",),
            slow=True,
        ),
        Contestant("fedjax-1", "FedJAX, 1 thread", "framework", "fedjax_.py", _two("1"), OTHERS, "fedjax", True),
        Contestant("fedjax-2", "FedJAX, 2 threads", "framework", "fedjax_.py", _two("2"), OTHERS, "fedjax", True),
        Contestant("pfl-1", "pfl-research, 1 thread", "framework", "pfl_research.py", _two("1"), OTHERS, "pfl", True),
        Contestant("pfl-2", "pfl-research, 2 threads", "framework", "pfl_research.py", _two("2"), OTHERS, "pfl", True),
        Contestant("fluke", "fluke", "framework", "fluke_.py", _two("1"), OTHERS, "fluke", True),
        Contestant("flower", "Flower, lean client", "framework", "flower.py", (), OTHERS, "flower", True),
        Contestant(
            "flower-documented",
            "Flower, client of its quickstart",
            "framework",
            "flower.py",
            ("--style", "documented"),
            ("W1", "W2", "W3"),
            "flower",
            True,
        ),
    )
}
QUICK = ("atoll", "batched-1", "rows-1", "loop-1")

SLOW: Mapping[str, int] = {"W1": 6, "W2": 5, "W3": 4, "W4": 5, "W4E": 5, "W5": 10, "W6": 1, **dict.fromkeys(MODELS, 6)}
"""Rounds that a slow contestant times in one run, instead of the workload's."""

REFERENCES: Mapping[str, tuple[str, ...]] = {
    "W1": ("batched-1", "batched-2"),
    "W2": ("batched-1", "batched-2"),
    "W3": ("loop-2", "loop-2-last"),
    **dict.fromkeys(MODELS, ("rows-1", "rows-2")),
}
"""The code written by hand that Atoll is held to: the faster one where there are two."""

FEDJAX, PFL, FLOWER = ("fedjax-1", "fedjax-2"), ("pfl-1", "pfl-2"), ("flower",)


@dataclass(slots=True)
class Measured:
    """What one contestant did on one workload.

    Attributes:
        lines: what it printed, by repetition.
        fixed: what it printed when examples were taken in order.
        failure: why it has nothing to show, if so.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    fixed: dict[str, Any] | None = None
    failure: str = ""

    def medians(self) -> list[float]:
        """Median seconds per round of each run."""
        return [float(np.median(line["seconds"])) for line in self.lines]

    def each(self, key: str) -> list[float]:
        """A number of each run."""
        return [float(line[key]) for line in self.lines]


Results = Mapping[tuple[str, str], Measured]
"""By workload and contestant."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something Atoll is held to.

    Attributes:
        load: the workload.
        what: in words.
        bound: the number it must reach.
        least: whether the number must be at least, rather than at most, the bound.
        values: one number per repetition; empty where it could not be measured.
        against: who it was measured against.
    """

    load: str
    what: str
    bound: float
    least: bool
    values: Sequence[float]
    against: str = ""

    @property
    def found(self) -> tuple[float, float, float] | None:
        """The median and its 95 % interval."""
        return (float(np.median(self.values)), *interval(self.values)) if len(self.values) else None

    @property
    def met(self) -> bool | None:
        """Whether the median is on the right side; None where it was not measured."""
        if self.found is None:
            return None
        return self.found[0] >= self.bound if self.least else self.found[0] <= self.bound

    def row(self) -> list[str]:
        """Cells of the table of targets."""
        shown = "-" if self.found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*self.found)
        verdict = {None: "not measured", True: "met", False: "**not met**"}[self.met]
        return [self.load, self.what, f"{'>=' if self.least else '<='} {self.bound:g}", shown, self.against, verdict]


def play(
    who: Contestant, load: str, *, rounds: int, warmup: int, cache: Path, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """One run in a fresh process.

    Raises:
        RuntimeError: when it failed, with the last thing it said.
    """
    python = Path(sys.executable) if who.environment is None else environments.interpreter(who.environment, cache)
    command = [str(python), str(HERE / "contestants" / who.script), load, *who.arguments, *extra]
    command += ["--rounds", str(rounds), "--warmup", str(warmup)]
    around = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=around)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took more than {LIMIT:.0f} seconds") from error
    found = [line for line in done.stdout.splitlines() if line.startswith('{"contestant"')]
    if not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(said[-1] if said else f"exit status {done.returncode}")
    return json.loads(found[-1])


def race(
    loads: Sequence[str], names: Sequence[str], *, repeats: int, quick: bool, cache: Path, agree: bool
) -> dict[tuple[str, str], Measured]:
    """Everybody's runs, in turns."""
    found: dict[tuple[str, str], Measured] = {}
    for load in loads:
        for name in names:
            who = CONTESTANTS[name]
            if load not in who.loads:
                continue
            measured = found.setdefault((load, name), Measured())
            if who.environment is not None and not environments.ready(who.environment, cache):
                measured.failure = f"its environment {who.environment!r} is not built"
    small = ("--small",) if quick else ()
    for repetition in range(0 if agree else 1, repeats + 1):  # the 0th is the one with examples in order
        for load in loads:
            present = [name for name in names if (load, name) in found]
            turn = repetition % max(1, len(present))
            for name in present[turn:] + present[:turn]:
                who, measured = CONTESTANTS[name], found[load, name]
                if measured.failure:
                    continue
                whole = load == "W5" and who.kind == "atoll"  # a published experiment: one run of 100 rounds
                rounds = 2 if quick else (SLOW if who.slow else workloads.ROUNDS)[load]
                warmup = 0 if whole else 1 if who.slow else workloads.WARMUP
                extra = (*small, *(("--api", "simulate") if whole else ()))
                if repetition == 0:
                    rounds, warmup, extra = 1, 0, (*extra, "--fixed")
                try:
                    line = play(who, load, rounds=rounds, warmup=warmup, cache=cache, extra=extra)
                except RuntimeError as error:
                    measured.failure = str(error)
                    print(f"{load} {name}: {error}", file=sys.stderr, flush=True)
                    continue
                if repetition == 0:
                    measured.fixed = line
                else:
                    measured.lines.append(line)
                    took = f"{1e3 * float(np.median(line['seconds'])):.1f} ms"
                    print(f"{repetition}/{repeats} {load} {name}: {took}", file=sys.stderr, flush=True)
    return found


def differences(found: Results) -> dict[tuple[str, str], float]:
    """How far each model is from the median one of its workload after one round in order, relative to its norm."""
    made: dict[tuple[str, str], float] = {}
    for load in {key[0] for key in found}:
        ends = {k: m.fixed["final_digest_or_norm"] for k, m in found.items() if k[0] == load and m.fixed}
        if not ends:
            continue
        size = sum(int(np.prod(shape)) for shape in workloads.shapes(workloads.WORKLOADS[load]).values())
        norm = float(np.median([end["norm"] for end in ends.values()]))
        side = float(np.median([end["projection"] for end in ends.values()]))
        for key, end in ends.items():
            made[key] = max(abs(end["norm"] - norm), abs(end["projection"] - side) * size**0.5) / norm
    return made


def paired(
    over: Sequence[float], under: Sequence[float], combine: Callable[[float, float], float] = lambda a, b: a / b
) -> list[float]:
    """Ratios of what was measured in the same repetition."""
    return [combine(a, b) for a, b in zip(over, under, strict=False)]


def best(found: Results, load: str, names: Sequence[str]) -> str | None:
    """The fastest of some contestants on a workload, by the median of their runs."""
    there = [n for n in names if (load, n) in found and found[load, n].lines]
    return min(there, key=lambda n: float(np.median(found[load, n].medians())), default=None)


def targets(found: Results) -> list[Target]:
    """What Atoll is held to, and what was measured."""
    made: list[Target] = []

    def of(load: str, name: str | None) -> Measured:
        return found.get((load, name or ""), Measured())

    def shown(name: str | None) -> str:
        return CONTESTANTS[name].shown if name else "nobody"

    for load, bound in (("W1", 1.5), ("W2", 1.3), ("W3", 1.2), *((n, 1.5) for n in MODELS)):
        rival = best(found, load, REFERENCES[load])
        ratios = paired(of(load, "atoll").medians(), of(load, rival).medians())
        made.append(Target(load, "time of the best hand-written code", bound, False, ratios, shown(rival)))
    for load, bounds in (("W1", (15, 40, 150)), ("W2", (2, 3.5, 25)), ("W3", (1.4, 1.0, 1.4))):
        for names, bound in zip((FEDJAX, PFL, FLOWER), bounds, strict=True):
            rival = best(found, load, names)
            ratios = paired(of(load, rival).medians(), of(load, "atoll").medians())
            made.append(Target(load, "times faster than", bound, True, ratios, shown(rival or names[0])))
    per_example = paired(_per_example(of("W4", "atoll"), "W4"), _per_example(of("W4E", "atoll"), "W4E"))
    made.append(Target("W4", "time per example of equal sizes", 1.15, False, per_example, "Atoll on W4E"))
    whole = of("W5", "atoll").lines
    made.append(Target("W5", "seconds for 100 rounds", 2.0, False, [_hundred(line) for line in whole]))
    accuracies = [line["final_digest_or_norm"].get("accuracy") for line in whole]
    real = [value for value in accuracies if value is not None]
    made.append(Target("W5", "accuracy on MNIST after 100 rounds", 0.81, True, real))
    rival = best(found, "W1", REFERENCES["W1"])
    starts = paired(of("W1", "atoll").each("first"), of("W1", rival).each("first"))
    made.append(Target("W1", "start to end of round 1", 1.3, False, starts, shown(rival)))
    for load in ("W1", "W2", "W3"):
        rival = best(found, load, REFERENCES[load])
        peaks = paired(of(load, "atoll").each("peak_mib"), of(load, rival).each("peak_mib"))
        made.append(Target(load, "peak memory", 1.2, False, peaks, shown(rival)))
    workers = paired(of("W3", "atoll-1").medians(), of("W3", "atoll-2").medians())
    made.append(Target("W3", "times faster with two workers than with one", 1.6, True, workers, "Atoll, 1 worker"))
    ray = paired(of("W3", "atoll-ray").medians(), of("W3", "atoll-2").medians())
    made.append(Target("W3", "time of Ray", 1.1, False, ray, "Atoll, 2 workers"))
    return made


def _per_example(measured: Measured, name: str) -> list[float]:
    """Seconds per example of each run, over all of its timed rounds."""
    load = workloads.WORKLOADS[name]
    sizes, made = workloads.sizes(load), list[float]()
    for line in measured.lines:
        played = range(workloads.WARMUP, workloads.WARMUP + len(line["seconds"]))
        made.append(sum(line["seconds"]) / sum(int(sizes[workloads.cohort(load, i)].sum()) for i in played))
    return made


def _hundred(line: Mapping[str, Any]) -> float:
    """Seconds of a whole run, which has 100 rounds unless it was a quick one."""
    return sum(line["seconds"]) * 100 / len(line["seconds"])


def table(found: Results) -> Table:
    """Medians, ratios, start and memory of everybody."""
    rows: list[list[str]] = []
    for (load, name), measured in found.items():
        if not measured.lines:
            continue
        times, own = measured.medians(), found.get((load, "atoll"), Measured()).medians()
        ratios = paired(times, own)
        rows.append(
            [
                load,
                CONTESTANTS[name].shown,
                _spread(times, 1e3, 1),
                _spread(ratios, 1, 2) if ratios else "-",
                f"{float(np.median(measured.each('first'))):.1f}",
                f"{float(np.median(measured.each('peak_mib'))):.0f}",
            ]
        )
    return Table(
        "A round", ["workload", "contestant", "milliseconds", "times Atoll", "first round, s", "peak, MiB"], rows
    )


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    low, high = interval(values)
    middle = float(np.median(values))
    return f"{scale * middle:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def chart(found: Results, loads: Sequence[str]) -> Callable[[Path], None]:
    """A picture: a panel of bars for each workload, on a logarithmic scale."""
    colours = {"atoll": "#0b7285", "hand": "#adb5bd", "framework": "#e8a33d"}

    def draw(path: Path) -> None:
        plt = pyplot()
        panels = [
            [(n, float(np.median(m.medians()))) for (w, n), m in found.items() if w == load and m.lines]
            for load in loads
        ]
        heights = [max(1, len(panel)) for panel in panels]
        figure, axes = plt.subplots(
            len(loads),
            1,
            figsize=(8, 0.9 * len(loads) + 0.24 * sum(heights)),
            gridspec_kw={"height_ratios": heights},
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, load, panel in zip(axes[:, 0], loads, panels, strict=True):
            panel.sort(key=lambda bar: -bar[1])
            axis.barh(
                [CONTESTANTS[name].shown for name, _ in panel],
                [seconds for _, seconds in panel],
                color=[colours[CONTESTANTS[name].kind] for name, _ in panel],
            )
            for place, (_, seconds) in enumerate(panel):
                axis.annotate(f" {seconds:.3g} s", (seconds, place), va="center", fontsize=8)
            axis.set_xscale("log")
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
            axis.set_title(str(workloads.WORKLOADS[load]), fontsize=8, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1, 0].set_xlabel("seconds per round")
        words = {"atoll": "Atoll", "hand": "code written by hand", "framework": "other frameworks"}
        bars = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in words]
        figure.legend(bars, words.values(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    return draw


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    reader.add_argument("--workloads", nargs="+", choices=ALL, metavar="W", default=list(DEFAULT), help="which")
    reader.add_argument(
        "--contestants", nargs="+", choices=tuple(CONTESTANTS), metavar="NAME", help="which; default everybody"
    )
    reader.add_argument("--repeats", type=int, default=5, help="runs of every contestant on every workload")
    reader.add_argument("--cache", type=Path, default=environments.CACHE, help="where the environments are")
    reader.add_argument("--skip-agreement", action="store_true", help="do not check that all train the same model")
    options = reader.parse_args(arguments)
    quick = options.quick
    loads = ["W1", "N4"] if quick and options.workloads == list(DEFAULT) else options.workloads
    names = options.contestants or list(QUICK if quick else CONTESTANTS)
    repeats = min(2, options.repeats) if quick else options.repeats
    found = race(loads, names, repeats=repeats, quick=quick, cache=options.cache, agree=not options.skip_agreement)
    found = {key: found[key] for load in loads for key in found if key[0] == load}
    apart = differences(found)
    odd = {key: value for key, value in apart.items() if value > AGREEMENT}
    held = [target for target in targets(found) if target.load in loads]
    missing = {key: m.failure for key, m in found.items() if m.failure}
    versions: dict[str, dict[str, str]] = {}
    for (_, name), measured in found.items():
        for line in measured.lines:
            versions[CONTESTANTS[name].script.removesuffix(".py").strip("_")] = line["versions"]
    remarks = [
        f"{sum(t.met is True for t in held)} targets met, {sum(t.met is False for t in held)} not met, "
        f"{sum(t.met is None for t in held)} not measured.",
    ]
    if apart:
        remarks.append(
            "After one round with all examples in order, the models of a workload differ by at most "
            f"{max(apart.values()):.1e} of their norm."
        )
    remarks += [
        f"**{CONTESTANTS[name].shown} trained something else on {load}: {value:.1e} of the norm away.**"
        for (load, name), value in odd.items()
    ]
    kinds = {line["data"] for (load, _), m in found.items() if load == "W5" for line in m.lines}
    if kinds:
        remarks.append(f"W5's examples: {', '.join(sorted(kinds))}.")
    if "W6" in loads:
        remarks.append("W6 is meant for a GPU; here it ran on whatever the contestants found.")
    tables = [
        Table("What Atoll is held to", ["workload", "what", "bound", "found", "against", ""], [t.row() for t in held]),
        table(found),
        Table(
            "Versions",
            ["contestant", "versions"],
            [[n, ", ".join(f"{k} {v}" for k, v in of.items())] for n, of in versions.items()],
        ),
    ]
    if missing:
        left_out = [[load, CONTESTANTS[name].shown, _one_line(why)] for (load, name), why in missing.items()]
        tables.append(Table("Left out", ["workload", "contestant", "why"], left_out))
    setting = [
        "Plain federated averaging, SGD with learning rate 0.1, one local epoch, cross-entropy, weights by examples; "
        "the same initial weights, examples and cohorts for everybody, evaluation and logging off.",
        "\n".join(f"- {workloads.WORKLOADS[load]}" for load in loads),
        f"{repeats} runs of each contestant in turns, in fresh processes, in another order in every repetition. "
        "Milliseconds: the median over runs of a run's median round, with 95 % bootstrap intervals over runs; ratios "
        "are of runs of one repetition. First round: seconds from the start of the process to the end of its first "
        "round. Peak: resident memory, processes below the contestant's included, shared pages counted once.",
        "Written by hand: `batched products` write the backward out and take the step inside the product, for this "
        "model alone; `rows` are leaves of one backward of the summed loss; `loop` is one client after the other. They "
        "step on every client's own weights; Atoll keeps weights as factors of what changed where clients see few "
        "examples, as on W2, on W3 and on much of W4, which is less work.",
    ]
    small = [load for load in loads if load in MODELS]
    large = [load for load in loads if load not in MODELS]
    figures = {}
    if large:
        figures["rounds"] = chart(found, large)
    if small:
        figures["models"] = chart(found, small)
    numbers = {
        "targets": [
            {
                "workload": t.load, "what": t.what, "bound": t.bound, "at least": t.least, "found": t.found,
                "values": list(t.values), "against": t.against, "met": t.met,
            }
            for t in held
        ],
        "runs": [
            {"workload": load, "contestant": name, "lines": m.lines, "difference": apart.get((load, name))}
            for (load, name), m in found.items()
            if m.lines
        ],
        "left out": [{"workload": w, "contestant": n, "why": _one_line(why)} for (w, n), why in missing.items()],
    }  # fmt: skip
    findings = Findings(
        title="Speed",
        setting=setting,
        tables=tables,
        remarks=remarks,
        passed=all(t.met is not False for t in held) and not odd,
        numbers=numbers,
        figures=figures,
    )
    out = options.out or (None if quick else RESULTS / "speed")
    status = finish("speed/run", findings, quick=quick, out=out, arguments=arguments)
    if not quick and out is not None and out.resolve() == RESULTS / "speed":
        record(found, json.loads(out.with_suffix(".json").read_text())["context"])
    return status


def record(found: Results, context: Mapping[str, str], path: Path = RECORDED) -> None:
    """Write down what `atoll bench` compares with, in the package.

    Args:
        found: everybody's runs.
        context: the machine, versions, command and date of the result they belong to.
        path: where to.
    """
    figures = [
        {
            "workload": load,
            "what": str(workloads.WORKLOADS[load]),
            "shown": CONTESTANTS[name].shown,
            "kind": CONTESTANTS[name].kind,
            "arguments": CONTESTANTS[name].arguments,
            "milliseconds": [1e3 * s for s in (float(np.median(m.medians())), *interval(m.medians()))],
            "engine": m.lines[-1].get("engine", {}),
        }
        for (load, name), m in found.items()
        if m.lines
    ]
    path.write_text(json.dumps({"context": context, "figures": figures}, indent=1) + "\n")
    print(f"Written: {path}")


def _one_line(text: str) -> str:
    """A reason without line breaks, bars and this machine's paths."""
    return " ".join(text.replace(str(HERE.parent.parent), "").replace(str(Path.home()), "~").split()).replace("|", "/")


if __name__ == "__main__":
    raise SystemExit(main())
