"""FED3R: the head is ridge regression on the features, from sums of second moments.

Fanì, Camoriano, Caputo & Ciccone 2024, "Accelerating heterogeneous federated learning with closed-form classifiers",
section 4, equations 3 to 5.

    A = sum_i Z_i^T Z_i,    b = sum_i Z_i^T Y_i
    W = (A + ridge I)^-1 b

Symbols: Z_i the client's inputs of the head, one row an example, Y_i its targets: one-hot for classes, the numbers
themselves for regression. A head with a bias has a column of ones beside the features, whose weight the ridge does not
pull; that is ridge regression with an intercept. A is symmetric: its upper triangle is sent.
One round, exactly the pooled solution. Cost in floats: D + S up in double precision with S = d'(d' + 1)/2 + d' K and
d' = d + 1 with a bias, D down, 1 kept.
"""

import torch
from torch import Tensor
from torch.nn import functional

from atoll.algorithms.base import Algorithm
from atoll.algorithms.checks import check_number
from atoll.algorithms.closed_form import Head, Method, check_classes, closed_form
from atoll.errors import DataError
from atoll.spec import record


def fed3r(*, ridge: float = 0.01, head: str | None = None, scale: float = 1.0) -> Algorithm:
    """A head by ridge regression, in one round.

    Args:
        ridge: strength of the pull towards zero, above 0 (the paper uses 0.01), on the sum over all examples.
        head: name of the linear layer that gives the output; default the only trained linear layer.
        scale: of the head's outputs, above 0. It changes no predicted class, but the softmax of a training that
            follows: one-hot targets are fitted by outputs in about [0, 1], which as logits say little. Leave it at 1
            for regression.

    Raises:
        InvalidArgument: an argument out of range; when an experiment is built, a model without such a layer; before
            any work, a model whose output is not that layer's.
        DataError: before any work, targets that do not fit the layer's outputs.
    """
    ridge = check_number("ridge", ridge, strict=True)
    scale = check_number("scale", scale, strict=True)

    def method(layer: Head) -> Method:
        outputs, width = layer.outputs, layer.width + layer.bias
        upper = torch.triu_indices(width, width)

        def statistics(inputs: Tensor, targets: Tensor) -> Tensor:
            z = functional.pad(inputs, (0, 1), value=1.0) if layer.bias else inputs
            y = targets.double().reshape(len(z), -1) if targets.is_floating_point() else one_hot(targets)
            moments = z.T @ z
            return torch.cat((moments[upper[0], upper[1]], (z.T @ y).flatten()))

        def one_hot(targets: Tensor) -> Tensor:
            return functional.one_hot(targets.long(), outputs).double()

        def solve(sums: Tensor) -> tuple[Tensor, Tensor]:
            moments = sums.new_zeros(width, width)
            moments[upper[0], upper[1]] = sums[: upper.shape[1]]
            moments = moments + moments.triu(1).T
            pull = sums.new_full((width,), ridge)
            if layer.bias:
                pull[-1] = 0.0
            found = scale * torch.linalg.solve(moments + pull.diag(), sums[upper.shape[1] :].view(width, outputs)).T
            return (found[:, :-1], found[:, -1]) if layer.bias else (found, found.new_zeros(outputs))

        return Method(upper.shape[1] + width * outputs, statistics, solve, check_targets)

    return closed_form(record("fed3r", ridge=ridge, head=head, scale=scale), head, method)


def check_targets(targets: Tensor, outputs: int) -> None:
    """Refuse targets that are neither labels of the head's classes nor as many numbers as it has outputs."""
    if not targets.is_floating_point():
        check_classes(targets, outputs)
    elif targets[:1].numel() != outputs and len(targets):
        raise DataError(f"y has {targets[:1].numel()} numbers for an example, but the head gives {outputs}.")
