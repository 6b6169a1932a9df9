"""The workloads' models and examples in torch, and the lean step that frameworks are given."""

import numpy as np
import torch
import workloads
from networks import network
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from workloads import Packed, Workload


def module(load: Workload) -> nn.Module:
    """The workload's model with the weights everybody starts from."""
    return network(load, workloads.initial(load))


def tensors(data: Packed) -> tuple[Tensor, Tensor]:
    """Examples and labels of all clients, sharing memory with the arrays."""
    return torch.from_numpy(data.x), torch.from_numpy(data.y)


def vector(network: nn.Module) -> NDArray[np.float32]:
    """A module's parameters as one vector [P]."""
    return torch.cat([weight.detach().flatten() for weight in network.parameters()]).numpy()


def descend(network: nn.Module, weights: list[nn.Parameter], x: Tensor, y: Tensor, batch: int, lr: float) -> None:
    """One epoch of a client: the lean step that frameworks which leave training to their users are given."""
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        loss = functional.cross_entropy(network(inputs), labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-lr)
