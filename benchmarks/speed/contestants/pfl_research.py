"""pfl-research: `FederatedAveraging` on its simulated backend, in one process.

Each user's data set is made once, of tensors that share memory with the packed examples; pfl takes batches in the order
they lie in, so that examples are shuffled once, before the clock starts. Evaluation is off.
"""

import logging
import os
from typing import Any

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import torch
from harness import begin, reader, workloads
from modules import module, tensors, vector
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional


class Trained(nn.Module):
    """A module with the loss pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The module's output."""
        return self.network(x)

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Mean cross-entropy of a batch."""
        return functional.cross_entropy(self.network(x), y)

    def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


def main() -> None:
    options = reader(__doc__).parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    race = begin("pfl_research", options)
    load, data = race.load, race.data
    x, y = tensors(data)
    users: dict[int, Dataset] = {}
    for client in range(load.clients):
        where = data.of(client)
        own = [x[where], y[where]]
        if not options.fixed:
            order = torch.from_numpy(workloads.order(load, 0, client, where.stop - where.start))
            own = [part[order] for part in own]
        users[client] = Dataset(own, user_id=str(client))
    names = iter([client for clients in race.cohorts() for client in clients])
    backend = SimulatedBackend(
        training_data=FederatedDataset(users.__getitem__, lambda: next(names)),
        val_data=FederatedDataset(users.__getitem__, lambda: 0),
        postprocessors=[WeightByDatapoints()],
    )
    network = Trained(module(load))
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )

    class Clock(TrainingProcessCallback):
        """Reads the clock after each round."""

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            """A round ends here."""
            race.stop()
            return False, Metrics()

    race.start()
    FederatedAveraging().run(
        # Evaluation would come with the first round and every so many after it; without a cohort for it there is none.
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=race.total,
            evaluation_frequency=race.total + 1,
            train_cohort_size=load.cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workloads.LR, local_batch_size=load.batch
        ),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    race.report(vector(network), f"{options.threads} thread(s)", ("torch", "numpy", "pfl"))


if __name__ == "__main__":
    main()
