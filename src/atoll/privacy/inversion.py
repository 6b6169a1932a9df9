"""What an update gives away: the inputs of a fully connected layer, read off its change.

    one step of gradient descent:   dW = sum_i d_i x_i^T,   db = sum_i d_i      d_i: of example i, by unit
    so for unit u:                  dW[u] / db[u] = sum_i d_iu x_i / sum_i d_iu

is a weighted mean of the inputs of the examples that moved unit u. One example alone is told exactly, by every unit; of
several each is told that is alone in some unit, which behind rectifiers is not rare. The learning rate and the number
of examples cancel. After more steps inputs are blended along them.

Phong, Aono, Hayashi, Wang & Moriai 2018, "Privacy-preserving deep learning via additively homomorphic encryption",
section 3; Geiping, Bauermeister, Droege & Moeller 2020, "Inverting gradients", proposition 3.1.

This is the weakest of all attacks: it reads, and optimises nothing. What it finds is given away; what it does not find
may still be found by others. Only noise bounds all of them (`atoll.privacy.explain`).
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from atoll.errors import InvalidArgument, invalid

if TYPE_CHECKING:
    from atoll.model import Model


class Found(NamedTuple):
    """For each input the candidate that is most like it.

    Attributes:
        similarity: cosine of the angle between the two, each less its own mean: [n]. 1: the input, but for brightness.
        inputs: the candidates [n, features].
    """

    similarity: Tensor
    inputs: Tensor


def candidates(model: "Model", change: Tensor, layer: str | None = None) -> Tensor:
    """Inputs that a change of a model gives away: one for every unit of a fully connected layer that was moved.

    Args:
        model: whose change it is.
        change: of its parameters [P]: an update, the difference of two global models, a sum of updates.
        layer: name of an `nn.Linear` with a bias; default the first there is.

    Returns:
        [units that were moved, features], the most moved first.

    Raises:
        InvalidArgument: there is no such layer, or the change is of another model.
    """
    if not isinstance(change, Tensor) or change.shape != (model.size,):
        told = tuple(change.shape) if isinstance(change, Tensor) else change
        raise invalid("change", told, f"a vector of the model's {model.size} parameters")
    trained = frozenset(model.layout.names)
    linear = [
        name
        for name, part in model.modules()
        if isinstance(part, nn.Linear) and trained >= {_named(name, "weight"), _named(name, "bias")}
    ]
    if not linear:
        raise InvalidArgument("the model has no fully connected layer with a bias that is trained: nothing to read.")
    if layer is None:
        layer = linear[0]
    elif layer not in linear:
        raise invalid("layer", layer, f"one of {', '.join(repr(n) for n in linear)}")
    named = model.layout.view(change.detach())
    weight, bias = (named[_named(layer, part)].double() for part in ("weight", "bias"))
    order = bias.abs().argsort(descending=True, stable=True)
    order = order[bias[order] != 0]
    return weight[order] / bias[order, None]


def nearest(found: Tensor, inputs: Tensor) -> Found:
    """How much candidates give away of inputs that an attacker did not have.

    Args:
        found: candidates [k, features].
        inputs: [n, features].
    """
    if found.ndim != 2 or inputs.ndim != 2 or found.shape[1] != inputs.shape[1]:
        raise invalid("inputs", tuple(inputs.shape), f"rows as long as the candidates' {found.shape[-1]}")
    if not len(found):
        return Found(torch.zeros(len(inputs), dtype=torch.float64), torch.zeros(inputs.shape, dtype=torch.float64))
    likeness = _directions(inputs) @ _directions(found).T
    best = likeness.max(dim=1)
    return Found(best.values, found[best.indices])


def _named(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _directions(rows: Tensor) -> Tensor:
    centred = rows.double() - rows.double().mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-300)
