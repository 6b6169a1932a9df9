"""Tuning: settings are chosen on validation examples, and what they are worth is told on test examples.

A choice among settings makes the number it went by better than it is: the best of many noisy values is partly the
luckiest. `tune` therefore looks at no test example before it has chosen, evaluates the chosen setting on them once, and
tells both numbers.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from atoll.data import FederatedDataset
from atoll.errors import CompositionError, DataError, InvalidArgument, NonFiniteError, invalid, unknown
from atoll.space import Range
from atoll.spec import digest
from atoll.study import Interval, interval

if TYPE_CHECKING:
    import pandas

    from atoll.experiment import Experiment
    from atoll.result import Result

CUT_SEED = 0
"""Seed of the cut into training and validation where the data bring no validation examples."""

_REFUSALS = (InvalidArgument, DataError, CompositionError)
"""What a setting is refused with."""

Space = Mapping[str, "Sequence[Any] | Range"]
"""Setting -> its values, or a range from `atoll.space`."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting that was tried.

    Attributes:
        settings: by name.
        value: mean of the metric on the validation examples over seeds; nan where there is none.
        by_seed: one for each seed.
        error: why the setting was refused, or why training failed; empty where neither happened.
        refused: whether it was refused before training began.
    """

    settings: Mapping[str, Any]
    value: float
    by_seed: tuple[float, ...]
    error: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search found.

    Attributes:
        settings: the chosen setting.
        metric: what it was chosen by.
        better: +1 where higher is better, -1 where lower is.
        validation: the metric of the chosen setting on the validation examples it was chosen by: better than it is.
        test: the same on test examples, which had no part in the choice, over seeds; ends are nan for a single seed.
        tests: all metrics on the test examples, one value for each seed.
        trials: all settings that were tried, in order.
        results: the runs of the chosen setting, one for each seed.
    """

    settings: Mapping[str, Any]
    metric: str
    better: int
    validation: float
    test: Interval
    tests: Mapping[str, tuple[float, ...]]
    trials: tuple[Trial, ...]
    results: "tuple[Result, ...]"

    def to_frame(self) -> "pandas.DataFrame":
        """One row for each trial: its settings, its validation value, its error."""
        import pandas

        rows = [{**t.settings, f"validation {self.metric}": t.value, "error": t.error} for t in self.trials]
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        chosen = ", ".join(f"{n}={v!r}" for n, v in self.settings.items())
        ends = "" if math.isnan(self.test.low) else f" ({self.test.low:.6g} to {self.test.high:.6g})"
        lost = [t for t in self.trials if t.error]
        refused = sum(t.refused for t in lost)
        told = f" ({refused} refused, {len(lost) - refused} failed)" if lost else ""
        return (
            f"chosen of {len(self.trials)}{told}: {chosen}. {self.metric} on test examples {self.test.mean:.6g}{ends}; "
            f"on the validation examples it was chosen by {self.validation:.6g}."
        )


