"""Features of a frozen backbone, computed once: the head is then trained as if it were the whole model.

What stands before the layer that `Model(features=...)` names must be constant: no trainable parameter, no dropout that
draws, no statistics that move. An example's features are then the same in every round, so they take the example's
place, and the layers before are left out. The layout of the parameters is the same, and so is every answer, up to the
rounding of sums in another order.
"""

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from atoll import random
from atoll.data import FederatedDataset, Split
from atoll.errors import InvalidArgument, invalid
from atoll.evaluation import CHUNK, CHUNK_BYTES
from atoll.model import Batch, Model

TRIAL = 4
"""Examples on which the cut model must answer as the whole one does."""


class Features(NamedTuple):
    """A model without its backbone, and the data it is trained on."""

    model: Model
    data: FederatedDataset


def features(model: Model, data: FederatedDataset) -> Features:
    """Compute the features of all examples once, and cut the model off behind them.

    Args:
        model: built with `features="name.of.submodule"`; all before that submodule's output is frozen. Either the
            submodule is the first thing the module applies to "x", or it stands in an `nn.Sequential`.
        data: clients and their examples. Every client computes its own; nothing leaves it.

    Returns:
        The head as a model of the same parameters, and the data with features in the place of "x". A vector trained
        on them belongs to the whole model too: `model.module(result.vector)`.

    Raises:
        InvalidArgument: the model names no features; parameters or buffers before them are trained, dropout draws
            there; or the rest of the module reads more than the features.
    """
    if type(model) is not Model:
        raise invalid("model", model, "a plain atoll.Model", "Compute features first, then adapt the head's model.")
    if not isinstance(data, FederatedDataset):
        raise invalid(
            "data", type(data).__name__, "a packed FederatedDataset", "Draw a lazy population's clients first: draw()."
        )
    name = model.features_name
    if name is None:
        raise InvalidArgument('this model names no features: build it with Model(..., features="backbone").')
    cut = _cut(model, name)
    views, held = model.layout.view(model.init()), model.buffer_layout.view(model.init_buffers())

    def of(batch: Batch) -> Tensor:
        with torch.no_grad():
            found = model.features(views, held, batch)
        if not isinstance(found, Tensor) or not len(found) == len(batch["x"]):
            raise invalid("features", name, "a submodule that gives one tensor whose first axis is the example")
        return found

    _check(model, cut, data, of, name)

    def through(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = len(fields["x"])
        each = model.activations(views, held, data.train.fields)
        bounds = [*range(0, count, max(1, min(CHUNK, CHUNK_BYTES // each))), count]
        pieces = [of({n: t[a:b] for n, t in fields.items()}) for a, b in pairwise(bounds) if a < b]
        empty = lambda: of({n: t[:1] for n, t in data.train.fields.items()})[:0]  # noqa: E731
        return {**fields, "x": torch.cat(pieces) if pieces else empty()}

    def split(part: Split | None) -> Split | None:
        return None if part is None else Split(through(part.fields), part.offsets)

    train = split(data.train)
    assert train is not None
    made = FederatedDataset(
        data.clients,
        train,
        validation=split(data.validation),
        test=split(data.test),
        holdout=None if data.holdout is None else through(data.holdout),
        name=f"features of {data.name}" if data.name else "features",
    )
    return Features(cut, made)


def _cut(model: Model, name: str) -> Model:
    """The model with the named submodule, and what stands before it in its sequences, replaced by nothing."""
    root = model.caller(train=True).get_submodule("module")
    before = [root.get_submodule(name)]
    path = name.split(".")
    for depth in range(len(path)):
        parent = root.get_submodule(".".join(path[:depth]))
        if isinstance(parent, nn.Sequential):
            own = list(parent.named_children())
            place = [n for n, _ in own].index(path[depth])
            before += [part for _, part in own[:place]]
    for part in before:
        _check_still(root, part, name)
    module = copy.deepcopy(root, {id(part): nn.Identity() for part in before})
    if not any(p.requires_grad for p in module.parameters()):
        raise invalid("features", name, "a submodule before the trained layers", "Nothing is trained behind it.")
    made = model.over(module)
    if made.layout != model.layout or made.buffer_layout != model.buffer_layout:
        odd = sorted(
            {*model.layout.names, *model.buffer_layout.names} - {*made.layout.names, *made.buffer_layout.names}
        )
        raise InvalidArgument(
            f"features={name!r}: {', '.join(odd[:5])} would be trained before the features, which then change from "
            "round to round. Freeze what stands before them: atoll.freeze(module, ...)."
        )
    return made


def _check_still(root: nn.Module, part: nn.Module, name: str) -> None:
    """Refuse layers before the features that draw or gather statistics in training."""
    names = {id(m): n for n, m in root.named_modules()}
    for inner in part.modules():
        drawing = isinstance(inner, _DropoutNd) and inner.p > 0
        if inner.training and (drawing or (isinstance(inner, _BatchNorm) and inner.track_running_stats)):
            raise InvalidArgument(
                f"features={name!r}: {names[id(inner)]} ({type(inner).__name__}) before the features works otherwise "
                "in training than in evaluation, so that they are not constant. Freeze it: atoll.freeze(module, ...)."
            )


def _check(model: Model, cut: Model, data: FederatedDataset, of: Callable[[Batch], Tensor], name: str) -> None:
    """Refuse a cut whose answers are not those of the whole, and features that differ in training."""
    batch = {n: t[:TRIAL] for n, t in data.train.fields.items()}
    held = model.buffer_layout.view(model.init_buffers())
    given = {**batch, "x": of(batch)}
    draw = random.generator(0, "features")
    rule = "Name the module's last frozen part: its backbone, applied to x before everything else."
    for strength in (0.0, 0.1):
        noise = strength * torch.randn(model.size, generator=draw, dtype=model.dtype)
        views = model.layout.view(model.init() + noise)
        with torch.no_grad():
            expected = model.call(views, held, batch, train=False)
            try:
                found = cut.call(views, held, given, train=False)
            except Exception as error:
                raise InvalidArgument(
                    f"features={name!r}: what stands behind it fails on the features alone ({error}). {rule}"
                ) from error
        if not _near(found, expected):
            raise InvalidArgument(
                f"features={name!r}: what stands behind it reads more than the features, or there are layers between "
                f"x and this one outside of a sequence. {rule}"
            )
    seen: list[Tensor] = []
    part = model.caller(train=True).get_submodule(f"module.{name}")
    handle = part.register_forward_hook(lambda _module, _inputs, out: seen.append(cast(Tensor, out)))
    own = {n: t.clone() for n, t in held.items()} | model.counters()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.call(model.layout.view(model.init()), own, batch, train=True)
    finally:
        handle.remove()
    if not _near(seen[-1], given["x"]):
        raise InvalidArgument(
            f"features={name!r} are others in training than in evaluation. Freeze what stands before them: "
            "atoll.freeze(module, ...)."
        )


def _near(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(((found - expected).abs() <= 1e-4 * expected.abs().max() + 1e-6).all())
