"""The conformance problems: Atoll passes them on every engine, and implementations with known defects do not."""

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from registry import ENGINES

from atoll import conformance
from atoll.conformance import PROBLEMS, Client, Outcome, Problem, Unsupported
from atoll.conformance.own import adapter

PAGE = Path(__file__).parent.parent.parent / "docs" / "conformance.md"


def plain(problem: Problem, defect: str = "") -> Sequence[Sequence[float]]:
    """Some of the methods written down with lists, and what goes wrong with them in the field."""
    o, population = problem.options, len(problem.clients)
    x, c = list(problem.start), [0.0] * len(problem.start)
    own = {client.name: list(c) for client in problem.clients}
    if problem.method not in ("fedavg", "fedprox", "fednova", "scaffold"):
        raise Unsupported(problem.method)

    def slope(w: list[float], client: Client, some: slice) -> list[float]:
        total, inputs, targets = [0.0] * len(w), client.inputs[some], client.targets[some]
        for u, y in zip(inputs, targets, strict=True):
            output = sum(a * b for a, b in zip(w, u, strict=True))
            by = 2 * (output - y) if problem.loss == "squared" else -y / (1 + math.exp(y * output))
            total = [t + by * v / len(targets) for t, v in zip(total, u, strict=True)]
        return total

    path = []
    for number in range(problem.rounds):
        cohort, ends, taken, renewed = problem.cohort(number), {}, {}, {}
        for client in cohort:
            w, count = list(x), 0
            for _ in range(problem.epochs):
                for begin in range(0, len(client.targets), problem.batch):
                    g = slope(w, client, slice(begin, begin + problem.batch))
                    if problem.method == "fedprox":
                        towards = w if defect == "pull to the current model" else x
                        pull = o["mu"] / 2 if defect == "half the pull" else o["mu"]
                        g = [a + pull * (b - t) for a, b, t in zip(g, w, towards, strict=True)]
                    if problem.method == "scaffold":
                        sign = -1 if defect == "sign of the correction" else 1
                        g = [a + sign * (v - u) for a, u, v in zip(g, own[client.name], c, strict=True)]
                    w, count = [a - problem.lr * b for a, b in zip(w, g, strict=True)], count + 1
            ends[client.name], taken[client.name] = w, count
            if problem.method == "scaffold":
                by = (1 if defect == "one step" else count) * problem.lr
                second = [u - v + (s - e) / by for u, v, s, e in zip(own[client.name], c, x, w, strict=True)]
                renewed[client.name] = second if o["option"] == 2 else slope(x, client, slice(None))
        weights = {
            client.name: float(len(client.targets)) if problem.weights == "examples" else 1.0 for client in cohort
        }
        if defect == "weights left out":
            weights = dict.fromkeys(weights, 1.0)
        if defect == "weights over the population":
            total = float(sum(len(client.targets) for client in problem.clients))
        else:
            total = sum(weights.values())
        mean_steps = sum(weights[n] * taken[n] for n in ends) / total
        moved = [0.0] * len(x)
        for name, end in ends.items():
            scale = mean_steps / taken[name] if problem.method == "fednova" and defect != "plain mean" else 1.0
            moved = [m + weights[name] / total * scale * (e - s) for m, e, s in zip(moved, end, x, strict=True)]
        over = len(cohort) if defect == "divided by the cohort" else population
        for name, new in renewed.items():
            c = [v + (n - u) / over for v, n, u in zip(c, new, own[name], strict=True)]
            own[name] = new
        x = [a + b for a, b in zip(x, moved, strict=True)]
        path.append(x)
    return path


def low_rank(problem: Problem, defect: str = "") -> Sequence[Sequence[float]]:
    """The methods over factors by automatic differentiation, with the products averaged as they are."""
    if problem.factors is None:
        raise Unsupported(problem.method)
    scale = problem.factors.scale
    x = torch.tensor(problem.start, dtype=torch.float64)
    a = torch.tensor([problem.factors.a], dtype=torch.float64)
    b = torch.tensor([[problem.factors.b]], dtype=torch.float64)
    path = []
    for number in range(problem.rounds):
        cohort = problem.cohort(number)
        share = torch.tensor([len(c.targets) for c in cohort], dtype=torch.float64)
        share /= share.sum()
        downs, ups = [], []
        for client in cohort:
            own_a, own_b = a.clone().requires_grad_(problem.method != "ffa_lora"), b.clone().requires_grad_()
            inputs, targets = (torch.tensor(v, dtype=torch.float64) for v in (client.inputs, client.targets))
            for _ in range(problem.epochs):
                loss = (inputs @ (x + scale * (own_b @ own_a)[0]) - targets).square().mean()
                loss.backward()
                with torch.no_grad():
                    for factor in (own_a, own_b):
                        if factor.grad is not None:
                            factor -= problem.lr * factor.grad
                            factor.grad = None
            downs.append(own_a.detach())
            ups.append(own_b.detach())
        a, b = (torch.tensordot(share, torch.stack(f), 1) for f in (downs, ups))
        exact = scale * sum(p * (up @ down)[0] for p, up, down in zip(share, ups, downs, strict=True))
        if problem.method in ("fedex_lora", "flora") and defect != "averages of the factors":
            path.append((x + exact).tolist())
            x = x + exact - scale * (b @ a)[0]
        else:
            path.append((x + (1.0 if defect == "without the scale" else scale) * (b @ a)[0]).tolist())
    return path


