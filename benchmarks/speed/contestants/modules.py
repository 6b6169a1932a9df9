"""The workloads' models as torch modules, as their users would write them, and their examples as tensors."""

import numpy as np
import torch
import workloads
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from workloads import Layer, Packed, Workload


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


def module(load: Workload) -> nn.Module:
    """The workload's model with the weights everybody starts from."""
    made = nn.Sequential(*(_layer(layer) for layer in load.layers))
    made.load_state_dict({name: torch.from_numpy(value) for name, value in workloads.initial(load).items()})
    return made


def tensors(data: Packed) -> tuple[Tensor, Tensor]:
    """Examples and labels of all clients, sharing memory with the arrays."""
    return torch.from_numpy(data.x), torch.from_numpy(data.y)


def vector(network: nn.Module) -> NDArray[np.float32]:
    """A module's parameters as one vector [P]."""
    return torch.cat([weight.detach().flatten() for weight in network.parameters()]).numpy()


def _layer(layer: Layer) -> nn.Module:
    s = layer.sizes
    match layer.kind:
        case "linear":
            return nn.Linear(*s)
        case "conv":
            return nn.Conv2d(*s)
        case "norm":
            return nn.LayerNorm(s)
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
            return nn.Embedding(*s)
        case "positions":
            return Positions(*s)
        case "encoder":
            return nn.TransformerEncoderLayer(*s, dropout=0.0, batch_first=True)
        case "mean":
            return Mean()
        case unknown:
            raise ValueError(f"no torch layer for {unknown!r}")


def descend(network: nn.Module, weights: list[nn.Parameter], x: Tensor, y: Tensor, batch: int, lr: float) -> None:
    """One epoch of a client: the lean step that frameworks which leave training to their users are given."""
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        loss = functional.cross_entropy(network(inputs), labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-lr)
