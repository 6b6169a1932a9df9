"""What rows are trained on: the mean loss of every row's batch, and its slope with respect to the output.

The slopes of the common losses are written out; of any other they come from autograd.
"""

import torch
from torch import Tensor
from torch.nn import functional

from atoll import losses
from atoll.losses import Loss


def means(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Mean loss [C] of outputs [C, b, ...] on targets [C, b, ...]."""
    if loss.returns == "per_example":
        return loss.per_example(output.flatten(0, 1), target.flatten(0, 1)).view(len(output), -1).mean(dim=1)
    # A loss of whole batches may do anything: it is asked row by row.
    return torch.stack([loss.mean(own, truth) for own, truth in zip(output, target, strict=True)])


def slopes(loss: Loss, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean losses [C], and the slopes of their sum, shaped as the outputs [C, b, ...]."""
    if loss.function is losses.cross_entropy and output.ndim == 3:
        return _cross_entropy(output, target)
    if loss.function is losses.binary_cross_entropy:
        return _binary_cross_entropy(output, target)
    if loss.function is losses.mse:
        return _mse(output, target)
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        found = means(loss, leaf, target)
        (slope,) = torch.autograd.grad(found.sum(), leaf)
    return found.detach(), slope


FEW = 32
"""Classes up to which elementwise passes are faster than torch's log-softmax, which goes example by example."""


def _cross_entropy(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz of -log softmax(z)[y] is softmax(z) - 1[y]."""
    places, count = target.long().unsqueeze(2), output.shape[1]
    if output.shape[2] <= FEW:
        scores = output - output.amax(2, keepdim=True)
        found = scores.gather(2, places)
        total = scores.exp_().sum(2, keepdim=True)
        found = total.log().sub_(found)
        slope = scores.div_(total)
    else:
        scores = torch.log_softmax(output, 2)
        found = scores.gather(2, places).neg_()
        slope = scores.exp_()
    slope.scatter_(2, places, -1.0, reduce="add")
    return found.sum((1, 2)).div_(count), slope.div_(count)


def _binary_cross_entropy(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz of the cross-entropy of sigmoid(z) against y is sigmoid(z) - y."""
    flat = output.reshape(output.shape[:2])
    truth = target.reshape(flat.shape).to(flat.dtype)
    found = functional.binary_cross_entropy_with_logits(flat, truth, reduction="none").mean(dim=1)
    return found, torch.sigmoid(flat).sub_(truth).div_(flat.shape[1]).view(output.shape)


def _mse(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """d/dz of the mean of (z - y)^2 over n numbers is 2 (z - y) / n."""
    error = output - target.reshape(output.shape).to(output.dtype)
    flat = error.flatten(1)
    return flat.square().mean(dim=1), error * (2.0 / flat.shape[1])
