"""The object that says everything about a run, and files (`app.py`) that define one."""

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from atoll.aggregators import Aggregator
from atoll.algorithms import Algorithm
from atoll.errors import InvalidArgument, invalid, unknown
from atoll.model import Model
from atoll.result import Result
from atoll.sampling import Sampler
from atoll.schedule import Schedule
from atoll.simulation import simulate
from atoll.stopping import EarlyStopping
from atoll.transforms import Channel, Downlink, Transform

if TYPE_CHECKING:
    from atoll.data import FederatedDataset
    from atoll.data.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Everything that decides a run; arguments as for `atoll.simulate`.

    `data` is a dataset, or a recipe such as `atoll.table(client=..., target=...)` that is bound to a source when the
    experiment is run.
    """

    model: Model
    data: "FederatedDataset | Table"
    algorithm: Algorithm
    rounds: int
    cohort: int | float | Sampler | None = None
    transforms: Sequence[Transform] = ()
    channel: str | Channel = "plain"
    downlink: Downlink | Sequence[Transform] = ()
    aggregator: Aggregator | None = None
    server_data: Any = None
    schedule: Schedule | None = None
    initial: Tensor | None = None
    evaluate_every: int = 1
    splits: Sequence[str] | None = None
    stop: EarlyStopping | None = None
    seed: int = 0
    precision: str = "full"
    title: str = ""
    source: str | Path | None = field(default=None)

    def bind(self, source: Any) -> "Experiment":
        """The experiment over a source of data: a path or a frame for its recipe.

        Raises:
            InvalidArgument: the experiment brings its own data.
        """
        from atoll.data.table import Table

        if not isinstance(self.data, Table):
            raise invalid(
                "data", source, "left out", "This experiment brings its own data; a recipe (atoll.table) takes one."
            )
        return replace(self, data=self.data.bind(source))

    def simulate(self, **run: Any) -> Result:
        """Run the experiment on this machine.

        Args:
            run: how to run it: engine, directory, resume, checkpoint_every, callbacks, progress.
        """
        from atoll.data.table import Table

        if isinstance(self.data, Table):
            if self.source is None:
                raise InvalidArgument(
                    "the experiment's data is a recipe and has no source yet: give one with "
                    "`atoll run app.py --data PATH` or experiment.bind(path)."
                )
            return self.bind(self.source).simulate(**run)
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        model, data = arguments.pop("model"), arguments.pop("data")
        return simulate(model, data, **{**arguments, **run})


Factory = Callable[..., Experiment]
"""`experiment(*, name: type = default, ...) -> Experiment`, as an app file defines it."""


def load_app(path: str | Path) -> Factory:
    """The `experiment` function of an app file.

    Raises:
        InvalidArgument: no such file, or it defines no `experiment` function with keyword parameters.
    """
    file = Path(path)
    if not file.is_file():
        raise invalid("app", str(path), "the path of a Python file that defines experiment()")
    name = f"atoll_app_{file.resolve().parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    factory = getattr(module, "experiment", None)
    if not callable(factory):
        raise InvalidArgument(
            f"{file} defines no experiment(): write `def experiment(*, rounds: int = 50) -> atoll.Experiment`."
        )
    return cast(Factory, factory)


def parameters(factory: Factory) -> dict[str, inspect.Parameter]:
    """The parameters an app's experiment takes, with their annotated types resolved."""
    hints = get_type_hints(factory)
    found = inspect.signature(factory).parameters
    return {n: p.replace(annotation=hints.get(n, type(p.default))) for n, p in found.items()}


def configure(factory: Factory, settings: Mapping[str, str]) -> Experiment:
    """Call an app's experiment with settings given as text.

    Args:
        factory: from `load_app`.
        settings: parameter name -> text, converted by the parameter's annotated type (int, float, bool, str, or one of
            these or None).

    Raises:
        InvalidArgument: an unknown parameter, or text that its type does not allow.
    """
    known = parameters(factory)
    arguments: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in known:
            raise unknown("--set", name, list(known))
        arguments[name] = convert(name, text, known[name].annotation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what modules draw for their first values is the same in every process
        experiment = factory(**arguments)
    if not isinstance(experiment, Experiment):
        raise InvalidArgument(f"experiment() returned {type(experiment).__name__}: it must return an atoll.Experiment.")
    return experiment


def convert(name: str, text: str, annotation: Any) -> Any:
    """Text as a value of an annotated type."""
    choices = list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    if type(None) in choices and text.lower() == "none":
        return None
    for kind in (c for c in choices if c is not type(None)):
        if get_origin(kind) is Literal:
            if text in [str(v) for v in get_args(kind)]:
                return next(v for v in get_args(kind) if str(v) == text)
            continue
        if kind is bool:
            if text.lower() in ("true", "yes", "1", "false", "no", "0"):
                return text.lower() in ("true", "yes", "1")
            continue
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    wanted = " or ".join(getattr(c, "__name__", str(c)) for c in choices)
    raise invalid(f"--set {name}", text, f"a value of type {wanted}")
