"""Flower's simulation on Ray: a ServerApp, a ClientApp, one actor of one thread for each core.

Evaluation, logging and telemetry are off. Examples lie in files that every actor maps, made before the simulation
starts. The cohort's clients are named in the messages, so that every contestant trains the same ones.

What a client does is its user's code. In the style "lean" the module is kept between messages and trained by the lean
step of the hand-written loop; in the style "documented" it is made for each message, and trained with a DataLoader and
an optimiser, as Flower's own quickstart for PyTorch does.
"""

import functools
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from harness import Race, begin, reader, workloads
from modules import descend, module
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

client_app = ClientApp()


@functools.cache
def held(name: str, small: bool, folder: str) -> tuple[workloads.Workload, nn.Module, Tensor, Tensor, Any]:
    """What an actor keeps between messages."""
    torch.set_num_threads(1)
    load = workloads.WORKLOADS[name]
    load = workloads.smaller(load) if small else load
    x, y, offsets = (np.load(Path(folder) / f"{part}.npy", mmap_mode="c") for part in ("x", "y", "offsets"))
    return load, module(load), torch.from_numpy(x), torch.from_numpy(y), offsets


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    config = message.content["config"]
    load, network, x, y, offsets = held(config["workload"], config["small"], config["folder"])
    documented = config["style"] == "documented"
    if documented:
        network = module(load)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = config["client"]
    begin_, end = int(offsets[client]), int(offsets[client + 1])
    x, y = x[begin_:end], y[begin_:end]
    if documented:
        loader = DataLoader(TensorDataset(x, y), batch_size=load.batch, shuffle=not config["fixed"])
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(network.parameters(), lr=workloads.LR)
        for inputs, labels in loader:
            optimizer.zero_grad()
            criterion(network(inputs), labels).backward()
            optimizer.step()
    else:
        if not config["fixed"]:
            order = torch.from_numpy(workloads.order(load, config["number"], client, end - begin_))
            x, y = x[order], y[order]
        descend(network, list(network.parameters()), x, y, load.batch, workloads.LR)
    reply = {
        "arrays": ArrayRecord(network.state_dict()),
        "metrics": MetricRecord({"num-examples": end - begin_}),
    }
    return Message(content=RecordDict(reply), reply_to=message)


class Timed(FedAvg):
    """Federated averaging that trains the clients it is told and reads the clock when a round is aggregated."""

    def __init__(self, race: Race, folder: str) -> None:
        super().__init__(fraction_train=race.load.cohort / race.load.clients, fraction_evaluate=0.0)
        self.race, self.folder, self.turns = race, folder, race.cohorts()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each client of the cohort."""
        while len(nodes := list(grid.get_node_ids())) < self.race.load.clients:
            pass
        options = self.race.options
        common = {
            "workload": options.workload,
            "small": options.small,
            "fixed": options.fixed,
            "folder": self.folder,
            "style": options.style,
            "number": server_round - 1,
        }
        return [
            Message(
                content=RecordDict({"arrays": arrays, "config": ConfigRecord({**common, "client": client})}),
                message_type="train",
                dst_node_id=node,
            )
            for client, node in zip(self.turns[server_round - 1], sorted(nodes), strict=False)
        ]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The mean of the models by examples; a round ends here."""
        found = super().aggregate_train(server_round, replies)
        self.race.stop()
        return found


def main() -> None:
    parser = reader(__doc__)
    parser.add_argument("--style", choices=("lean", "documented"), default="lean", help="how a client trains")
    options = parser.parse_args()
    import ray
    from flwr.simulation import run_simulation

    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    race = begin("flower", options)
    final: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").exists() else None) as folder:
        for part in ("x", "y", "offsets"):
            np.save(Path(folder) / f"{part}.npy", getattr(race.data, part))
        server_app = ServerApp()

        @server_app.main()
        def serve(grid: Grid, context: Context) -> None:
            strategy = Timed(race, folder)
            race.start()
            result = strategy.start(grid, ArrayRecord(module(race.load).state_dict()), num_rounds=race.total)
            values = {name: value.numpy() for name, value in result.arrays.to_torch_state_dict().items()}
            final["vector"] = workloads.flat(values, race.load)
            # Flower ends its actors before it returns: the report, and the memory in it, must be made here.
            variant = f"{options.style}, {os.cpu_count()} actors of one thread"
            race.report(final["vector"], variant, ("torch", "numpy", "flwr", "ray"))

        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=race.load.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": os.cpu_count(), "log_to_driver": False, "logging_level": "error"},
            },
        )
        ray.shutdown()


if __name__ == "__main__":
    # Under its own name, so that actors import this module instead of receiving a copy of what it holds.
    from flower import main as play

    play()
