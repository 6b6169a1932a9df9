"""FedNCM: every class is represented by the mean of its features.

Legate, Bernier, Caccia, Oyallon & Belilovsky 2023, "Guiding the last layer in federated learning with pre-trained
models", section 3.

    s_c = sum_i sum_{j: y_j = c} f(x_j),    n_c = how many,    m_c = s_c / n_c
    cosine:     W_c = scale m_c / |m_c|,          b_c = 0
    euclidean:  W_c = 2 scale m_c,                b_c = - scale |m_c|^2

Symbols: f(x) what flows into the head, m_c mean of class c over all clients. By the first, an example belongs to the
class whose mean has the smallest angle to it; by the second, to the nearest mean, as |f - m_c|^2 is -(2 f.m_c -
|m_c|^2) but for a number all classes share. The paper takes the first for what is trained further. A class nobody has
gets the weight 0 and, where there is a bias, one of -10,000.
One round, exactly the pooled solution. Cost in floats: D + K (d + 1) up, in double precision, D down, 1 kept.
"""

from typing import Literal

import torch
from torch import Tensor

from atoll.algorithms.base import Algorithm
from atoll.algorithms.checks import check_number
from atoll.algorithms.closed_form import Head, Method, check_classes, closed_form
from atoll.errors import InvalidArgument, invalid
from atoll.spec import record

ABSENT = -1e4
"""Bias of a class that nobody has."""


def fedncm(
    *, head: str | None = None, distance: Literal["cosine", "euclidean"] = "cosine", scale: float = 1.0
) -> Algorithm:
    """A head of class means, in one round.

    Args:
        head: name of the linear layer that gives the output; default the only trained linear layer.
        distance: how an example is compared with class means.
        scale: of the head's outputs, above 0. It changes no prediction, but the softmax of a training that follows.

    Raises:
        InvalidArgument: an argument out of range; when an experiment is built, a model without such a layer; before
            any work, a model whose output is not that layer's.
        DataError: before any work, targets that are no class labels.
    """
    if distance not in ("cosine", "euclidean"):
        raise invalid("distance", distance, '"cosine" or "euclidean"')
    scale = check_number("scale", scale, strict=True)

    def method(layer: Head) -> Method:
        classes, width = layer.outputs, layer.width
        if distance == "euclidean" and not layer.bias:
            raise InvalidArgument(
                f'fedncm(distance="euclidean") needs a bias in {layer.name!r}: give the layer one, or use "cosine".'
            )

        def statistics(inputs: Tensor, targets: Tensor) -> Tensor:
            sums = inputs.new_zeros(classes, width).index_add_(0, targets.long(), inputs)
            return torch.cat((sums.flatten(), torch.bincount(targets.long(), minlength=classes).to(inputs)))

        def solve(sums: Tensor) -> tuple[Tensor, Tensor]:
            # Of a summing channel counts come back within its rounding: half an example is none.
            counts = sums[-classes:]
            there = counts > 0.5
            means = sums[:-classes].view(classes, width) / counts.clamp(min=0.5)[:, None]
            means = torch.where(there[:, None], means, 0.0)
            if distance == "euclidean":
                weight, bias = 2 * scale * means, -scale * means.square().sum(1)
            else:
                length = means.norm(dim=1, keepdim=True)
                weight, bias = scale * means / torch.where(length > 0, length, 1.0), torch.zeros_like(counts)
            return weight, torch.where(there, bias, ABSENT)

        return Method(classes * (width + 1), statistics, solve, check_classes)

    return closed_form(record("fedncm", head=head, distance=distance, scale=scale), head, method)