def verdicts(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {o.problem: o.verdict for o in outcomes}


@pytest.mark.parametrize("engine", ["loop", "rows", "factors", "auto"])
def test_atoll_passes_on_every_engine(engine: str) -> None:
    tight = [replace(p, tolerance=min(p.tolerance, 1e-9) if len(p.expected) > 1 else p.tolerance) for p in PROBLEMS]
    outcomes = conformance.run(adapter(ENGINES[engine]()), tight)
    assert [o for o in outcomes if o.verdict != "passes"] == []
    assert len({p.name for p in PROBLEMS}) == len(PROBLEMS) == len(outcomes)


def test_an_implementation_in_plain_python_passes() -> None:
    found = verdicts(conformance.run(plain))
    assert set(found.values()) == {"passes", "not offered"}
    assert sum(v == "passes" for v in found.values()) == 16


def test_low_rank_averages_agree_with_automatic_differentiation() -> None:
    found = [o for o in conformance.run(low_rank) if o.verdict != "not offered"]
    assert [o.verdict for o in found] == ["passes"] * 4 and {o.off < 1e-12 for o in found} == {True}


@pytest.mark.parametrize(
    ("defect", "methods"),
    [("averages of the factors", {"fedex_lora", "flora"}), ("without the scale", {"fedit", "ffa_lora"})],
)
def test_defects_of_low_rank_averages_are_found(defect: str, methods: set[str]) -> None:
    failed = [o for o in conformance.run(lambda problem: low_rank(problem, defect)) if o.verdict == "fails"]
    assert {o.method for o in failed} == methods and min(o.off for o in failed) > 1e-3


DEFECTS = {
    "weights left out": "five local steps",
    "weights over the population": "a sequence of cohorts",
    "pull to the current model": "a proximal term",
    "half the pull": "a proximal term",
    "plain mean": "normalised averaging",
    "sign of the correction": "control variates, option II",
    "one step": "control variates, option II",
    "divided by the cohort": "control variates, partial participation",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_from_the_field_are_found(defect: str) -> None:
    outcomes = conformance.run(lambda problem: plain(problem, defect))
    failed = [o for o in outcomes if o.problem == DEFECTS[defect]]
    assert failed[0].verdict == "fails" and failed[0].off > 1e-3 and "after round" in failed[0].detail


def test_what_raises_or_is_of_another_length_is_an_outcome() -> None:
    def broken(problem: Problem) -> Sequence[Sequence[float]]:
        if problem.method == "fedavg":
            raise ZeroDivisionError("by nought\nand more")
        if problem.method == "scaffold":
            return [[math.nan]] * problem.rounds
        return [[0.0]]

    outcomes = conformance.run(broken)
    by_method = {o.method: o for o in outcomes}
    assert by_method["fedavg"].verdict == "raises" and by_method["fedavg"].detail == "ZeroDivisionError: by nought"
    assert by_method["scaffold"].verdict == "fails" and by_method["fedprox"].detail.startswith("gave 1 models for 10")
    shown = conformance.table({"broken": outcomes, "plain": conformance.run(plain)})
    assert "| fedavg | one local step | raises | passes |" in shown and "**gave 1 models" in shown


def test_the_page_tells_what_the_code_does() -> None:
    text = PAGE.read_text()
    told = text[text.index("### ") :]
    assert told == conformance.page(), "write it anew: python -m atoll.conformance --problems"
    assert len(re.findall(r"^### ", told, flags=re.MULTILINE)) == len(PROBLEMS)


def test_problems_need_nothing_but_python() -> None:
    code = (
        "import sys\nfor name in ('torch', 'numpy', 'pandas', 'msgspec'):\n    sys.modules[name] = None\n"
        "from atoll import conformance\nprint(len(conformance.PROBLEMS), len(conformance.page()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == str(len(PROBLEMS))


def test_a_path_that_is_not_a_number_anywhere_fails() -> None:
    """`max` passes over a nan that does not come first, and no later number may make up for one."""
    for place, last in ((0, False), (-1, False), (-1, True)):

        def almost(problem: Problem, place: int = place, last: bool = last) -> Sequence[Sequence[float]]:
            path = [list(v) for v in problem.expected]
            path = [list(problem.start) for _ in range(problem.rounds - len(path))] + path
            path[-1 if last else -len(problem.expected)][place] = math.nan
            return path

        assert {o.verdict for o in conformance.run(almost)} == {"fails"}, (place, last)
