"""What a final model is compared by, computed in numpy alone: slow, and dependent on no framework."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from workloads import ARRAY, Layer, Packed, Workload, generator, shapes


def unflat(vector: ARRAY, load: Workload) -> dict[str, ARRAY]:
    """A vector [P] as named parameters."""
    made, begin = dict[str, ARRAY](), 0
    for name, shape in shapes(load).items():
        length = int(np.prod(shape))
        made[name] = vector[begin : begin + length].reshape(shape)
        begin += length
    return made


def digest(load: Workload, vector: ARRAY, data: Packed) -> dict[str, float]:
    """What a final model is compared by: its norm, its product with a fixed direction, its loss, test accuracy.

    The loss is the mean over the examples of the first ten clients.
    """
    values = unflat(vector, load)
    seen = slice(0, int(data.offsets[min(10, load.clients)]))
    log_p = _log_softmax(forward(load, values, data.x[seen]))
    direction = generator(load, 5).standard_normal(len(vector))
    found = {
        "norm": float(np.linalg.norm(vector.astype(np.float64))),
        "projection": float(vector.astype(np.float64) @ direction) / len(vector) ** 0.5,
        "loss": -float(np.take_along_axis(log_p, data.y[seen][:, None], axis=1).mean()),
    }
    if data.test is not None:
        x, y = data.test
        found["accuracy"] = float((forward(load, values, x).argmax(axis=1) == y).mean())
    return found


def forward(load: Workload, values: Mapping[str, ARRAY], x: NDArray[np.generic]) -> ARRAY:
    """The model's outputs [n, classes]."""
    return _forward(load.layers, values, "", x)


def _forward(layers: tuple[Layer, ...], values: Mapping[str, ARRAY], prefix: str, given: NDArray[np.generic]) -> ARRAY:
    x: NDArray[np.generic] = given
    for i, layer in enumerate(layers):
        name, kind = f"{prefix}{i}.", layer.kind
        if kind == "linear":
            x = x @ values[f"{name}weight"].T + values[f"{name}bias"]
        elif kind == "conv":
            size = layer.sizes[2]
            seen = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))  # [n, in, h, w, k, k]
            sums = np.tensordot(seen, values[f"{name}weight"], axes=((1, 4, 5), (1, 2, 3)))
            x = np.moveaxis(sums, 3, 1) + values[f"{name}bias"][:, None, None]
        elif kind == "norm":
            x = _norm(x, values[f"{name}weight"], values[f"{name}bias"])
        elif kind == "relu":
            x = np.maximum(x, 0)
        elif kind == "tanh":
            x = np.tanh(x)
        elif kind == "pool":
            n, channels, height, width = x.shape
            x = x.reshape(n, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))
        elif kind == "flatten":
            x = x.reshape(len(x), -1)
        elif kind == "residual":
            x = x + _forward(layer.inner, values, f"{name}inner.", x)
        elif kind == "embedding":
            x = values[f"{name}weight"][x]
        elif kind == "positions":
            x = x + values[f"{name}place"]
        elif kind == "mean":
            x = x.mean(axis=1)
        elif kind == "encoder":
            x = _encoder(layer, values, name, x)
    return x


def _encoder(layer: Layer, values: Mapping[str, ARRAY], name: str, x: ARRAY) -> ARRAY:
    width, heads, _ = layer.sizes
    n, length, _ = x.shape
    both = x @ values[f"{name}self_attn.in_proj_weight"].T + values[f"{name}self_attn.in_proj_bias"]
    parts = both.reshape(n, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    scores = parts[0] @ parts[1].swapaxes(2, 3) / (width // heads) ** 0.5
    mixed = (np.exp(_log_softmax(scores)) @ parts[2]).transpose(0, 2, 1, 3).reshape(n, length, width)
    out = mixed @ values[f"{name}self_attn.out_proj.weight"].T + values[f"{name}self_attn.out_proj.bias"]
    x = _norm(x + out, values[f"{name}norm1.weight"], values[f"{name}norm1.bias"])
    inside = np.maximum(x @ values[f"{name}linear1.weight"].T + values[f"{name}linear1.bias"], 0)
    out = inside @ values[f"{name}linear2.weight"].T + values[f"{name}linear2.bias"]
    return _norm(x + out, values[f"{name}norm2.weight"], values[f"{name}norm2.bias"])


def _norm(x: ARRAY, weight: ARRAY, bias: ARRAY) -> ARRAY:
    middle = x - x.mean(axis=-1, keepdims=True)
    return middle / np.sqrt((middle**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


def _log_softmax(scores: ARRAY) -> ARRAY:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
