"""Checks of a model against data before any work, and what they find out about the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from atoll import random
from atoll.engines.dropout import Draw, KeyedDropout, drawn_since, restore, states
from atoll.engines.precision import products, widened
from atoll.errors import DataError, InvalidArgument
from atoll.local import Plan
from atoll.model import Batch, Model, apply_to_x

if TYPE_CHECKING:
    from atoll.data import FederatedDataset


@dataclass(frozen=True, slots=True)
class Traits:
    """What engines must know of a model.

    Attributes:
        dropout: uses dropout that can be keyed.
        draws: takes random numbers from a generator of torch, numpy or Python in training, unasked (inside recurrent or
            attention kernels).
        pairs: cannot train on a batch of one example (BatchNorm).
        stateful: its forward changes plain attributes of its modules, which a trace would not see.
        sample: a few examples for trials.
    """

    dropout: bool
    draws: bool
    pairs: bool
    stateful: bool
    sample: Batch


def accept(model: Model, data: "FederatedDataset", plans: Sequence[Plan]) -> Traits:
    """Refuse a model that cannot be trained on this data, and find out its traits.

    Raises:
        InvalidArgument: the model fails on the data, returns the wrong shape, or ignores its parameters.
        DataError: labels outside the classes; batches of one example for a model that needs two.
    """
    fields = data.train.fields
    if "y" not in fields:
        raise DataError(f"the data has fields {', '.join(fields)}, but no target: name the target field 'y'.")
    if model.forward_function is apply_to_x and "x" not in fields:
        raise DataError(
            f"the data has fields {', '.join(fields)}, but no 'x': name the input field 'x', or give the model "
            "forward=callable(module, batch)."
        )
    sample, many = _spread(fields, 4), _spread(fields, 256)
    original = {n: t.clone() for n, t in sample.items()}
    constants = {n: t.detach().clone() for n, t in model.constants().items()}
    vector, buffers = model.init(), model.init_buffers()
    parameters = model.layout.view(vector)
    output = _try(model, parameters, buffers, sample, train=False)
    model.settle(output, sample["y"])
    model.loss.check(output, sample["y"])
    for metric in model.metrics(output):
        metric.check(output, sample["y"])
    _check_targets(model, output, data)

    noise = torch.randn(model.size, generator=random.generator(0, "acceptance"), dtype=model.dtype)
    moved = _try(model, model.layout.view(vector + 0.1 * noise), buffers, many, train=False)
    if torch.equal(moved, _try(model, parameters, buffers, many, train=False)):
        raise InvalidArgument(
            "the model's output does not change with its parameters: its layers do not read the parameters they are "
            "given (as Keras layers do under functional_call), or the trainable ones are not used."
        )

    before, held = states(), _attributes(model)
    draw = Draw(0, "acceptance", 0, np.zeros(1, np.uint64), np.zeros(1, np.int64))
    pairs = False
    try:
        with KeyedDropout(draw):
            doubled = {n: torch.cat((t[:1], t[:1], t[1:])) for n, t in sample.items()}
            _try(model, parameters, buffers, doubled, train=True)
        draws = drawn_since(before)
        single = {n: t[:1] for n, t in sample.items()}
        try:
            _check_output(_call(model, parameters, buffers, single, train=True), single)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            pairs = True
    finally:
        restore(before)
    for name, tensor in sample.items():
        if not torch.equal(tensor, original[name]):
            raise InvalidArgument(
                f"the model changes its input {name!r} in place, and would change the clients' data: compute a new "
                "tensor instead (x = x - 1, not x -= 1; inplace=False in the first layer)."
            )
    for name, tensor in model.constants().items():
        if not torch.equal(tensor, constants[name]):
            raise InvalidArgument(
                f"the model changes {name!r} in training, which every client would share unseen: register it as a "
                'persistent floating buffer, and build the Model with buffers="mean" or buffers="local".'
            )
    if pairs:
        for plan in plans:
            _check_pairs(plan, data)
    return Traits(draw.calls > 0, draws, pairs, held != _attributes(model), sample)


def recheck(model: Model, data: "FederatedDataset", plans: Sequence[Plan], traits: Traits) -> None:
    """Refuse what clients' examples make impossible, for a model that was accepted on others.

    Raises:
        DataError: labels outside the classes; batches of one example for a model that needs two.
    """
    if len(data.clients):
        output = _try(model, model.layout.view(model.init()), model.init_buffers(), traits.sample, train=False)
        _check_targets(model, output, data)
        for plan in plans if traits.pairs else ():
            _check_pairs(plan, data)


def accept_rounded(model: Model, traits: Traits) -> None:
    """Refuse a model that cannot be trained with its products in bfloat16.

    Raises:
        InvalidArgument: it fails there, or its loss or a gradient is not finite.
    """
    sample = traits.sample
    leaves = {n: t.clone().requires_grad_() for n, t in model.layout.view(model.init()).items()}
    held = model.buffer_layout.view(model.init_buffers()) | model.counters()
    before = states()
    try:
        with torch.enable_grad(), KeyedDropout(Draw(0, "acceptance", 0, np.zeros(1, np.uint64), np.zeros(1, np.int64))):
            with products(sample["y"].device, mixed=True):
                output = model.call(leaves, held, sample, train=True)
            loss = model.loss.mean(widened(output, mixed=True), sample["y"])
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    except Exception as error:
        raise InvalidArgument(
            f"the model cannot be trained with precision='bfloat16': {error}. Use precision='full', or make its layers "
            "work under torch.autocast."
        ) from error
    finally:
        restore(before)
    if not all(bool(torch.isfinite(t).all()) for t in (loss.detach(), *gradients)):
        raise InvalidArgument(
            "the model's loss or a gradient is not finite with precision='bfloat16', before any training: use "
            "precision='full'."
        )


def _attributes(model: Model) -> list[tuple[str, str, object]]:
    """Plain attributes of a model's modules."""
    plain = int | float | str | None
    return [(n, a, v) for n, m in model.modules() for a, v in vars(m).items() if isinstance(v, plain)]


