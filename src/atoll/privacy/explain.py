"""A guarantee in words, for those whose data it is about."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from atoll.privacy.client_noise import NAMES

_RULES = {
    "poisson": "cohorts drawn in secret, each {unit} with probability {rate:.4g}",
    "fixed": "cohorts drawn in secret, a share of {rate:.4g} of all {unit}s each time",
    "none": "every round counted for every {unit}",
}


def explain(result: Any) -> str:
    """What a run's privacy means, in two sentences for each guarantee; one sentence where there is none.

    Args:
        result: of a run, or one of the statements in `result.privacy`.
    """
    if isinstance(result, Mapping):
        return explained(result)  # pyright: ignore[reportUnknownArgumentType]
    statements: Sequence[Mapping[str, Any]] = result.privacy
    if not statements:
        return (
            "No differential privacy: the model may tell anything about the data it was trained on. "
            "Use transforms=(clip_norm(1.0), gaussian_noise(epsilon=3, delta=1e-5)) to protect clients."
        )
    return "\n".join(explained(s) for s in statements)


def explained(statement: Mapping[str, Any]) -> str:
    """Two sentences about a statement."""
    if not statement["private"]:
        return (
            f"NOT PRIVATE: noise and samples came from a seed that anybody can use again, as for tests, so epsilon "
            f"{_short(statement['epsilon'])} protects nobody. Leave seed= out for a run that protects "
            f"{_whose(statement)}."
        )
    if statement.get("added_by"):
        return _by_clients(statement)
    unit, epsilon = str(statement["unit"]), float(statement["epsilon"])
    factor = math.exp(min(epsilon, 700.0))
    changed = "whether its data were there at all" if statement["neighbours"] == "zero-out" else "which data it had"
    own = statement.get("strategy")
    noise = sorted({float(e["noise_multiplier"]) for e in statement["events"]})
    rules = [_RULES[e["sampling"]].format(unit=unit, rate=e["sampling_rate"]) for e in statement["events"]]
    trust = f" by {statement['trusted']}" if statement.get("trusted") else ""
    first = (
        f"Whoever sees everything this run released learns so little about {_whose(statement)} that its odds for "
        f"{changed} change by a factor of at most {_short(factor)}, but for a chance of {statement['delta']:g} "
        f"(epsilon {_short(epsilon)} at delta {statement['delta']:g}, neighbours {statement['neighbours']})."
    )
    if own:
        return f"{first} {_correlated(statement, own, trust)}"
    second = (
        f"That is {int(statement['releases']):,} releases with Gaussian noise of "
        f"{' and '.join(f'{z:.4g}' for z in noise) or 'no'} times the clip norm{', added' + trust if trust else ''}, "
        f"{'; '.join(dict.fromkeys(rules)) or 'none made yet'}, counted by the {statement['accountant']} accountant; "
        f"not covered: {'; '.join(statement.get('not_covered', ())) or 'nothing else leaves the run'}."
    )
    return f"{first} {second}"


def _correlated(statement: Mapping[str, Any], own: Mapping[str, Any], trust: str) -> str:
    """The second sentence, of noise that is correlated between rounds."""
    made, rounds, most = (int(v) for v in (statement["releases"], own["rounds"], own["participations"]))
    apart = f", {own['separation']:,} rounds apart or more" if most > 1 else ""
    return (
        f"That is {'the whole' if made == rounds else f'the first {made:,} of {rounds:,} rounds'} of one Gaussian "
        f"mechanism of {rounds:,} rounds with noise of {statement['noise_multiplier']:.4g} times its sensitivity of "
        f"{own['sensitivity']:.4g} clip norms, correlated between rounds by the strategy {own['name']}, added{trust}, "
        f"whoever was in the cohorts, if each {statement['unit']} takes part at most {most:,} "
        f"time{'s' if most > 1 else ''}{apart}, which the sampler sees to, counted by the {statement['accountant']} "
        f"accountant; not covered: {'; '.join(statement.get('not_covered', ())) or 'nothing else leaves the run'}."
    )


def _by_clients(statement: Mapping[str, Any]) -> str:
    """Two sentences about noise that clients add to what they send."""
    alone, epsilon = "survivors" not in statement, float(statement["epsilon"])
    changed = "which data it had" if alone else "whether its data were there at all"
    delta = float(statement["delta"])
    chance = f", but for a chance of {delta:g}" if delta else ""
    who = "the server, which sees every update," if alone else "the server, which sees sums alone,"
    first = (
        f"For {_whose(statement)}, all that {who} learns changes the odds for {changed} by a factor of at most "
        f"{_short(math.exp(min(epsilon, 700.0)))}{chance} (unit {statement['unit']}, epsilon {_short(epsilon)} at "
        f"delta {delta:g}, neighbours {statement['neighbours']})."
    )
    law, times = NAMES[statement["mechanism"]], f"{float(statement['noise_multiplier']):.4g}"
    count = int(statement["releases"])
    if alone:
        order = "L1" if statement["mechanism"] == "laplace" else "L2"
        what = (
            f"at most {count:,} updates of one client, each clipped to an {order} norm of {statement['clip']:g} and "
            f"given {law} noise of {times} times that by the client itself"
        )
    else:
        what = (
            f"{count:,} sums, each counted for every client, with {law} noise of at least {times} times the largest "
            f"part of one client, added in shares by the clients"
        )
    second = (
        f"That is {what}, drawn from a cryptographic source and counted by the {statement['accountant']} accountant; "
        f"trusted: {statement['trusted']}; not covered: {'; '.join(statement['not_covered'])}."
    )
    return f"{first} {second}"


def _whose(statement: Mapping[str, Any]) -> str:
    return str(statement.get("whose") or f"any {statement['unit']}")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1e6 else f"{value:.1e}"
