"""Losses: functions of a batch's output and target that give one number per example.

`get` turns a name or a callable into a `Loss`. A named loss gives the losses `[n]` of `n` examples, never their mean,
so that an engine may weight, mask and sum them as it needs; averaging over the further axes of an example (pixels,
tokens, several regression targets) happens inside. `Loss.check` refuses shapes, dtypes and labels before any work; the
functions themselves look at shapes only, so that they run under `torch.func.vmap` and under autograd.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from atoll.errors import DataError, InvalidArgument, invalid, unknown

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Kind: TypeAlias = Literal["classes", "binary", "regression", "any"]
Returns: TypeAlias = Literal["per_example", "mean"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, what it fits and what it gives."""

    name: str
    function: LossFunction  # (output [n, ...], target [n, ...]) -> [n], or a scalar mean where `returns` says so
    kind: Kind  # the outputs and targets that `check` lets pass
    returns: Returns | None = "per_example"  # None: a callable that nobody has tried yet, see `tried`
    values: Callable[[Tensor, Tensor], None] | None = None  # what `check` asks beyond shapes, dtypes, labels

    @classmethod
    def from_callable(
        cls, function: LossFunction, output: Tensor | None = None, target: Tensor | None = None
    ) -> "Loss":
        """Wrap a user's callable, and record what it gives if a trial batch comes with it.

        Args:
            function: `(output [n, ...], target [n, ...])` to the losses `[n]` (preferred) or to their scalar mean.
            output: a trial output `[n, ...]` of at least two examples.
            target: the targets `[n, ...]` that belong to `output`.

        Raises:
            InvalidArgument: it is not callable, has parameters of its own, or gives neither losses `[n]` nor a mean.
        """
        if not callable(function):
            remedy = f"Known names: {', '.join(names())}."
            raise invalid("loss", function, "a name or a callable(output, target)", remedy)
        if isinstance(function, torch.nn.Module) and any(True for _ in function.parameters()):
            remedy = "A loss's own parameters would never be trained: move them into the model."
            raise invalid("loss", function, "a callable without parameters", remedy)
        loss = cls(name=_name_of(function), function=function, kind="any", returns=None)
        if output is None or target is None:
            return loss
        return loss.tried(output, target)

    def tried(self, output: Tensor, target: Tensor) -> "Loss":
        """Give the same loss with `returns` known, after one call on a trial batch where it was not.

        Args:
            output: a trial output `[n, ...]`, n at least 2.
            target: its targets `[n, ...]`.
        """
        if self.returns is not None:
            return self
        return replace(self, returns=classify(self.function, output, target))

    @property
    def per_example(self) -> LossFunction:
        """The function `(output [n, ...], target [n, ...]) -> losses [n]`.

        Raises:
            InvalidArgument: the loss gives a mean only, or was never tried.
        """
        if self.returns == "mean":
            raise invalid(
                "loss",
                self.name,
                "a callable that gives one loss per example here; this one gives their mean",
                "Return the losses [n] themselves (reduction='none' in torch).",
            )
        self._require_tried()
        return self.function

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        """Give the mean loss of a batch, whichever way the function gives it.

        Args:
            output: the model's output `[n, ...]`.
            target: the targets `[n, ...]`.

        Returns:
            A scalar tensor.
        """
        self._require_tried()
        return self.function(output, target).mean()

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs and targets that this loss does not fit.

        Args:
            output: the model's output `[n, ...]`.
            target: the targets `[n, ...]`.

        Raises:
            InvalidArgument: a shape or a dtype is wrong.
            DataError: a target holds a value that is not allowed.
        """
        owner = f"loss {self.name!r}"
        if self.kind == "classes":
            check_classes(output, target, owner=owner)
        elif self.kind == "binary":
            check_binary(output, target, owner=owner)
        elif self.kind == "regression":
            check_regression(output, target, owner=owner)
        else:
            check_examples(output, target, owner=owner)
        if self.values is not None:
            self.values(output, target)

    def _require_tried(self) -> None:
        if self.returns is None:
            remedy = "Call loss.tried(output, target) on a batch of two or more examples first."
            raise invalid("loss", self.name, "a callable known to give losses per example or their mean", remedy)


def get(loss: str | LossFunction | Loss, output: Tensor | None = None, target: Tensor | None = None) -> Loss:
    """Find a loss by name, or wrap a callable.

    Args:
        loss: one of `names()`, a callable `(output, target)`, or a `Loss`, which comes back as it is.
        output: for a callable, a trial output `[n, ...]` of at least two examples that tells what it gives.
        target: the targets `[n, ...]` that belong to `output`.

    Returns:
        The loss; a callable without a trial batch has `returns` None until `Loss.tried`.

    Raises:
        InvalidArgument: the name is unknown or the callable cannot be used.
    """
    if isinstance(loss, Loss):
        return loss if output is None or target is None else loss.tried(output, target)
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise unknown("loss", loss, names(), "A callable(output, target) is welcome too.")
        return _LOSSES[loss]
    return Loss.from_callable(loss, output, target)


def names() -> tuple[str, ...]:
    """Give the names that `get` knows."""
    return tuple(_LOSSES)


def classify(function: LossFunction, output: Tensor, target: Tensor) -> Returns:
    """Tell by trial whether a callable gives losses per example or their mean.

    A scalar is tried a second time on the batch laid twice end to end: a mean stays, a sum doubles and is refused,
    because it would multiply the learning rate by the batch size.

    Args:
        function: `(output [n, ...], target [n, ...]) -> Tensor`.
        output: a trial output `[n, ...]`, n at least 2 (of one example, losses and mean look alike).
        target: its targets `[n, ...]`.

    Raises:
        InvalidArgument: fewer than two examples, or what comes back is neither floats `[n]` nor a scalar mean.
    """
    check_examples(output, target, owner=f"the trial of loss {_name_of(function)!r}")
    count = output.shape[0]
    if count < 2:
        raise invalid("output", tuple(output.shape), "a trial batch of at least two examples")
    allowed = f"a callable that gives losses of shape [{count}] for {count} examples, or their scalar mean"
    with torch.no_grad():
        value = function(output, target)
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(f"loss gave a {type(value).__name__}: it must be {allowed}. Return a tensor.")
        shape = tuple(value.shape)
        if not value.is_floating_point():
            raise InvalidArgument(f"loss gave a tensor of {value.dtype}: it must be {allowed}, in floats.")
        if shape == (count,):
            return "per_example" if _separate(function, output, target, value) else "mean"
        if shape != ():
            remedy = "Average over every axis but the first."
            raise InvalidArgument(f"loss gave a tensor of shape {list(shape)}: it must be {allowed}. {remedy}")
        twice = function(torch.cat([output, output]), torch.cat([target, target]))
        if bool(value != 0) and bool((twice - 2 * value).abs() <= 1e-3 * value.abs()):
            found = "loss gave a scalar that doubles when the batch is given twice, a sum"
            raise InvalidArgument(f"{found}: it must be {allowed}. Return the losses, or divide by their number.")
    return "mean"


def _separate(function: LossFunction, output: Tensor, target: Tensor, together: Tensor) -> bool:
    """Whether each example's loss is its own: the same when the batch is cut in two.

    A contrastive loss, or one divided by the batch's own mean, is not: it must be asked for one client at a time.
    """
    try:
        first, rest = function(output[:1], target[:1]), function(output[1:], target[1:])
        apart = torch.cat([first, rest])
    except Exception:
        return False
    near = 1e-3 * together.abs().max()
    return apart.shape == together.shape and bool(((apart - together).abs() <= near).all() | together.isnan().any())


# --- the named losses -------------------------------------------------------------------------------------------------


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Give the cross-entropy of softmax(output), in nats, averaged over the further axes of an example.

    Args:
        output: logits `[n, K]` or `[n, K, d...]`.
        target: labels 0..K-1, integers `[n]` or `[n, d...]`.

    Returns:
        Losses `[n]`.
    """
    return _average(functional.cross_entropy(output, target.long(), reduction="none"))


