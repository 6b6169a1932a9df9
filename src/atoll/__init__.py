"""Federated learning: train, personalise and evaluate models over data that stays with its owners."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported when they are first used, so that `import atoll` and `atoll --help` load neither torch nor pandas.
_MODULES = (
    "aggregators",
    "attacks",
    "conformance",
    "datasets",
    "errors",
    "losses",
    "metrics",
    "partition",
    "privacy",
    "rate",
    "sampling",
    "schedule",
    "server",
    "space",
    "transforms",
)
_NAMES = {
    "Experiment": "experiment",
    "FederatedDataset": "data",
    "Model": "model",
    "Process": "rounds",
    "Record": "history",
    "Result": "result",
    "align": "transfer",
    "apfl": "algorithms",
    "cyclic": "algorithms",
    "distill": "transfer",
    "ditto": "algorithms",
    "early_stopping": "stopping",
    "evaluate": "evaluation",
    "fed3r": "algorithms",
    "fedadagrad": "algorithms",
    "fedadam": "algorithms",
    "fedala": "algorithms",
    "fedavg": "algorithms",
    "fedavgm": "algorithms",
    "fedbabu": "algorithms",
    "fedbn": "algorithms",
    "feddyn": "algorithms",
    "fedexp": "algorithms",
    "fedncm": "algorithms",
    "fednova": "algorithms",
    "fedper": "algorithms",
    "fedprox": "algorithms",
    "fedrep": "algorithms",
    "fedsgd": "algorithms",
    "fedyogi": "algorithms",
    "features": "transfer",
    "fine_tune": "algorithms",
    "from_keras": "keras",
    "freeze": "transfer",
    "ifca": "algorithms",
    "lg_fedavg": "algorithms",
    "local_only": "algorithms",
    "local_sgd": "local",
    "lora": "transfer",
    "moon": "algorithms",
    "per_fedavg": "algorithms",
    "pfedme": "algorithms",
    "pooled": "algorithms",
    "pretrained": "transfer",
    "process": "rounds",
    "qfedavg": "algorithms",
    "scaffold": "algorithms",
    "simulate": "simulation",
    "table": "data.table",
    "tune": "tuning",
}

if TYPE_CHECKING:
    from atoll import (
        aggregators,
        attacks,
        conformance,
        datasets,
        errors,
        losses,
        metrics,
        partition,
        privacy,
        rate,
        sampling,
        schedule,
        server,
        space,
        transforms,
    )
    from atoll.algorithms import (
        apfl,
        cyclic,
        ditto,
        fed3r,
        fedadagrad,
        fedadam,
        fedala,
        fedavg,
        fedavgm,
        fedbabu,
        fedbn,
        feddyn,
        fedexp,
        fedncm,
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
        moon,
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
    from atoll.keras import from_keras
    from atoll.local import local_sgd
    from atoll.model import Model
    from atoll.result import Result
    from atoll.rounds import Process, process
    from atoll.simulation import simulate
    from atoll.stopping import early_stopping
    from atoll.transfer import align, distill, features, freeze, lora, pretrained
    from atoll.tuning import tune

__all__ = [
    "Experiment",
    "FederatedDataset",
    "Model",
    "Process",
    "Record",
    "Result",
    "aggregators",
    "align",
    "apfl",
    "attacks",
    "conformance",
    "cyclic",
    "datasets",
    "distill",
    "ditto",
    "early_stopping",
    "errors",
    "evaluate",
    "features",
    "fed3r",
    "fedadagrad",
    "fedadam",
    "fedala",
    "fedavg",
    "fedavgm",
    "fedbabu",
    "fedbn",
    "feddyn",
    "fedexp",
    "fedncm",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "fedsgd",
    "fedyogi",
    "fine_tune",
    "freeze",
    "from_keras",
    "ifca",
    "lg_fedavg",
    "local_only",
    "local_sgd",
    "lora",
    "losses",
    "metrics",
    "moon",
    "partition",
    "per_fedavg",
    "pfedme",
    "pooled",
    "pretrained",
    "privacy",
    "process",
    "qfedavg",
    "rate",
    "sampling",
    "scaffold",
    "schedule",
    "server",
    "simulate",
    "space",
    "table",
    "transforms",
    "tune",
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
