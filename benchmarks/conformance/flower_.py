"""Flower: its strategies, which are the server's half, fed with replies of clients that train as its examples do.

What a client does is its user's code in Flower. The adapter's client takes plain steps; for `FedProx` it adds the
proximal term with the strength that the strategy sends it, as Flower's documentation tells users to.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from adapters import report
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from atoll.conformance import Client, Problem, Unsupported


class Members:
    """What a strategy asks of the grid: who is there."""

    def __init__(self) -> None:
        self.count = 0

    def get_node_ids(self) -> list[int]:
        """Numbers of the nodes."""
        return list(range(1, self.count + 1))


def strategy(problem: Problem) -> FedAvg:
    """Flower's strategy for a method."""
    o, common = problem.options, {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    match problem.method:
        case "fedavg":
            return FedAvg(**common)
        case "fedprox":
            return FedProx(**common, proximal_mu=o["mu"])
        case "fedavgm":
            return FedAvgM(**common, server_learning_rate=o["server_lr"], server_momentum=o["momentum"])
        case "fedadagrad":
            return FedAdagrad(**common, eta=o["server_lr"], tau=o["tau"])
        case "fedadam":
            return FedAdam(**common, eta=o["server_lr"], beta_1=o["beta1"], beta_2=o["beta2"], tau=o["tau"])
        case "fedyogi":
            return FedYogi(**common, eta=o["server_lr"], beta_1=o["beta1"], beta_2=o["beta2"], tau=o["tau"])
        case other:
            raise Unsupported(f"no strategy for {other}")


def train(problem: Problem, client: Client, start: Tensor, mu: float) -> Tensor:
    """A client's parameters after its passes."""
    w = start.clone().requires_grad_()
    x, y = torch.tensor(client.inputs, dtype=torch.float64), torch.tensor(client.targets, dtype=torch.float64)
    optimizer = torch.optim.SGD([w], lr=problem.lr)
    for _ in range(problem.epochs):
        for begin in range(0, len(y), problem.batch):
            output, target = x[begin : begin + problem.batch] @ w, y[begin : begin + problem.batch]
            if problem.loss == "squared":
                loss = (output - target).square().mean()
            else:
                loss = torch.nn.functional.softplus(-target * output).mean()
            optimizer.zero_grad()
            (loss + mu / 2 * (w - start).square().sum()).backward()
            optimizer.step()
    return w.detach()


def adapter(problem: Problem) -> Sequence[Sequence[float]]:
    """Run a problem."""
    server, grid, path = strategy(problem), Members(), []
    arrays = ArrayRecord([np.array(problem.start)])
    for number in range(problem.rounds):
        cohort = problem.cohort(number)
        grid.count = len(cohort)
        asked: Any = server.configure_train(number + 1, arrays, ConfigRecord({}), grid)
        replies = []
        for message, client in zip(asked, cohort, strict=True):
            config = message.content["config"]
            start = torch.from_numpy(message.content["arrays"].to_numpy_ndarrays()[0].copy())
            end = train(problem, client, start, float(config.get("proximal-mu", 0.0)))
            weight = len(client.targets) if problem.weights == "examples" else 1
            content = {"arrays": ArrayRecord([end.numpy()]), "metrics": MetricRecord({"num-examples": weight})}
            replies.append(Message(content=RecordDict(content), reply_to=message))
        arrays, _ = server.aggregate_train(number + 1, replies)
        path.append(arrays.to_numpy_ndarrays()[0].tolist())
    return path


if __name__ == "__main__":
    # Messages can be made inside a running task alone; this process is none.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    report(adapter, {name: version(name) for name in ("flwr", "torch")})