def nll(output: Tensor, target: Tensor) -> Tensor:
    """Give the negative log-likelihood, in nats, of log-probabilities, averaged over the further axes of an example.

    Args:
        output: log-probabilities `[n, K]` or `[n, K, d...]`.
        target: labels 0..K-1, integers `[n]` or `[n, d...]`.

    Returns:
        Losses `[n]`.
    """
    return _average(functional.nll_loss(output, target.long(), reduction="none"))


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Give the cross-entropy, in nats, of sigmoid(output) against 0 or 1.

    Args:
        output: logits `[n]` or `[n, 1]`.
        target: 0 or 1, of any dtype, `[n]` or `[n, 1]`.

    Returns:
        Losses `[n]`.
    """
    # Both are brought to [n]: [n, 1] against [n] would broadcast to [n, n].
    flat = output.reshape(output.shape[0])
    truth = target.reshape(flat.shape).to(flat.dtype)
    return functional.binary_cross_entropy_with_logits(flat, truth, reduction="none")


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Give the squared error, averaged over the axes of an example.

    Args:
        output: predictions `[n, ...]`.
        target: numbers of the same shape, but for a trailing 1.

    Returns:
        Losses `[n]`, in the target's unit squared.
    """
    return _average((output - _aligned(output, target)).square())


