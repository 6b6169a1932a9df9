"""The workloads' models as torch modules, as their users would write them: torch alone, and nothing of Atoll.

Like `workloads.py`, this file is imported by its folder in the environments of other frameworks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from atoll.bench.workloads import Layer, Workload


def network(load: "Workload", weights: "Mapping[str, NDArray[np.float32]]") -> nn.Module:
    """The workload's model with the weights everybody starts from, those of `workloads.initial`."""
    made = nn.Sequential(*(_layer(layer) for layer in load.layers))
    made.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return made


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, width]."""
        return x + self.inner(x)


class Positions(nn.Module):
    """Adds a learned vector to each place of a sequence."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, width] -> [n, length, width]."""
        return x + self.place


class Mean(nn.Module):
    """The mean over a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, width] -> [n, width]."""
        return x.mean(dim=1)


def _layer(layer: "Layer") -> nn.Module:
    s = layer.sizes
    match layer.kind:
        case "linear":
            return nn.Linear(s[0], s[1])
        case "conv":
            return nn.Conv2d(s[0], s[1], s[2])
        case "norm":
            return nn.LayerNorm(list(s))
        case "relu":
            return nn.ReLU()
        case "tanh":
            return nn.Tanh()
        case "pool":
            return nn.MaxPool2d(2)
        case "flatten":
            return nn.Flatten()
        case "residual":
            return Residual(nn.Sequential(*(_layer(inside) for inside in layer.inner)))
        case "embedding":
            return nn.Embedding(s[0], s[1])
        case "positions":
            return Positions(s[0], s[1])
        case "encoder":
            return nn.TransformerEncoderLayer(s[0], s[1], s[2], dropout=0.0, batch_first=True)
        case "mean":
            return Mean()
        case unknown:
            raise ValueError(f"no torch layer for {unknown!r}")
