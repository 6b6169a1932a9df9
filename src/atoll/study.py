"""Studies: the same experiment under several arms and several seeds, with intervals that say how far to trust it."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from atoll.errors import InvalidArgument, RunError, invalid, unknown
from atoll.report.numbers import signed, words

if TYPE_CHECKING:
    import pandas

    from atoll.experiment import Experiment
    from atoll.result import Result


class Interval(NamedTuple):
    """A mean and the ends of its interval; the ends are nan where fewer than two values were seen."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one arm brought a client over another, in words.

    Attributes:
        client: the client; empty for the mean over clients.
        kind: "better" and "worse" only where an interval excludes zero; "mixed" where metrics disagree; else "open".
        text: one sentence.
    """

    client: str
    kind: Literal["better", "worse", "mixed", "open"]
    text: str


@dataclass(frozen=True, slots=True)
class Study:
    """Metrics of every client under every arm and seed.

    Attributes:
        arms: names of what was compared.
        clients: names.
        metrics: names, in the model's order.
        seeds: one run of each arm for each.
        values: arm -> metric -> client -> one value for each seed, nan where undefined.
        better: metric -> +1 where higher is better, -1 where lower is.
        confidence: of the intervals.
        overlap: test examples for each training example where every seed cut the same examples anew; 0 where the seeds
            shared one cut.
        specs: arm -> spec of its run with the first seed.
    """

    arms: tuple[str, ...]
    clients: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]]
    better: Mapping[str, int]
    confidence: float
    overlap: float
    specs: Mapping[str, Mapping[str, Any]]

    def over_seeds(self, arm: str, metric: str, client: str | None = None) -> tuple[float, ...]:
        """One value for each seed: a client's, or the mean over the clients that have one.

        Raises:
            InvalidArgument: an unknown arm, metric or client.
        """
        for name, value, known in (("arm", arm, self.arms), ("metric", metric, self.metrics)):
            if value not in known:
                raise unknown(name, value, known)
        of = self.values[arm][metric]
        if client is not None:
            if client not in of:
                raise unknown("client", client, self.clients)
            return of[client]
        rows = zip(*(of[c] for c in self.clients), strict=True)
        return tuple(_mean([v for v in row if math.isfinite(v)]) for row in rows)

    def interval(self, arm: str, metric: str, client: str | None = None) -> Interval:
        """The mean over seeds with its interval; of the mean over clients when no client is named."""
        return interval(self.over_seeds(arm, metric, client), confidence=self.confidence, overlap=self.overlap)

    def difference(self, arm: str, baseline: str, metric: str, client: str | None = None) -> Interval:
        """The mean of the differences `arm - baseline` of the same seed, with its interval."""
        if client is not None:
            left, right = self.over_seeds(arm, metric, client), self.over_seeds(baseline, metric, client)
            paired = [a - b for a, b in zip(left, right, strict=True)]
        else:
            # A client counts in a seed only where it has both values, else the pair would not be one.
            own = [self._paired(arm, baseline, metric, c) for c in self.clients]
            paired = [_mean([v for v in row if math.isfinite(v)]) for row in zip(*own, strict=True)]
        return interval(paired, confidence=self.confidence, overlap=self.overlap)

    def _paired(self, arm: str, baseline: str, metric: str, client: str) -> list[float]:
        pairs = zip(self.over_seeds(arm, metric, client), self.over_seeds(baseline, metric, client), strict=True)
        return [a - b for a, b in pairs]

    def table(self, metric: str) -> dict[str, dict[str, Interval]]:
        """Client -> arm -> interval."""
        return {c: {a: self.interval(a, metric, c) for a in self.arms} for c in self.clients}

    def verdicts(self, arm: str, baseline: str) -> list[Verdict]:
        """What an arm brought each client, and all of them on average, over another arm; loss is left out."""
        return [self._verdict(arm, baseline, c) for c in [*self.clients, None]]

    def _verdict(self, arm: str, baseline: str, client: str | None) -> Verdict:
        gained, lost, open_, unjudged, undefined = (list[str]() for _ in range(5))
        for metric in self.metrics:
            if metric == "loss":
                continue
            change = self.difference(arm, baseline, metric, client)
            name = words(metric)
            told = f"{name} {signed(change.mean)} ({signed(change.low)} to {signed(change.high)})"
            if not math.isfinite(change.mean):
                undefined.append(name)
            elif not math.isfinite(change.low):
                unjudged.append(f"{name} {signed(change.mean)}")
            elif change.low > 0 or change.high < 0:
                (gained if (change.mean > 0) == (self.better[metric] > 0) else lost).append(told)
            else:
                open_.append(told)
        parts: list[str] = []
        if gained:
            parts.append(f"{arm} is better than {baseline}: {_joined(gained)}")
        if lost:
            parts.append(f"{arm} is worse than {baseline}: {_joined(lost)}")
        if open_:
            what = "what else changed" if gained or lost else f"{arm} brought nothing over {baseline} that"
            parts.append(f"{what} {'cannot' if gained or lost else 'can'} be told from chance: {_joined(open_)}")
        if unjudged:
            parts.append(f"{_joined(unjudged)}, from too few runs to tell it from chance")
        if undefined:
            parts.append(f"{_joined(undefined)} is undefined there")
        kind: Literal["better", "worse", "mixed", "open"] = "open"
        if gained or lost:
            kind = "mixed" if gained and lost else ("better" if gained else "worse")
        who = "Mean over clients" if client is None else client
        return Verdict(client or "", kind, f"{who}: {'; '.join(parts)}." if parts else f"{who}: no metric to judge by.")

    def cautions(self) -> list[str]:
        """What the intervals mean, and what they do not."""
        count = len(self.seeds)
        if count < 2:
            return ["One seed gives no interval: nothing here can be told from chance. Use more seeds."]
        lines = [
            f"A value is the mean over {count} seeds; after ± is half of its {self.confidence:.0%} interval "
            "(Student's t). A difference is taken within each seed, between runs on the same data. An interval is "
            "symmetric, so it may reach past what a metric can be."
        ]
        if self.overlap:
            lines.append(
                "Every seed divides the same examples anew into training and test. Such runs are not independent, so "
                "the intervals are widened (Nadeau and Bengio 2003) and show what another division could change; they "
                "do not promise the same for other clients or other examples."
            )
        else:
            lines.append(
                "All seeds share one division into training and test: the intervals show what initial values and the "
                "order of the examples change, not what other test examples would."
            )
        lines.append(
            f"Of many {self.confidence:.0%} intervals, about one in {round(1 / (1 - self.confidence))} misses by "
            "chance; they are not corrected for how many there are."
        )
        return lines

    def to_frame(self) -> "pandas.DataFrame":
        """One row for each arm, seed, client and metric, with its value."""
        import pandas

        rows = [
            (arm, seed, client, metric, value)
            for arm in self.arms
            for metric in self.metrics
            for client in self.clients
            for seed, value in zip(self.seeds, self.values[arm][metric][client], strict=True)
        ]
        return pandas.DataFrame.from_records(rows, columns=["arm", "seed", "client", "metric", "value"])

    def save(self, path: str | Path) -> Path:
        """Write every value to a JSON file; returns its path."""
        body = {
            "arms": self.arms, "clients": self.clients, "metrics": self.metrics, "seeds": self.seeds,
            "values": {
                a: {m: {c: [_null(v) for v in vs] for c, vs in of.items()} for m, of in every.items()}
                for a, every in self.values.items()
            },
            "better": self.better, "confidence": self.confidence, "overlap": self.overlap, "specs": self.specs,
        }  # fmt: skip
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(body, allow_nan=False, indent=1), encoding="utf-8")
        return file

    @staticmethod
    def load(path: str | Path) -> "Study":
        """Read what `save` wrote.

        Raises:
            RunError: it is no study.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            values = {
                a: {
                    m: {c: tuple(math.nan if v is None else float(v) for v in vs) for c, vs in of.items()}
                    for m, of in every.items()
                }
                for a, every in body["values"].items()
            }
            return Study(
                tuple(body["arms"]), tuple(body["clients"]), tuple(body["metrics"]), tuple(body["seeds"]), values,
                body["better"], body["confidence"], body["overlap"], body["specs"],
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not a study ({error!r}): name a file that Study.save wrote.") from error


def study(
    make: "Callable[..., Experiment]",
    arms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    confidence: float = 0.95,
    overlap: float | None = None,
    on_run: Callable[[str, int, "Result"], None] | None = None,
    **run: Any,
) -> Study:
    """Run an experiment under several arms and seeds.

    Args:
        make: `make(seed=..., **arms[name])` gives the experiment of a run, such as an app's `experiment`. Its data is a
            dataset with test examples, the same clients in every run.
        arms: name -> the arguments that set it apart.
        seeds: one run of each arm for each.
        confidence: of the intervals, in (0, 1).
        overlap: see `Study`; default: measured, from whether the seeds cut the data differently.
        on_run: called with arm, seed and result after each run.
        run: how to run, as for `Experiment.simulate`; default without progress and with one evaluation at the end.

    Returns:
        The study. A client's values are those of its personal model where the arm has them, else of the global one.

    Raises:
        InvalidArgument: no arm, no or repeated seeds, data without test examples, or runs that do not match.
    """
    if not arms:
        raise invalid("arms", dict(arms), "at least one name with its arguments")
    if not seeds or len(set(seeds)) != len(seeds):
        raise invalid("seeds", list(seeds), "different seeds, at least one")
    if not 0 < confidence < 1:
        raise invalid("confidence", confidence, "in (0, 1)")
    values: dict[str, dict[str, dict[str, list[float]]]] = {arm: {} for arm in arms}
    specs: dict[str, Mapping[str, Any]] = {}
    cuts: dict[str, None] = {}
    ratio, better, clients, metrics = 0.0, dict[str, int](), tuple[str, ...](), tuple[str, ...]()
    for seed in seeds:
        for arm, settings in arms.items():
            experiment = make(**{**settings, "seed": seed})
            data: Any = experiment.data
            if getattr(data, "test", None) is None:
                raise InvalidArgument(
                    f"the experiment of arm {arm!r} has no test examples: a study compares clients on theirs. Give "
                    "it a dataset that was cut with test=0.2 or so, bound to its source."
                )
            check_open(experiment, "a study compares clients on their test examples")
            result = experiment.simulate(**{"progress": False, "evaluate_every": experiment.rounds, **run})
            cuts[str(data.fingerprint())] = None
            ratio = len(data.test) / len(data.train)
            found = result.clients.get("personal") or result.clients["global"]
            if not metrics:
                evaluation = result.evaluate(data)
                better = dict(zip(evaluation.names, evaluation.better, strict=True))
                clients, metrics = tuple(found), evaluation.names
            if tuple(found) != clients or any(tuple(of) != metrics for of in found.values()):
                raise InvalidArgument(
                    f"arm {arm!r}, seed {seed}: clients or metrics differ from those of the first run."
                )
            for metric in metrics:
                for client in clients:
                    values[arm].setdefault(metric, {}).setdefault(client, []).append(found[client][metric])
            specs.setdefault(arm, result.spec)
            if on_run is not None:
                on_run(arm, seed, result)
    if overlap is None:
        overlap = ratio if len(cuts) > 1 else 0.0
    fixed = {a: {m: {c: tuple(v) for c, v in of.items()} for m, of in every.items()} for a, every in values.items()}
    return Study(tuple(arms), clients, metrics, tuple(seeds), fixed, better, confidence, overlap, specs)


def check_open(experiment: "Experiment", what: str) -> None:
    """Refuse client-level privacy where metrics on clients' own examples are told.

    Raises:
        InvalidArgument: the experiment asks for it.
    """
    for stage in experiment.transforms if isinstance(experiment.transforms, Sequence) else ():
        if getattr(stage, "protects", False):
            raise InvalidArgument(
                f"{what}, which no noise of {stage.name} protects: leave {stage.name} out and work with data that are "
                "no secret, or run experiment.simulate on its own and look at a holdout."
            )


def interval(values: Sequence[float], *, confidence: float = 0.95, overlap: float = 0.0) -> Interval:
    """A mean with its Student-t interval `mean ± t * s * sqrt(1/n + overlap)`; values that are nan are left out.

    Args:
        values: one for each run.
        confidence: in (0, 1).
        overlap: test examples for each training example, where the runs cut the same examples anew; 0 where the runs
            are independent.

    Source: the term `overlap` is the correction of Nadeau and Bengio 2003, "Inference for the generalization error".
    """
    kept = [v for v in values if math.isfinite(v)]
    if len(kept) < 2:
        return Interval(_mean(kept), math.nan, math.nan)
    mean = _mean(kept)
    half = t_quantile((1 + confidence) / 2, len(kept) - 1) * statistics.stdev(kept) * math.sqrt(1 / len(kept) + overlap)
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution.

    Args:
        probability: in (0, 1).
        freedom: degrees of freedom, at least 1.

    Source: the distribution function for whole degrees of freedom is Abramowitz and Stegun 1964, 26.7.3 and 26.7.4; it
    is inverted by bisection.
    """
    if not 0 < probability < 1:
        raise invalid("probability", probability, "in (0, 1)")
    if freedom < 1:
        raise invalid("freedom", freedom, "at least 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """The probability that a t variable is below t >= 0."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inside) / 2


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