def mae(output: Tensor, target: Tensor) -> Tensor:
    """Give the absolute error, averaged over the axes of an example.

    Args:
        output: predictions `[n, ...]`.
        target: numbers of the same shape, but for a trailing 1.

    Returns:
        Losses `[n]`, in the target's unit.
    """
    return _average((output - _aligned(output, target)).abs())


def huber(output: Tensor, target: Tensor) -> Tensor:
    """Give Huber's loss: half the squared error up to an error of 1, the absolute error less one half beyond.

    Args:
        output: predictions `[n, ...]`.
        target: numbers of the same shape, but for a trailing 1; scale them so that 1 is a large error.

    Returns:
        Losses `[n]`, averaged over the axes of an example. Huber, Robust estimation of a location parameter (1964).
    """
    return _average(functional.huber_loss(output, _aligned(output, target), reduction="none"))


def poisson(output: Tensor, target: Tensor) -> Tensor:
    """Give the negative log-likelihood of counts under Poisson(exp(output)), less the term of the counts alone.

    Args:
        output: logarithms of the expected counts `[n, ...]`.
        target: counts of the same shape, but for a trailing 1.

    Returns:
        Losses `[n]`, `exp(output) - target * output` averaged over the axes of an example.
    """
    return _average(output.exp() - _aligned(output, target) * output)