def tune(
    make: "Callable[..., Experiment]",
    space: Space,
    *,
    trials: int | None = None,
    search: Literal["random", "grid", "tpe"] = "random",
    metric: str | None = None,
    validation: float = 0.2,
    seeds: Sequence[int] = (0,),
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
    **run: Any,
) -> Tuned:
    """Search for settings of an experiment.

    Args:
        make: `make(seed=..., **settings)` gives the experiment of a run, such as an app's `experiment`. Its data is a
            dataset with test examples.
        space: setting -> a list of values, or a range from `atoll.space`.
        trials: settings to try; default 20, and all of a grid.
        search: "random" draws them, "grid" takes all combinations of lists, "tpe" draws near what did well so far.
        metric: chosen by: "loss" or a metric of the model; default its first one, else the loss. Of the personal models
            where the method has them, else of the global one.
        validation: fraction of each client's training examples to choose by, where the data have no validation
            examples; the same cut in every trial.
        seeds: runs of each setting, whose mean counts; all must have the same test examples.
        seed: of the search.
        on_trial: called after each trial.
        run: how to run, as for `Experiment.simulate`: engine, workers.

    A setting that is refused (an argument out of range, parts that do not fit together) or under which training fails
    is a trial without a value that says why; the search goes on.

    Returns:
        The chosen setting, its metric on test examples that had no part in the choice, and all trials.

    Raises:
        InvalidArgument: an empty space, an unknown metric or search, data without test examples, test examples that
            differ between seeds, or settings all of which were refused or failed.
        CompositionError: a private run, whose ledger would not count the other trials.
    """
    _check_space(space, search)
    if not seeds or len(set(seeds)) != len(seeds):
        raise invalid("seeds", list(seeds), "different seeds, at least one")
    if "seed" in space:
        raise invalid("space", "seed", "made of other settings", "Runs of each setting are asked for by seeds=(0, 1).")
    if forbidden := {"splits", "evaluate_every", "directory", "resume", "metric", "split"} & set(run):
        raise invalid("run", sorted(forbidden), "left out", "What trials look at, and when, is what tune decides.")
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise invalid("trials", trials, "a number of settings of at least 1")
    looked = _Looked(make, tuple(seeds), validation, metric, run)
    tried = list[Trial]()
    best: tuple[Trial, tuple[Result, ...]] | None = None
    for settings, tell in _settings(space, search, trials, seed, looked):
        trial, results = looked.trial(settings)
        tried.append(trial)
        tell(trial.value)
        if math.isfinite(trial.value) and (
            best is None or looked.better * (trial.value - best[0].value) > 0
        ):  # of equals the first
            best = trial, results
        if on_trial is not None:
            on_trial(trial)
    if best is None:
        refused = sum(t.refused for t in tried)
        what = (
            "training failed under"
            if not refused
            else "experiments refused"
            if refused == len(tried)
            else f"training failed or was refused ({refused}) under"
        )
        raise InvalidArgument(f"{what} all {len(tried)} settings; the last said: {tried[-1].error}")
    chosen, results = best
    tests = looked.tests(results)
    name = looked.metric
    return Tuned(
        chosen.settings, name, looked.better, chosen.value, interval(tests[name]), tests, tuple(tried), results
    )


class _Looked:
    """Runs settings and looks at validation examples; at test examples only when asked for the chosen ones."""

    def __init__(
        self,
        make: "Callable[..., Experiment]",
        seeds: tuple[int, ...],
        validation: float,
        metric: str | None,
        run: Mapping[str, Any],
    ) -> None:
        self._make, self._seeds, self._validation, self._run = make, seeds, validation, dict(run)
        self.metric, self.better = metric or "", 0
        self._data: dict[int, FederatedDataset] = {}
        self._test: str | None = None

    def trial(self, settings: Mapping[str, Any]) -> "tuple[Trial, tuple[Result, ...]]":
        """A setting's runs, and what the validation examples say of them."""
        values, results = list[float](), list["Result"]()
        for seed in self._seeds:
            try:
                experiment = self._make(**{**settings, "seed": seed})
            except _REFUSALS as error:
                return Trial(dict(settings), math.nan, (), str(error), refused=True), ()
            data = self._cut(experiment, seed)
            stopped = experiment.stop is not None
            quiet = {"progress": False, "evaluate_every": experiment.evaluate_every if stopped else 0}
            try:
                result = replace(experiment, data=data).simulate(splits=("validation",), **{**quiet, **self._run})
            except NonFiniteError as error:
                return Trial(dict(settings), math.nan, (), str(error)), ()
            except _REFUSALS as error:
                return Trial(dict(settings), math.nan, (), str(error), refused=True), ()
            found = result.evaluate(data, split="validation", personal=result.personalised)
            if not self.metric:
                self.metric = found.names[min(1, len(found.names) - 1)]
            if self.metric not in found.names:
                raise unknown("metric", self.metric, list(found.names))
            self.better = found.better[found.names.index(self.metric)]
            values.append(found.metrics[self.metric])
            results.append(result)
        return Trial(dict(settings), sum(values) / len(values), tuple(values)), tuple(results)

    def tests(self, results: "Sequence[Result]") -> dict[str, tuple[float, ...]]:
        """Metrics on the test examples, one value for each seed."""
        found = [
            result.evaluate(self._data[seed], split="test", personal=result.personalised)
            for seed, result in zip(self._seeds, results, strict=True)
        ]
        return {name: tuple(f.metrics[name] for f in found) for name in found[0].names}

    def _cut(self, experiment: "Experiment", seed: int) -> FederatedDataset:
        """The experiment's data with validation examples; the same test examples in every run."""
        noisy = [p for p in experiment.algorithm.plans if p.privacy is not None]
        if noisy or any(stage.protects for stage in experiment.transforms):
            raise CompositionError(
                "tune cannot search for settings of a private run: every trial looks at the same examples, which the "
                "ledger of the chosen run would not count. Tune on public examples, or fix the settings beforehand."
            )
        data: Any = experiment.data
        if not isinstance(data, FederatedDataset):
            raise invalid("data", data, "a FederatedDataset", "Bind a recipe first: experiment.bind(source).")
        if data.test is None or not len(data.test):
            raise InvalidArgument(
                "tune tells what the chosen setting is worth on test examples that no choice has looked at, and the "
                "data have none: cut some with data.split(test=0.2)."
            )
        told = digest(*data.test.fields.values(), data.test.offsets)
        if self._test not in (None, told):
            raise InvalidArgument(
                "the runs of a search have different test examples: those of one would be trained on or chosen by in "
                "another. Cut the data with a seed of their own, not that of the run."
            )
        self._test = told
        if not data.has("validation"):
            data = data.split(test=0.0, validation=self._validation, seed=CUT_SEED)
        self._data[seed] = data
        return data


