"""fluke: its centralised federated averaging, clients and server made by hand of its own classes, evaluation off."""

from typing import Any

import stand_in
from harness import begin, reader
from workloads import LR


def main() -> None:
    options = reader(__doc__).parse_args()
    stand_in.torchvision()
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