def _average(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _aligned(output: Tensor, target: Tensor) -> Tensor:
    # A reshape never broadcasts: shapes that do not hold the same numbers fail instead of growing to [n, n].
    return target.reshape(output.shape).to(output.dtype)


def _name_of(function: object) -> str:
    if isinstance(function, functools.partial):
        return _name_of(function.func)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


# --- checks, shared with the metrics ----------------------------------------------------------------------------------


def check_examples(output: Tensor, target: Tensor, *, owner: str) -> None:
    """Refuse anything but float outputs and targets of as many examples.

    Args:
        output: the model's output `[n, ...]`.
        target: the targets `[n, ...]`.
        owner: who asks, for the message.
    """
    for argument, value in (("output", output), ("target", target)):
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            remedy = "A forward= callable can pick it from a richer result."
            raise invalid(argument, value, f"a tensor for {owner}", remedy)
        if value.dim() == 0:
            raise invalid(argument, (), f"a tensor whose first axis is the example for {owner}")
    if not output.is_floating_point():
        remedy = "Return the model's scores, not its decisions."
        raise invalid("output", output.dtype, f"of a float dtype for {owner}", remedy)
    if output.shape[0] != target.shape[0]:
        allowed = f"one row per example for {owner}: target has shape {list(target.shape)}"
        remedy = "The model must return its output with the batch as first axis."
        raise invalid("output", tuple(output.shape), allowed, remedy)


def check_classes(output: Tensor, target: Tensor, *, owner: str) -> None:
    """Refuse anything but scores `[n, K, d...]`, K at least 2, with integer labels 0..K-1 `[n, d...]`.

    Args:
        output: scores of the classes.
        target: labels.
        owner: who asks, for the message.
    """
    check_examples(output, target, owner=owner)
    labels = list(target.shape)
    wanted = ", ".join(str(size) for size in [labels[0], "K", *labels[1:]])
    if output.dim() < 2 or output.shape[1] < 2 or [output.shape[0], *output.shape[2:]] != labels:
        allowed = f"of shape [{wanted}] with K >= 2 classes for {owner} and a target of shape {labels}"
        if output.dim() <= 2 and output.numel() == output.shape[0]:
            remedy = "Give the model one output per class, or use 'binary_cross_entropy' with its single output."
        elif target.dim() == output.dim() and target.shape[-1] == 1:
            remedy = "Drop the target's last axis: target.squeeze(-1)."
        elif target.shape == output.shape:
            remedy = "Give labels instead of one-hot rows: target.argmax(1)."
        else:
            remedy = "Match the model's last layer to the labels; the classes are the second axis."
        raise invalid("output", tuple(output.shape), allowed, remedy)
    if target.is_floating_point() or target.is_complex():
        remedy = "Convert labels with target.long(); for numbers to predict, use a regression loss such as 'mse'."
        raise invalid("target", target.dtype, f"of an integer dtype for {owner}", remedy)
    classes = output.shape[1]
    labelled = target.long()
    wrong = labelled[(labelled < 0) | (labelled >= classes)]
    if wrong.numel():
        raise DataError(
            f"target holds labels outside the classes for {owner}: {_listed(wrong)} "
            f"({wrong.numel()} of {target.numel()}). "
            f"With {classes} model outputs, labels must be 0..{classes - 1}. "
            f"Number the classes from 0, or give the model one output per class."
        )


def check_binary(output: Tensor, target: Tensor, *, owner: str) -> None:
    """Refuse anything but scores `[n]` or `[n, 1]` with targets 0 or 1, of any dtype, `[n]` or `[n, 1]`.

    Args:
        output: one score per example.
        target: 0 or 1.
        owner: who asks, for the message.
    """
    check_examples(output, target, owner=owner)
    count = output.shape[0]
    for argument, value in (("output", output), ("target", target)):
        if value.dim() > 2 or tuple(value.shape[1:]) not in ((), (1,)):
            other = f"output has shape {list(output.shape)}, target {list(target.shape)}"
            allowed = f"of shape [{count}] or [{count}, 1] for {owner}; {other}"
            if argument == "output":
                remedy = "Give the model a single output, or use 'cross_entropy' with one output per class."
            else:
                remedy = "Give one 0 or 1 per example."
            raise invalid(argument, tuple(value.shape), allowed, remedy)
    if target.is_complex():
        raise invalid("target", target.dtype, f"0 or 1 in a real dtype for {owner}")
    if target.dtype != torch.bool:
        wrong = target[(target != 0) & (target != 1)]
        if wrong.numel():
            raise DataError(
                f"target holds values other than 0 and 1 for {owner}: {_listed(wrong)} "
                f"({wrong.numel()} of {target.numel()}). "
                f"Recode the two classes as 0 and 1; for more classes use 'cross_entropy', for numbers 'mse'."
            )


def check_regression(output: Tensor, target: Tensor, *, owner: str) -> None:
    """Refuse anything but finite numbers of one shape, where a trailing axis of length 1 may be on one side only.

    Args:
        output: predictions `[n, ...]`.
        target: numbers `[n, ...]`.
        owner: who asks, for the message.
    """
    check_examples(output, target, owner=owner)
    if _trimmed(output) != _trimmed(target):
        allowed = f"of the target's shape {list(target.shape)}, but for a trailing 1, for {owner}"
        remedy = "Give the model as many outputs as an example has numbers to predict."
        raise invalid("output", tuple(output.shape), allowed, remedy)
    if target.dtype == torch.bool or target.is_complex():
        remedy = "For yes and no, use 'binary_cross_entropy'; otherwise convert with target.float()."
        raise invalid("target", target.dtype, f"of a float or integer dtype for {owner}", remedy)
    if target.is_floating_point() and not bool(target.isfinite().all()):
        count = int((~target.isfinite()).sum())
        raise DataError(
            f"target holds {count} NaN or infinite values of {target.numel()} for {owner}. "
            f"Every target must be a finite number: drop those examples or fill them in."
        )


def _trimmed(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _listed(wrong: Tensor) -> str:
    values = torch.sort(wrong.flatten()).values
    distinct = values[torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])]
    shown = ", ".join(f"{float(value):g}" for value in distinct[:5])
    return shown + (", ..." if distinct.numel() > 5 else "")


def _log_probabilities(output: Tensor, target: Tensor) -> None:
    # Half precision may round a log-probability of 0 up by a little; a logit is larger than that.
    if output.numel() and bool(output.detach().max() > 1e-2):
        highest = float(output.detach().max())
        remedy = "End the model in log_softmax, or use 'cross_entropy', which takes logits."
        raise invalid("output", highest, "log-probabilities, at most 0, for loss 'nll'", remedy)


def _counts(output: Tensor, target: Tensor) -> None:
    wrong = target[target < 0]
    if wrong.numel():
        raise DataError(
            f"target holds negative values for loss 'poisson': {_listed(wrong)} ({wrong.numel()} of {target.numel()}). "
            f"Counts must be 0 or more; for other numbers use 'mse' or 'huber'."
        )


_LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        loss.name: loss
        for loss in (
            Loss(name="cross_entropy", function=cross_entropy, kind="classes"),
            Loss(name="binary_cross_entropy", function=binary_cross_entropy, kind="binary"),
            Loss(name="mse", function=mse, kind="regression"),
            Loss(name="mae", function=mae, kind="regression"),
            Loss(name="huber", function=huber, kind="regression"),
            Loss(name="nll", function=nll, kind="classes", values=_log_probabilities),
            Loss(name="poisson", function=poisson, kind="regression", values=_counts),
        )
    }
)
