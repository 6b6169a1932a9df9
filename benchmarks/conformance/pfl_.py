"""pfl-research: its algorithms on its simulated backend, with central optimisers of torch, as its documentation has it.

Models and steps are in double precision. What pfl hands from a client to the server is in single precision always.
"""

import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")
import torch
from adapters import report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints, WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.algorithm.fedprox import FedProx, FedProxParams
from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.user_state import InMemoryUserStateStorage
from pfl.hyperparam.base import HyperParam, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional

from atoll.conformance import Problem, Unsupported


class Linear(nn.Linear):
    """A linear model with the loss and the metrics pfl asks for."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(len(problem.start), 1, bias=False, dtype=torch.float64)
        self.squared = problem.loss == "squared"
        with torch.no_grad():
            self.weight.copy_(torch.tensor([problem.start], dtype=torch.float64))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        output = self(x)[:, 0]
        return (output - y).square().mean() if self.squared else functional.softplus(-y * output).mean()

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


def central(problem: Problem, network: nn.Module) -> torch.optim.Optimizer:
    """The server's optimiser."""
    o, values = problem.options, network.parameters()
    match problem.method:
        case "fedavg" | "fedprox" | "scaffold":
            return torch.optim.SGD(values, lr=1.0)
        case "fedavgm":
            return torch.optim.SGD(values, lr=o["server_lr"], momentum=o["momentum"])
        case "fedadagrad":
            return torch.optim.Adagrad(values, lr=o["server_lr"], initial_accumulator_value=o["tau"] ** 2, eps=o["tau"])
        case "fedadam":
            return torch.optim.Adam(values, lr=o["server_lr"], betas=(o["beta1"], o["beta2"]), eps=o["tau"])
        case other:
            raise Unsupported(f"no method {other}")


def adapter(problem: Problem) -> Sequence[Sequence[float]]:
    """Run a problem."""
    network, path = Linear(problem), []
    model = PyTorchModel(network, torch.optim.SGD, central(problem, network))

    class Written(TrainingProcessCallback):
        """Writes the server's parameters down."""

        def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
            """A round ends here."""
            path.append(network.weight.detach().flatten().tolist())
            return False, Metrics()

    class Size(HyperParam):
        """How many take part in the next round."""

        def value(self) -> int:
            """Its value now."""
            return len(problem.cohort(len(path)))

    # Evaluation would come with the first round and every so many after it; without a cohort for it there is none.
    common = {
        "central_num_iterations": problem.rounds,
        "evaluation_frequency": problem.rounds + 1,
        "train_cohort_size": Size(),
        "val_cohort_size": 0,
    }
    match problem.method:
        case "fedprox":
            algorithm, params = FedProx(), FedProxParams(**common, mu=problem.options["mu"])
        case "scaffold":
            params = SCAFFOLDParams(
                **common,
                population=len(problem.clients),
                use_gradient_as_control_variate=problem.options["option"] == 1,
                user_state_storage=InMemoryUserStateStorage(),
            )
            algorithm = SCAFFOLD()
        case _:
            algorithm, params = FederatedAveraging(), NNAlgorithmParams(**common)
    users = {
        c.name: Dataset(
            [torch.tensor(c.inputs, dtype=torch.float64), torch.tensor(c.targets, dtype=torch.float64)], user_id=c.name
        )
        for c in problem.clients
    }
    turns = iter([c.name for number in range(problem.rounds) for c in problem.cohort(number)])
    weighting = WeightByDatapoints() if problem.weights == "examples" else WeightByUser()
    algorithm.run(
        algorithm_params=params,
        backend=SimulatedBackend(
            training_data=FederatedDataset(users.__getitem__, lambda: next(turns)),
            val_data=FederatedDataset(users.__getitem__, lambda: next(turns)),
            postprocessors=[weighting],
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=problem.epochs, local_learning_rate=problem.lr, local_batch_size=problem.batch
        ),
        callbacks=[Written()],
        send_metrics_to_platform=False,
    )
    return path


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    report(adapter, {name: version(name) for name in ("pfl", "torch")})
