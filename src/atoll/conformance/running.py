"""Running the problems through an implementation, and telling what came out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.conformance.problems import PROBLEMS, Problem

Adapter = Callable[[Problem], Sequence[Sequence[float]]]
"""Runs a problem: the server's parameters after every round. Raises `Unsupported` where there is no such method."""


class Unsupported(Exception):
    """The implementation has no such method, or none that can be set as the problem says; the text says what."""


@dataclass(frozen=True)
class Outcome:
    """What came of a problem.

    Attributes:
        problem: its name.
        method: its method.
        verdict: "passes", "fails", "not offered", or "raises".
        off: largest difference from the expected numbers; nan where there are none.
        detail: a reason in words.
    """

    problem: str
    method: str
    verdict: Literal["passes", "fails", "not offered", "raises"]
    off: float
    detail: str


def run(adapter: Adapter, problems: Sequence[Problem] = PROBLEMS) -> list[Outcome]:
    """Every problem's outcome; what an implementation raises is an outcome too."""
    return [_outcome(adapter, problem) for problem in problems]


def _outcome(adapter: Adapter, problem: Problem) -> Outcome:
    def told(verdict: Literal["passes", "fails", "not offered", "raises"], off: float, detail: str) -> Outcome:
        return Outcome(problem.name, problem.method, verdict, off, detail)

    try:
        found = [[float(v) for v in model] for model in adapter(problem)]
    except Unsupported as error:
        return told("not offered", math.nan, str(error))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return told("raises", math.nan, f"{type(error).__name__}: {lines[0] if lines else ''}")
    if len(found) != problem.rounds or any(len(model) != len(problem.start) for model in found):
        return told("fails", math.nan, f"gave {len(found)} models for {problem.rounds} rounds, or of another length")
    numbers = range(problem.rounds - len(problem.expected), problem.rounds)
    off, where = 0.0, 0
    for number, expected in zip(numbers, problem.expected, strict=True):
        apart = [abs(a - b) for a, b in zip(found[number], expected, strict=True)]
        furthest = math.inf if any(math.isnan(a) for a in apart) else max(apart)  # max() passes over a nan
        if furthest > off:
            off, where = furthest, number
    if off <= problem.tolerance:
        return told("passes", off, "")
    return told("fails", off, f"off by {off:.3g} after round {where + 1}, allowed {problem.tolerance:g}")


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """A markdown table: problems by implementations."""
    lines = [["method", "problem", *outcomes], ["---"] * (len(outcomes) + 2)]
    for row in zip(*outcomes.values(), strict=True):
        cells = [
            "passes" if o.verdict == "passes" else o.verdict if o.verdict != "fails" else f"**{o.detail}**" for o in row
        ]
        lines.append([row[0].method, row[0].problem, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(problems: Sequence[Problem] = PROBLEMS) -> str:
    """The problems in markdown: setting, derivation, expected numbers and tolerance of each."""
    parts: list[str] = []
    for problem in problems:
        options = ", ".join(f"{n} {v:g}" for n, v in problem.options.items())
        shown = problem.expected if len(problem.expected) <= 12 else problem.expected[-1:]
        whole = len(problem.expected) > 1
        numbers = "; ".join(", ".join(f"{v:.9g}" for v in model) for model in shown)
        who = "everyone in all rounds"
        if problem.cohorts:
            turns = "; ".join(" and ".join(c) for c in _period(problem.cohorts))
            who = f"in turn {turns}"
        clients = "; ".join(
            f"{c.name}: {len(c.inputs)} examples"
            + (
                f" of {_numbers(c.inputs[0])} -> {c.targets[0]:.9g}"
                if len(set(c.inputs)) == 1
                else f" {_pairs(c.inputs, c.targets)}"
            )
            for c in problem.clients
        )
        parts.append(
            f"### {problem.method}: {problem.name}\n\n{problem.derivation}\n\n"
            f"- clients: {clients}\n"
            f"- loss {problem.loss}, start {_numbers(problem.start)}, rate {problem.lr:g}, batches of {problem.batch}, "
            f"passes {problem.epochs}, rounds {problem.rounds}, {who}, weights by {problem.weights}"
            + (f", {options}" if options else "")
            + (f", factors a {_numbers(f.a)}, b {f.b:g}, scale {f.scale:g}" if (f := problem.factors) else "")
            + f"\n- expected after {'each' if whole else 'the last'} round: {numbers}; tolerance {problem.tolerance:g}"
        )
    return "\n\n".join(parts) + "\n"


def _period(cohorts: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The cohorts up to where they begin anew."""
    fits = (n for n in range(1, len(cohorts) + 1) if all(c == cohorts[i % n] for i, c in enumerate(cohorts)))
    return cohorts[: next(fits)]


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:.9g}" for v in values) + ")"


def _pairs(inputs: Sequence[Sequence[float]], targets: Sequence[float]) -> str:
    return ", ".join(f"{_numbers(x)} -> {y:g}" for x, y in zip(inputs, targets, strict=True))
