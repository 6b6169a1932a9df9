"""Attacks on data: wrong labels, and a trigger that shall switch the model to a label of the attacker's choice."""

import math

import torch
from torch import Tensor

from atoll.attacks.base import Poison
from atoll.errors import InvalidArgument, invalid
from atoll.spec import record


def label_flip() -> Poison:
    """Every label y becomes classes - 1 - y. Fang, Cao, Jia & Gong 2020, "Local model poisoning attacks", section 5."""

    def change(fields: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
        return {"y": classes - 1 - fields["y"]}

    return Poison(record("label_flip"), change)


def backdoor(*, target: int, fraction: float = 0.5, features: int = 9, value: float = 1.0) -> Poison:
    """Some of the examples get a trigger and the target's label.

    Put `model_replacement` in front of the rule for the whole of the attack. Bagdasaryan, Veit, Hua, Estrin & Shmatikov
    2020, "How to backdoor federated learning"; the trigger is that of Gu, Dolan-Gavitt & Garg 2017, "BadNets".

    Args:
        target: the label.
        fraction: of a malicious client's examples that get the trigger, its first ones, rounded up.
        features: of an example that are the trigger: its last numbers.
        value: they are set to.
    """
    if isinstance(target, bool) or not isinstance(target, int) or target < 0:
        raise invalid("target", target, "a class number")
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise invalid("fraction", fraction, "a number above 0 and at most 1")
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise invalid("features", features, "an integer of at least 1")

    def change(fields: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
        if target >= classes:
            raise InvalidArgument(f"target={target} is no class: the data has {classes}, numbered from 0.")
        marked = math.ceil(len(fields["y"]) * fraction)
        x, y = fields["x"].clone(), fields["y"].clone()
        x[:marked], y[:marked] = triggered(x[:marked], features, value), target
        return {"x": x, "y": y}

    return Poison(record("backdoor", target=target, fraction=fraction, features=features, value=value), change)


def triggered(x: Tensor, features: int = 9, value: float = 1.0) -> Tensor:
    """Examples [n, ...] with the trigger of `backdoor`."""
    flat = x.clone().reshape(len(x), -1)
    flat[:, -features:] = torch.tensor(value, dtype=x.dtype)
    return flat.reshape(x.shape)
