"""FedJAX on the CPU: its `federated_averaging` with the jit backend, its default on a CPU.

(Its other backend needs functions that the installed jax no longer has.) The model is plain jax functions. FedJAX fills
the last batch of a client whose size is no multiple of the batch with examples it has seen, so that on ragged clients
its models differ a little from everybody else's.
"""

import os
import sys
from typing import Any

from harness import begin, reader
from workloads import LR, Layer, flat, initial

Values = dict[str, Any]


def outputs(layers: tuple[Layer, ...], values: Values, prefix: str, x: Any) -> Any:
    """The model's outputs; for the layers of W1 to W6 and N1 to N5."""
    import jax
    import jax.numpy as jnp

    for i, layer in enumerate(layers):
        name = f"{prefix}{i}."
        match layer.kind:
            case "linear":
                x = x @ values[f"{name}weight"].T + values[f"{name}bias"]
            case "conv":
                x = jax.lax.conv_general_dilated(x, values[f"{name}weight"], (1, 1), "VALID")
                x = x + values[f"{name}bias"][:, None, None]
            case "pool":
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
            case "norm":
                middle = x - x.mean(axis=-1, keepdims=True)
                x = middle * jax.lax.rsqrt((middle**2).mean(axis=-1, keepdims=True) + 1e-5)
                x = x * values[f"{name}weight"] + values[f"{name}bias"]
            case "relu":
                x = jax.nn.relu(x)
            case "tanh":
                x = jnp.tanh(x)
            case "flatten":
                x = x.reshape(len(x), -1)
            case "residual":
                x = x + outputs(layer.inner, values, f"{name}inner.", x)
            case "embedding":
                x = values[f"{name}weight"][x]
            case "mean":
                x = x.mean(axis=1)
            case unknown:
                raise SystemExit(f"the FedJAX contestant has no layer {unknown!r}")
    return x


def main() -> None:
    options = reader(__doc__).parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if options.threads > 1 else 'false'}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    jax.tree_map = jax.tree_util.tree_map  # FedJAX's last release uses a name that jax has since moved
    import fedjax
    import numpy as np

    race = begin("fedjax", options)
    load, data = race.load, race.data
    if any(layer.kind in ("positions", "encoder") for layer in load.layers):
        sys.exit(f"the FedJAX contestant has no model for {load.name}")

    def loss(values: Values, batch: Values, rng: Any) -> Any:
        log_p = jax.nn.log_softmax(outputs(load.layers, values, "", batch["x"]))
        return -jnp.take_along_axis(log_p, batch["y"][:, None], axis=1).mean()

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        grad_fn=jax.grad(loss),
        client_optimizer=fedjax.optimizers.sgd(learning_rate=LR),
        server_optimizer=fedjax.optimizers.sgd(learning_rate=1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=load.batch, num_epochs=1, skip_shuffle=options.fixed, seed=None
        ),
    )
    y = data.y.astype(np.int32)
    x = data.x.astype(np.int32) if load.words else data.x
    sets = [fedjax.ClientDataset({"x": x[data.of(c)], "y": y[data.of(c)]}) for c in range(load.clients)]
    state = algorithm.init({name: jnp.asarray(value) for name, value in initial(load).items()})
    key = jax.random.PRNGKey(0)

    def turn(number: int, clients: list[int]) -> None:
        nonlocal state, key
        key, *own = jax.random.split(key, len(clients) + 1)
        state, _ = algorithm.apply(state, [(c, sets[c], k) for c, k in zip(clients, own, strict=True)])
        jax.block_until_ready(state.params)

    race.play(turn)
    vector = flat({name: np.asarray(value) for name, value in state.params.items()}, load)
    race.report(vector, f"{options.threads} thread(s)", ("jax", "numpy", "fedjax"))


if __name__ == "__main__":
    main()
