"""fluke: its centralised federated averaging, clients and server made by hand of its own classes, evaluation off.

fluke imports torchvision for data sets and networks that are not used here, and torchvision's wheel does not fit the
build of torch that everybody shares: it finds an empty stand-in instead.
"""

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

from harness import begin, reader
from workloads import LR


def stand_in() -> None:
    """Modules named torchvision whose every attribute is an empty class."""

    def missing(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    for part in ("", ".datasets", ".datasets.utils", ".models", ".transforms"):
        made = types.ModuleType(f"torchvision{part}")
        made.__spec__ = ModuleSpec(made.__name__, None)
        made.__getattr__ = missing  # type: ignore[method-assign]
        sys.modules[made.__name__] = made


def main() -> None:
    options = reader(__doc__).parse_args()
    stand_in()
    import torch
    from fluke import FlukeENV
    from fluke.algorithms import CentralizedFL
    from fluke.client import Client
    from fluke.config import OptimizerConfigurator
    from fluke.data import FastDataLoader
    from fluke.server import Server
    from fluke.utils import FederationObserver
    from modules import module, tensors, vector

    torch.set_num_threads(options.threads)
    race = begin("fluke", options)
    load, data = race.load, race.data
    x, y = tensors(data)
    FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    optimizer = OptimizerConfigurator({"name": torch.optim.SGD, "lr": LR})
    clients = [
        Client(
            index=client,
            train_set=FastDataLoader(
                x[data.of(client)],
                y[data.of(client)],
                num_labels=load.classes,
                batch_size=load.batch,
                shuffle=not options.fixed,
                skip_singleton=False,
            ),
            test_set=None,
            optimizer_cfg=optimizer,
            loss_fn=torch.nn.CrossEntropyLoss(),
            local_epochs=1,
            persistency=False,
        )
        for client in range(load.clients)
    ]
    turns = iter(race.cohorts())

    class Told(Server):
        """Federated averaging that trains the clients it is told."""

        def get_eligible_clients(self, eligible_perc: float) -> list[Client]:
            """The round's cohort."""
            return [self.clients[client] for client in next(turns)]

    class Clock(FederationObserver):
        """Reads the clock after each round."""

        def end_round(self, round: int) -> Any:
            """A round ends here."""
            race.stop()
            if len(race.seconds) == race.total:  # fluke goes on to evaluate everybody
                race.report(vector(server.model), f"{options.threads} thread(s)", ("torch", "numpy", "fluke-fl"))

    server = Told(model=module(load), test_set=None, clients=clients, weighted=True)
    algorithm = CentralizedFL(len(clients), None, {}, clients=clients, server=server)
    algorithm.set_callbacks([Clock()])
    race.start()
    algorithm.run(n_rounds=race.total, eligible_perc=load.cohort / load.clients)


if __name__ == "__main__":
    main()
