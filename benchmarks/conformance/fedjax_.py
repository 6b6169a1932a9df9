"""FedJAX: its `fed_avg`, with the server optimisers it offers, and `fed_prox`, in double precision.

FedJAX's algorithms weigh clients by their numbers of examples. Equal weights are had by no setting.
"""

import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
import jax

jax.config.update("jax_enable_x64", True)
jax.tree_map = jax.tree_util.tree_map  # FedJAX's last release uses a name that jax has since moved
import fedjax
import jax.numpy as jnp
import numpy as np
from adapters import report

from atoll.conformance import Problem, Unsupported


def adapter(problem: Problem) -> Sequence[Sequence[float]]:
    """Run a problem."""
    o = problem.options
    sgd = fedjax.optimizers.sgd
    match problem.method:
        case "fedavg" | "fedprox":
            server = sgd(learning_rate=1.0)
        case "fedavgm":
            server = sgd(learning_rate=o["server_lr"], momentum=o["momentum"])
        case "fedadagrad":
            server = fedjax.optimizers.adagrad(
                learning_rate=o["server_lr"], initial_accumulator_value=o["tau"] ** 2, eps=o["tau"]
            )
        case "fedadam":
            server = fedjax.optimizers.adam(learning_rate=o["server_lr"], b1=o["beta1"], b2=o["beta2"], eps=o["tau"])
        case "fedyogi":
            server = fedjax.optimizers.yogi(learning_rate=o["server_lr"], b1=o["beta1"], b2=o["beta2"], eps=o["tau"])
        case other:
            raise Unsupported(f"no method {other}")
    if problem.weights == "uniform":
        raise Unsupported("no equal weights")

    def loss(values: Any, batch: Any) -> Any:
        output = batch["x"] @ values["w"]
        if problem.loss == "squared":
            return (output - batch["y"]) ** 2
        return jnp.log1p(jnp.exp(-batch["y"] * output))

    sizes = {len(c.targets) for c in problem.clients}
    if problem.batch >= max(sizes):
        # FedJAX fills a batch by going through the examples again. In a batch of a common multiple all stand equally
        # often, so that its gradient is that of all examples.
        batches = fedjax.ShuffleRepeatBatchHParams(math.lcm(*sizes), num_epochs=None, num_steps=problem.epochs, seed=0)
    else:
        batches = fedjax.ShuffleRepeatBatchHParams(problem.batch, num_epochs=problem.epochs, seed=0)
    local = sgd(learning_rate=problem.lr)
    if problem.method == "fedprox":
        algorithm = fedjax.algorithms.fed_prox.fed_prox(
            per_example_loss=lambda values, batch, rng: loss(values, batch), client_optimizer=local,
            server_optimizer=server, client_batch_hparams=batches, proximal_weight=o["mu"],
        )  # fmt: skip
    else:
        slope = jax.grad(lambda values, batch, rng: loss(values, batch).mean())
        algorithm = fedjax.algorithms.fed_avg.federated_averaging(slope, local, server, batches)
    held = {c.name: fedjax.ClientDataset({"x": np.array(c.inputs), "y": np.array(c.targets)}) for c in problem.clients}
    state = algorithm.init({"w": jnp.array(problem.start)})
    path = []
    for number in range(problem.rounds):
        keys = jax.random.split(jax.random.PRNGKey(number), len(problem.clients))
        members = [(c.name.encode(), held[c.name], k) for c, k in zip(problem.cohort(number), keys, strict=False)]
        state, _ = algorithm.apply(state, members)
        path.append(np.asarray(state.params["w"]).tolist())
    return path


if __name__ == "__main__":
    report(adapter, {name: version(name) for name in ("fedjax", "jax")})
