"""Federated learning: train, personalise and evaluate models over data that stays with its owners."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported when they are first used, so that `import atoll` and `atoll --help` load neither torch nor pandas.
_MODULES = (
    "aggregators",
    "attacks",
    "datasets",
    "errors",
    "losses",
    "metrics",
    "partition",
    "privacy",
    "rate",
    "sampling",
    "server",
    "transforms",
)
_NAMES = {
    "Experiment": "experiment",
    "FederatedDataset": "data",
    "Model": "model",
    "Process": "rounds",
    "Record": "history",
    "Result": "result",
    "apfl": "algorithms",
    "cyclic": "algorithms",
    "ditto": "algorithms",
    "evaluate": "evaluation",
    "fedadagrad": "algorithms",
    "fedadam": "algorithms",
    "fedavg": "algorithms",
    "fedavgm": "algorithms",
    "fedbabu": "algorithms",
    "fedbn": "algorithms",
    "feddyn": "algorithms",
    "fedexp": "algorithms",
    "fednova": "algorithms",
    "fedper": "algorithms",
    "fedprox": "algorithms",
    "fedrep": "algorithms",
    "fedsgd": "algorithms",
    "fedyogi": "algorithms",
    "fine_tune": "algorithms",
    "ifca": "algorithms",
    "lg_fedavg": "algorithms",
    "local_only": "algorithms",
    "local_sgd": "local",
    "per_fedavg": "algorithms",
    "pfedme": "algorithms",
    "pooled": "algorithms",
    "process": "rounds",
    "qfedavg": "algorithms",
    "scaffold": "algorithms",
    "simulate": "simulation",
    "table": "data.table",
}

if TYPE_CHECKING:
    from atoll import (
        aggregators,
        attacks,
        datasets,
        errors,
        losses,
        metrics,
        partition,
        privacy,
        rate,
        sampling,
        server,
        transforms,
    )
    from atoll.algorithms import (
        apfl,
        cyclic,
        ditto,
        fedadagrad,
        fedadam,
        fedavg,
        fedavgm,
        fedbabu,
        fedbn,
        feddyn,
        fedexp,
        fednova,
        fedper,
        fedprox,
        fedrep,
        fedsgd,
        fedyogi,
        fine_tune,
        ifca,
        lg_fedavg,
        local_only,
        per_fedavg,
        pfedme,
        pooled,
        qfedavg,
        scaffold,
    )
    from atoll.data import FederatedDataset
    from atoll.data.table import table
    from atoll.evaluation import evaluate
    from atoll.experiment import Experiment
    from atoll.history import Record
    from atoll.local import local_sgd
    from atoll.model import Model
    from atoll.result import Result
    from atoll.rounds import Process, process
    from atoll.simulation import simulate

__all__ = [
    "Experiment",
    "FederatedDataset",
    "Model",
    "Process",
    "Record",
    "Result",
    "aggregators",
    "apfl",
    "attacks",
    "cyclic",
    "datasets",
    "ditto",
    "errors",
    "evaluate",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbabu",
    "fedbn",
    "feddyn",
    "fedexp",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "fedsgd",
    "fedyogi",
    "fine_tune",
    "ifca",
    "lg_fedavg",
    "local_only",
    "local_sgd",
    "losses",
    "metrics",
    "partition",
    "per_fedavg",
    "pfedme",
    "pooled",
    "privacy",
    "process",
    "qfedavg",
    "rate",
    "sampling",
    "scaffold",
    "server",
    "simulate",
    "table",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(f"atoll.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"atoll.{name}")
    else:
        # With name and obj, Python itself suggests the closest name there is.
        raise AttributeError(f"module 'atoll' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