def _check_space(space: Space, search: str) -> None:
    if search not in ("random", "grid", "tpe"):
        raise invalid("search", search, '"random", "grid" or "tpe"')
    if not space:
        raise invalid("space", dict(space), "at least one setting with its values")
    for name, values in space.items():
        if isinstance(values, Range):
            if search == "grid":
                raise invalid("space", {name: values}, "made of lists for a grid", 'Or use search="random".')
        elif isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise invalid("space", {name: values}, "a list of values, or a range such as atoll.space.log(1e-3, 1)")


def _settings(space: Space, search: str, trials: int | None, seed: int, looked: _Looked) -> Any:
    """Settings one after the other, each with what its value is to be told to."""
    if search == "grid":
        lists = [cast("Sequence[Any]", values) for values in space.values()]
        for values in itertools.islice(itertools.product(*lists), trials):
            yield dict(zip(space, values, strict=True)), lambda value: None
        return
    try:
        import optuna
    except ImportError as error:
        raise InvalidArgument(
            f"search={search!r} needs optuna, which cannot be imported ({error}): `pip install atoll[tune]`, or use "
            'search="grid".'
        ) from error
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    known = {name: _distribution(optuna.distributions, values) for name, values in space.items()}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        # Whether higher is better is known after the first trial: what is told is turned so that it is.
        study = optuna.create_study(direction="maximize", sampler=samplers[search](seed=seed))
        for _ in range(trials or 20):
            asked = study.ask(known)
            drawn = asked.params
            settings = {n: drawn[n] if isinstance(v, Range) else v[drawn[n]] for n, v in space.items()}

            def tell(value: float, asked: Any = asked) -> None:
                if math.isfinite(value):
                    study.tell(asked, looked.better * value)
                else:
                    study.tell(asked, state=optuna.trial.TrialState.FAIL)

            yield settings, tell
    finally:
        optuna.logging.set_verbosity(level)


def _distribution(kinds: Any, values: "Sequence[Any] | Range") -> Any:
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(list(range(len(values))))  # places: values may be anything
    if values.whole:
        return kinds.IntDistribution(int(values.low), int(values.high))
    return kinds.FloatDistribution(values.low, values.high, log=values.scale == "log")
