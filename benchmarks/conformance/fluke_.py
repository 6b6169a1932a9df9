"""fluke: its algorithms with their own clients, servers and loop, in double precision, evaluation off."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "speed" / "contestants"))
import stand_in

stand_in.torchvision()
import torch
from adapters import report
from fluke import FlukeENV
from fluke.algorithms import CentralizedFL
from fluke.algorithms.fedavg import FedAVG
from fluke.algorithms.fedavgm import FedAVGM
from fluke.algorithms.fednova import FedNova
from fluke.algorithms.fedopt import FedOpt
from fluke.algorithms.fedprox import FedProx
from fluke.algorithms.scaffold import SCAFFOLD
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver

from atoll.conformance import Client, Problem, Unsupported

Chosen = tuple[type[CentralizedFL], dict[str, Any], dict[str, Any]]


def method(problem: Problem) -> Chosen:
    """fluke's algorithm, and what its clients and its server are told besides the usual."""
    o = problem.options
    match problem.method:
        case "fedavg":
            return FedAVG, {}, {}
        case "fedprox":
            return FedProx, {"mu": o["mu"]}, {}
        case "fednova":
            return FedNova, {}, {}
        case "scaffold":
            if o["option"] != 2:
                raise Unsupported("control variates of option II alone")
            return SCAFFOLD, {}, {}
        case "feddyn":
            # A client divides alpha by its number of examples over the mean number, whatever weights the server gives.
            raise Unsupported("no equal alpha for clients of unequal size")
        case "fedavgm":
            return FedAVGM, {}, {"momentum": o["momentum"]}
        case "fedadagrad":
            return FedOpt, {}, {"mode": "adagrad", "lr": o["server_lr"], "beta1": o["beta1"], "tau": o["tau"]}
        case "fedadam" | "fedyogi":
            betas = {"beta1": o["beta1"], "beta2": o["beta2"]}
            return FedOpt, {}, {"mode": problem.method[3:], "lr": o["server_lr"], "tau": o["tau"], **betas}
        case other:
            raise Unsupported(f"no method {other}")


def adapter(problem: Problem) -> Sequence[Sequence[float]]:
    """Run a problem."""
    kind, client, server = method(problem)
    model = torch.nn.Linear(len(problem.start), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([problem.start], dtype=torch.float64))

    def loader(client: Client) -> FastDataLoader:
        x, y = torch.tensor(client.inputs, dtype=torch.float64), torch.tensor(client.targets, dtype=torch.float64)
        return FastDataLoader(x, y[:, None], num_labels=1, batch_size=problem.batch, skip_singleton=False)

    count = len(problem.clients)
    held = DummyDataContainer([loader(c) for c in problem.clients], [None] * count, None, num_classes=1)
    settings = {
        "model": model,
        "client": {
            "batch_size": problem.batch,
            "local_epochs": problem.epochs,
            "loss": "MSELoss" if problem.loss == "squared" else "SoftMarginLoss",
            "optimizer": {"name": "SGD", "lr": problem.lr},
            "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
            **client,
        },
        "server": {"weighted": problem.weights == "examples", **server},
    }
    FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    algorithm = kind(count, DataSplitter(held), settings)
    if problem.method == "fedavgm":
        # FedAVGMServer hands no rate on to the server it is made from, which reads it here.
        algorithm.server.hyper_params.update(lr=problem.options["server_lr"])
    path: list[list[float]] = []

    def cohort(share: float) -> list[Any]:
        """Stands in for the server's draw of clients alone."""
        names = [c.name for c in problem.cohort(len(path))]
        return [algorithm.clients[i] for i, c in enumerate(problem.clients) if c.name in names]

    class Written(FederationObserver):
        """Writes the server's parameters down."""

        def end_round(self, round: int) -> None:
            """A round ends here."""
            path.append(algorithm.server.model.weight.detach().flatten().tolist())

    algorithm.server.get_eligible_clients = cohort
    algorithm.set_callbacks([Written()])
    algorithm.run(n_rounds=problem.rounds, eligible_perc=1.0)
    return path


if __name__ == "__main__":
    report(adapter, {name: version(name) for name in ("fluke-fl", "torch")})