def _spread(fields: Batch, count: int) -> dict[str, Tensor]:
    """Copies of examples spread over a split; a single one stands twice, as of one a loss and a mean look alike."""
    total = len(fields["y"])
    places = torch.linspace(0, total - 1, min(count, max(total, 2)), dtype=torch.float64).long()
    return {n: t[places] for n, t in fields.items()}


def _call(model: Model, parameters: dict[str, Tensor], buffers: Tensor, batch: Batch, *, train: bool) -> Tensor:
    held = model.buffer_layout.view(buffers.clone()) | model.counters()
    with torch.no_grad():
        return model.call(parameters, held, batch, train=train)


def _try(model: Model, parameters: dict[str, Tensor], buffers: Tensor, batch: Batch, *, train: bool) -> Tensor:
    try:
        output = _call(model, parameters, buffers, batch, train=train)
    except Exception as error:
        raise InvalidArgument(
            f"the model failed on a batch of {_shapes(batch)}: {error}. Its input size must fit the data, and floating "
            f"features must have the model's dtype {model.dtype}."
        ) from error
    _check_output(output, batch)
    return output


def _check_output(output: object, batch: Batch) -> None:
    count = len(next(iter(batch.values())))
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != count:
        found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InvalidArgument(
            f"the model returned {found} for a batch of {_shapes(batch)}: it must return a tensor whose first axis is "
            "the example, also for a batch of one (squeeze(-1) keeps it, squeeze() does not)."
        )


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in batch.items())


def _check_targets(model: Model, output: Tensor, data: "FederatedDataset") -> None:
    splits = [s.fields["y"] for s in (data.train, data.validation, data.test) if s is not None]
    if data.holdout is not None:
        splits.append(data.holdout["y"])
    for targets in splits:
        if len(targets):
            model.loss.check(output[:1].expand(len(targets), *output.shape[1:]), targets)


def _check_pairs(plan: Plan, data: "FederatedDataset") -> None:
    sizes = data.train.sizes
    lonely = sizes == 1 if plan.batch_size is None else (sizes % plan.batch_size == 1) | (sizes == 1)
    if plan.batch_size == 1:
        lonely = torch.ones_like(lonely)
    found = torch.nonzero(lonely)[:, 0].tolist()
    if found:
        names = ", ".join(str(data.clients[i]) for i in found[:5])
        raise DataError(
            f"batch_size={plan.batch_size} leaves {len(found)} client(s) ({names}) with a batch of one example, on "
            "which BatchNorm cannot train: choose another batch_size, or replace BatchNorm by GroupNorm or LayerNorm."
        )
