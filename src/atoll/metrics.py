"""Metrics as fixed-length sums: what leaves a client is a vector that can be added up, never its examples.

A metric accumulates the examples of many clients at once into rows of sums `[clients, size]`; rows of several clients,
batches or rounds are added; `finish` turns sums into the metric, on every leading axis at once. Where a metric is not
defined (no examples, a single class) it is nan, and `undefined` says why. A NaN among a client's outputs makes the
client's sums nan, so that no metric hides it.

The area under the ROC curve and the average precision need the order of all scores, which no fixed-length sum can keep.
They use one histogram of scores per class, the same in simulation and deployment; `bound` gives the largest error that
the histogram at hand can have caused.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from atoll.errors import InvalidArgument, invalid, unknown
from atoll.losses import check_binary, check_classes, check_regression

Kind: TypeAlias = Literal["classes", "binary", "scores", "regression"]
Scores: TypeAlias = Literal["logit", "probability"]


@runtime_checkable
class Metric(Protocol):
    """What the framework asks of a metric."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        ...

    @property
    def size(self) -> int:
        """The length of its sums."""
        ...

    @property
    def kind(self) -> Kind:
        """The outputs it fits: of classes (or one logit), of two classes, scores to be ranked, or numbers."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        ...

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        ...

    def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
        """Add up examples per client.

        Args:
            output: the model's outputs `[n, ...]`.
            target: the targets `[n, ...]`.
            client: the row that each example belongs to, int64 `[n]`, from 0 to clients - 1.
            clients: the number of rows.

        Returns:
            Sums `[clients, size]`, float64; rows of clients without examples are 0.
        """
        ...

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., size]` into values `[...]`, float64, nan where undefined."""
        ...

    def undefined(self, sums: Tensor) -> str | None:
        """Say in a few words why the value of sums `[size]` is nan; None where it is not."""
        ...


@dataclass(frozen=True, slots=True)
class _Base:
    """The parts that all metrics here share."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """The metric's name and arguments, ready for JSON."""
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def _owner(self) -> str:
        return f"metric {self.name!r}"

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., size]` into values `[...]`, float64, nan where undefined."""
        raise NotImplementedError

    def undefined(self, sums: Tensor) -> str | None:
        """Say in a few words why the value of sums `[size]` is nan; None where it is not."""
        if not bool(self.finish(sums).isnan()):
            return None
        if bool(sums.isnan().any()):
            return "NaN or infinite outputs"
        if not bool(sums.any()):
            return "no examples"
        return self._reason(sums)

    def _reason(self, sums: Tensor) -> str:
        return "not a finite number"


@dataclass(frozen=True, slots=True)
class _Mean(_Base):
    """A metric that is the mean of one number per example: sums are (total, examples)."""

    @property
    def size(self) -> int:
        """The length of its sums."""
        return 2

    def _values(self, output: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
        """Add up examples per client: sums `[clients, 2]`, float64."""
        values = _per_example(self._values(output, target).double())
        values = values.masked_fill(_has_nan(output), math.nan)
        return _segment_sums(torch.stack([values, torch.ones_like(values)], 1), client, clients)

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 2]` into means `[...]`, float64, nan where there are no examples."""
        return sums[..., 0] / sums[..., 1]


# --- decisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accuracy(_Mean):
    """The share of right decisions: the largest output, or a single output above the threshold."""

    threshold: float = 0.0

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "accuracy"

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "classes"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return True

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        _check_decisions(output, target, self._owner)

    def _values(self, output: Tensor, target: Tensor) -> Tensor:
        return _decided(output, self.threshold) == _labels(output, target)


@dataclass(frozen=True, slots=True)
class BalancedAccuracy(_Base):
    """The mean over classes of the share of right decisions: sums are (right per class, examples per class)."""

    outputs: int
    threshold: float = 0.0

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "balanced_accuracy"

    @property
    def size(self) -> int:
        """The length of its sums."""
        return 2 * self._classes

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "classes"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return True

    @property
    def _classes(self) -> int:
        return max(self.outputs, 2)

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        _check_decisions(output, target, self._owner)
        given = 1 if output.dim() == 1 else output.shape[1]
        if output.dim() > 2 or given != self.outputs:
            wanted = f"[n, {self.outputs}]" if self.outputs > 1 else "[n] or [n, 1]"
            allowed = f"of shape {wanted} for {self._owner} of {self.outputs} outputs"
            raise invalid("output", tuple(output.shape), allowed, f"Build it with outputs={given}.")

    def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
        """Add up examples per client: sums `[clients, 2 K]`, float64."""
        truth = _labels(output, target)
        right = _decided(output, self.threshold) == truth
        total = _histogram(truth, client, clients=clients, bins=self._classes)
        correct = _histogram(truth[right], client[right], clients=clients, bins=self._classes)
        return _spoilt(torch.cat([correct, total], 1), _has_nan(output), client)

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 2 K]` into the mean over the classes that have examples, `[...]`, float64."""
        right, total = sums[..., : self._classes], sums[..., self._classes :]
        shares = torch.where(total == 0, 0.0, right / total)
        return shares.sum(-1) / (total != 0).sum(-1)


@dataclass(frozen=True, slots=True)
class TopK(_Mean):
    """The share of examples whose class is among the k largest outputs; of equal outputs the first classes count."""

    k: int

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return f"top{self.k}"

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "classes"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return True

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        check_classes(output, target, owner=self._owner)
        if output.shape[1] <= self.k:
            allowed = f"of more than {self.k} classes for {self._owner}, which is 1 for any model otherwise"
            raise invalid("output", tuple(output.shape), allowed, "Use 'accuracy' or a smaller top_k(k).")

    def _values(self, output: Tensor, target: Tensor) -> Tensor:
        truth = target.long().unsqueeze(1)
        mine = output.gather(1, truth)
        order = torch.arange(output.shape[1], device=output.device)
        earlier = order.reshape(1, -1, *[1] * (output.dim() - 2)) < truth
        ahead = (output > mine) | ((output == mine) & earlier)
        return ahead.sum(1) < self.k


# --- rankings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ranking(_Base):
    """A metric of the order of scores: sums are (negatives per bin, positives per bin), bins by rising score."""

    low: float
    high: float
    bins: int
    scores: Scores

    @property
    def size(self) -> int:
        """The length of its sums."""
        return 2 * self.bins

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "scores"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return True

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        if output.dim() == 2 and output.shape[1] == 2:
            check_classes(output, target, owner=self._owner)
        elif output.dim() > 1 and tuple(output.shape[1:]) != (1,):
            remedy = "Use 'accuracy' or 'balanced_accuracy' where there are more than two classes."
            allowed = f"of shape [n], [n, 1] or [n, 2] for {self._owner}; target has shape {list(target.shape)}"
            raise invalid("output", tuple(output.shape), allowed, remedy)
        else:
            check_binary(output, target, owner=self._owner)
        if self.scores == "probability":
            _check_probabilities(output, self._owner)

    def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
        """Add up examples per client: sums `[clients, 2 bins]`, float64."""
        score = output.reshape(-1) if output.dim() == 1 or output.shape[1] == 1 else output
        score = score.double()
        if score.dim() == 2:
            score = score[:, 1] if self.scores == "probability" else score[:, 1] - score[:, 0]
        missing = score.isnan()
        place = (score.clamp(self.low, self.high) - self.low) * (self.bins / (self.high - self.low))
        bins = place.masked_fill(missing, 0.0).floor().long().clamp(0, self.bins - 1)
        positive = (target.reshape(-1) != 0).long()
        sums = _histogram(positive * self.bins + bins, client, clients=clients, bins=self.size)
        return _spoilt(sums, missing, client)

    def _halves(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums[..., : self.bins], sums[..., self.bins :]


@dataclass(frozen=True, slots=True)
class Auc(_Ranking):
    """The area under the ROC curve: the chance that a positive scores above a negative, ties counting one half."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "auc"

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 2 bins]` into areas `[...]`, float64, nan unless both classes have examples."""
        negatives, positives = self._halves(sums)
        below = negatives.cumsum(-1) - negatives
        wins = (positives * (below + 0.5 * negatives)).sum(-1)
        return wins / (positives.sum(-1) * negatives.sum(-1))

    def bound(self, sums: Tensor) -> Tensor:
        """Give the largest distance between the histogram's area and the area of the scores themselves.

        Only pairs of a positive and a negative in one bin are undecided. Each counts one half where it truly counts 0,
        one half or 1, so the error is at most half the number of such pairs divided by the number of all pairs, and
        scores that reach it exist.

        Args:
            sums: `[..., 2 bins]`.

        Returns:
            Bounds `[...]`, float64, nan where the area is.
        """
        negatives, positives = self._halves(sums)
        return 0.5 * (positives * negatives).sum(-1) / (positives.sum(-1) * negatives.sum(-1))

    def _reason(self, sums: Tensor) -> str:
        return "only one class among the examples"


@dataclass(frozen=True, slots=True)
class AveragePrecision(_Ranking):
    """The precision at each threshold, weighted by the recall gained there; a bin is one threshold."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "average_precision"

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 2 bins]` into average precisions `[...]`, float64, nan where no example is positive."""
        negatives, positives = (half.flip(-1) for half in self._halves(sums))
        right, chosen = positives.cumsum(-1), (positives + negatives).cumsum(-1)
        precision = torch.where(chosen == 0, 0.0, right / chosen)
        return (positives * precision).sum(-1) / positives.sum(-1)

    def bound(self, sums: Tensor) -> Tensor:
        """Give the largest distance between the histogram's value and the average precision of the scores themselves.

        Take a bin of p positives and m negatives, with P and N above it. Its part of the sum over positives is
        p (P + p) / (P + p + N + m) here. It is largest, p (P + p) / (P + p + N), where its positives tie above its
        negatives, and smallest, sum over j = 1..p of (P + j) / (P + j + N + m), where they come one by one below them;
        with a = N + m and the digamma function psi that is p - a (psi(P + p + a + 1) - psi(P + a + 1)).

        Args:
            sums: `[..., 2 bins]`.

        Returns:
            Bounds `[...]`, float64, nan where the value is.
        """
        negatives, positives = (half.flip(-1) for half in self._halves(sums))
        reached, among = positives.cumsum(-1), negatives.cumsum(-1)
        before, above = reached - positives, among - negatives
        here = positives * _ratio(reached, reached + among)
        most = positives * _ratio(reached, reached + above)
        least = positives - among * (torch.digamma(reached + among + 1.0) - torch.digamma(before + among + 1.0))
        error = torch.maximum((most - here).sum(-1), (here - least).sum(-1))
        return error.clamp(min=0.0) / positives.sum(-1)

    def _reason(self, sums: Tensor) -> str:
        return "no positive among the examples"


# --- probabilities ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Brier(_Mean):
    """The squared error of the predicted probabilities (Brier, 1950).

    With two classes (p - y)^2 of the positive's probability; with more, the sum of the squares over the classes.
    """

    scores: Scores = "logit"

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "brier"

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "classes"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return False

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        _check_chances(output, target, self._owner, scores=self.scores)

    def _values(self, output: Tensor, target: Tensor) -> Tensor:
        chances = _chances(output, self.scores)
        truth = target.reshape(-1)
        if chances.dim() == 1:
            return (chances - truth.double()).square()
        mine = chances.gather(1, truth.long().unsqueeze(1)).squeeze(1)
        return chances.square().sum(1) - 2.0 * mine + 1.0


@dataclass(frozen=True, slots=True)
class CalibrationError(_Base):
    """The expected calibration error: the mean distance, over bins of confidence, between confidence and frequency.

    Sums are (examples, sum of confidences, hits) per bin, so that within the bins nothing is rounded. With two classes
    the confidence is the positive's probability and a hit is a positive; with more it is the largest probability, and
    a hit is a right decision. Naeini, Cooper and Hauskrecht, Obtaining well calibrated probabilities (2015).
    """

    bins: int = 15
    scores: Scores = "logit"

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "calibration_error"

    @property
    def size(self) -> int:
        """The length of its sums."""
        return 3 * self.bins

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "classes"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return False

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        _check_chances(output, target, self._owner, scores=self.scores)

    def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
        """Add up examples per client: sums `[clients, 3 bins]`, float64."""
        confidence, truth = _chances(output, self.scores), target.reshape(-1)
        if confidence.dim() == 1:
            hit = truth != 0
        else:
            confidence, decision = confidence.max(1)
            hit = decision == truth
        missing = confidence.isnan()
        confidence = confidence.masked_fill(missing, 0.0)
        place = client * self.bins + (confidence * self.bins).floor().long().clamp(0, self.bins - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, hit.double()], 1)
        sums = _segment_sums(rows, place, clients * self.bins)
        sums = sums.reshape(clients, self.bins, 3).transpose(1, 2).reshape(clients, self.size)
        return _spoilt(sums, missing, client)

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 3 bins]` into errors `[...]`, float64, nan where there are no examples."""
        examples, confidence, hits = _thirds(sums)
        return (confidence - hits).abs().sum(-1) / examples.sum(-1)


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Error(_Mean):
    """A mean error of predicted numbers, averaged over the axes of an example."""

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "regression"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return False

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        check_regression(output, target, owner=self._owner)


@dataclass(frozen=True, slots=True)
class MeanSquaredError(_Error):
    """The mean of the squared errors, in the target's unit squared."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "mse"

    def _values(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.double() - target.reshape(output.shape).double()).square()


@dataclass(frozen=True, slots=True)
class RootMeanSquaredError(MeanSquaredError):
    """The square root of the mean of the squared errors, in the target's unit."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "rmse"

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 2]` into roots `[...]`, float64, nan where there are no examples."""
        return (sums[..., 0] / sums[..., 1]).sqrt()


@dataclass(frozen=True, slots=True)
class MeanAbsoluteError(_Error):
    """The mean of the absolute errors, in the target's unit."""

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "mae"

    def _values(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.double() - target.reshape(output.shape).double()).abs()


@dataclass(frozen=True, slots=True)
class R2(_Base):
    """The share of the targets' variance that is explained, averaged over outputs.

    Sums are the number of examples and, per output, (squared errors, targets, squared targets), the targets less
    `center`. A variance from sums loses digits where the mean is large beside the standard deviation: choose `center`
    near the mean then. Below 1e-12 of the mean square a variance counts as none.
    """

    outputs: int = 1
    center: float = 0.0

    @property
    def name(self) -> str:
        """The name in histories and tables."""
        return "r2"

    @property
    def size(self) -> int:
        """The length of its sums."""
        return 1 + 3 * self.outputs

    @property
    def kind(self) -> Kind:
        """The outputs it fits."""
        return "regression"

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return True

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse outputs `[n, ...]` and targets `[n, ...]` that it does not fit."""
        check_regression(output, target, owner=self._owner)
        given = math.prod(output.shape[1:])
        if given != self.outputs:
            allowed = f"of {self.outputs} numbers per example for {self._owner} of {self.outputs} outputs"
            raise invalid("output", tuple(output.shape), allowed, f"Build it with outputs={given}.")

    def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
        """Add up examples per client: sums `[clients, 1 + 3 outputs]`, float64."""
        shape = (output.shape[0], self.outputs)
        truth = target.reshape(shape).double()
        error = output.reshape(shape).double() - truth
        shifted = truth - self.center
        ones = torch.ones(shape[0], 1, dtype=torch.float64, device=output.device)
        return _segment_sums(torch.cat([ones, error.square(), shifted, shifted.square()], 1), client, clients)

    def finish(self, sums: Tensor) -> Tensor:
        """Turn sums `[..., 1 + 3 outputs]` into shares `[...]`, float64, nan where an output's targets do not vary."""
        examples = sums[..., :1]
        error, total, squares = _thirds(sums[..., 1:])
        variation = squares - total.square() / examples
        known = (variation > 1e-12 * squares) | variation.isnan()
        return torch.where(known, 1.0 - error / variation, math.nan).mean(-1)

    def _reason(self, sums: Tensor) -> str:
        return "only one example" if float(sums[0]) == 1.0 else "the targets do not vary"


# --- builders ---------------------------------------------------------------------------------------------------------


def accuracy(*, threshold: float = 0.0) -> Accuracy:
    """Measure the share of right decisions.

    Args:
        threshold: a single output above it decides for class 1; 0 for logits, 0.5 for probabilities.
    """
    return Accuracy(threshold=_finite("threshold", threshold))


def balanced_accuracy(outputs: int, *, threshold: float = 0.0) -> BalancedAccuracy:
    """Measure the share of right decisions per class, averaged over the classes that have examples.

    Args:
        outputs: the model's outputs per example: K for K classes, 1 for a single logit.
        threshold: a single output above it decides for class 1; 0 for logits, 0.5 for probabilities.
    """
    return BalancedAccuracy(outputs=_whole("outputs", outputs, 1), threshold=_finite("threshold", threshold))


def top_k(k: int) -> TopK:
    """Measure the share of examples whose class is among the k largest outputs.

    Args:
        k: 1 or more, and less than the number of classes.
    """
    return TopK(k=_whole("k", k, 1))


def auc(*, low: float | None = None, high: float | None = None, bins: int = 1024, scores: Scores = "logit") -> Auc:
    """Measure the area under the ROC curve from a histogram of scores; `Auc.bound` gives its largest error.

    Scores are the single output, or the difference of two. The bins are of equal width; scores outside the range count
    in its first and last bin.

    Args:
        low: the lowest score that is told apart; -16 for logits, 0 for probabilities.
        high: the highest score that is told apart; 16 for logits, 1 for probabilities.
        bins: bins per class, 2 or more.
        scores: whether outputs are logits or probabilities (of class 1 where there are two outputs).

    Raises:
        InvalidArgument: an empty range, fewer than two bins, or unknown scores.
    """
    return Auc(**_histogram_arguments(low, high, bins=bins, scores=scores))


def average_precision(
    *, low: float | None = None, high: float | None = None, bins: int = 1024, scores: Scores = "logit"
) -> AveragePrecision:
    """Measure the average precision from a histogram of scores; `AveragePrecision.bound` gives its largest error.

    Args:
        low: the lowest score that is told apart; -16 for logits, 0 for probabilities.
        high: the highest score that is told apart; 16 for logits, 1 for probabilities.
        bins: bins per class, 2 or more.
        scores: whether outputs are logits or probabilities (of class 1 where there are two outputs).

    Raises:
        InvalidArgument: an empty range, fewer than two bins, or unknown scores.
    """
    return AveragePrecision(**_histogram_arguments(low, high, bins=bins, scores=scores))


def brier(*, scores: Scores = "logit") -> Brier:
    """Measure the squared error of the predicted probabilities.

    Args:
        scores: whether outputs are logits or probabilities.
    """
    return Brier(scores=_known_scores(scores))


def calibration_error(*, bins: int = 15, scores: Scores = "logit") -> CalibrationError:
    """Measure the expected calibration error.

    Args:
        bins: bins of equal width over the probabilities, 15 or more.
        scores: whether outputs are logits or probabilities.
    """
    return CalibrationError(bins=_whole("bins", bins, 15), scores=_known_scores(scores))


def mse() -> MeanSquaredError:
    """Measure the mean squared error."""
    return MeanSquaredError()


def rmse() -> RootMeanSquaredError:
    """Measure the root of the mean squared error."""
    return RootMeanSquaredError()


def mae() -> MeanAbsoluteError:
    """Measure the mean absolute error."""
    return MeanAbsoluteError()


def r2(*, outputs: int = 1, center: float = 0.0) -> R2:
    """Measure the coefficient of determination, averaged over outputs.

    Args:
        outputs: the numbers predicted per example.
        center: a number near the targets' mean, the same for all clients, in the target's unit.
    """
    return R2(outputs=_whole("outputs", outputs, 1), center=_finite("center", center))


def get(metric: str | Metric, *, outputs: int | None = None) -> Metric:
    """Find a metric by name.

    Args:
        metric: one of `names()`, "top" and a number, or a metric object, which comes back as it is.
        outputs: the model's outputs per example, for the metrics whose sums depend on it.

    Raises:
        InvalidArgument: the name is unknown, or needs `outputs`.
    """
    if not isinstance(metric, str):
        if not isinstance(metric, Metric):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise invalid("metric", metric, "a name or a metric object", f"Known names: {', '.join(names())}.")
        return metric
    if metric in _PLAIN:
        return _PLAIN[metric]()
    if metric == "r2":
        return r2(outputs=1 if outputs is None else outputs)
    if metric == "balanced_accuracy":
        if outputs is None:
            remedy = "Give the metric object balanced_accuracy(outputs=K) instead of its name."
            raise invalid("outputs", outputs, f"the model's number of outputs for metric {metric!r}", remedy)
        return balanced_accuracy(outputs)
    if re.fullmatch(r"top[1-9][0-9]*", metric):
        return top_k(int(metric[3:]))
    raise unknown("metric", metric, names(), "A metric object is welcome too.")


def names() -> tuple[str, ...]:
    """Give the names that `get` knows; "top5" stands for any number."""
    return (*_PLAIN, "balanced_accuracy", "r2", "top5")


# --- several metrics, many clients ------------------------------------------------------------------------------------


def evaluate_sums(metrics: Sequence[Metric], output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
    """Accumulate several metrics into one row of sums per client.

    Args:
        metrics: the metrics, in the order of their sums.
        output: the model's outputs `[n, ...]`.
        target: the targets `[n, ...]`.
        client: the row that each example belongs to, int64 `[n]`, from 0 to clients - 1.
        clients: the number of rows.

    Returns:
        Sums `[clients, sum of sizes]`, float64.
    """
    if tuple(client.shape) != (output.shape[0],):
        raise invalid("client", tuple(client.shape), f"of shape [{output.shape[0]}], one row number per example")
    if not metrics:
        return torch.zeros(clients, 0, dtype=torch.float64, device=output.device)
    return torch.cat([metric.accumulate(output, target, client, clients) for metric in metrics], 1)


def split_sums(metrics: Sequence[Metric], sums: Tensor) -> tuple[Tensor, ...]:
    """Split rows of sums back into those of each metric.

    Args:
        metrics: the metrics, in the order of their sums.
        sums: `[..., sum of sizes]`.

    Returns:
        Per metric, views `[..., size]`.
    """
    sizes = [metric.size for metric in metrics]
    if sums.shape[-1] != sum(sizes):
        allowed = f"of {sum(sizes)} columns, the sizes of the {len(sizes)} metrics together"
        raise invalid("sums", tuple(sums.shape), allowed, "Split them by the metrics that accumulated them.")
    ends = list(accumulate(sizes))
    return tuple(sums[..., end - size : end] for size, end in zip(sizes, ends, strict=True))


def spread(values: Tensor, weights: Tensor, *, higher_is_better: bool = True) -> dict[str, float]:
    """Describe how a metric differs between clients; undefined (nan) clients are left out and counted.

    Args:
        values: a metric per client `[clients]`.
        weights: weights of the clients `[clients]`, 0 or more; examples, as a rule.
        higher_is_better: the direction in which clients are worst.

    Returns:
        `mean` over clients, `weighted` mean, `worst_decile` (mean over the worst tenth, rounded down, at least one
        client), `std` (of the population) and `undefined`, the number of clients left out. All but the last are nan
        where no client has a value.

    Raises:
        InvalidArgument: shapes differ, or a weight is negative or not finite.
    """
    if values.dim() != 1 or weights.shape != values.shape:
        allowed = f"of the shape [clients] of values, here {list(values.shape)}"
        raise invalid("weights", tuple(weights.shape), allowed)
    refused = weights[~(weights.isfinite() & (weights >= 0))]
    if refused.numel():
        raise invalid("weights", float(refused[0]), "finite and 0 or more")
    known = ~values.isnan()
    kept, share = values[known].double(), weights[known].double()
    count = kept.numel()
    missing = float(values.numel() - count)
    if count == 0:
        return {"mean": math.nan, "weighted": math.nan, "worst_decile": math.nan, "std": math.nan, "undefined": missing}
    worst = kept.sort(descending=not higher_is_better).values[: max(1, count // 10)]
    return {
        "mean": float(kept.mean()),
        # A client of weight 0 must not turn an infinite value into nan.
        "weighted": float(torch.where(share == 0, 0.0, kept * share).sum() / share.sum()),
        "worst_decile": float(worst.mean()),
        "std": float(kept.std(correction=0)),
        "undefined": missing,
    }


# --- parts ------------------------------------------------------------------------------------------------------------


def _thirds(sums: Tensor) -> tuple[Tensor, ...]:
    return sums.reshape(*sums.shape[:-1], 3, sums.shape[-1] // 3).unbind(-2)


def _segment_sums(rows: Tensor, client: Tensor, clients: int) -> Tensor:
    # index_add_ adds in no fixed order on a GPU; an accumulating put in float64 gives the same bits every time.
    sums = torch.zeros(clients, rows.shape[1], dtype=torch.float64, device=rows.device)
    return sums.index_put_((client,), rows, accumulate=True)


def _histogram(place: Tensor, client: Tensor, *, clients: int, bins: int) -> Tensor:
    counts = torch.bincount(client * bins + place, minlength=clients * bins)
    return counts.reshape(clients, bins).double()


def _spoilt(sums: Tensor, missing: Tensor, client: Tensor) -> Tensor:
    rows = torch.bincount(client[missing], minlength=sums.shape[0]) > 0
    return sums.masked_fill(rows.unsqueeze(1), math.nan)


def _per_example(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _has_nan(output: Tensor) -> Tensor:
    return output.isnan() if output.dim() == 1 else output.isnan().flatten(1).any(1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, part / whole)


def _single(output: Tensor) -> bool:
    return output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)


def _decided(output: Tensor, threshold: float) -> Tensor:
    return (output.reshape(-1) > threshold).long() if _single(output) else output.argmax(1)


def _labels(output: Tensor, target: Tensor) -> Tensor:
    return (target.reshape(-1) != 0).long() if _single(output) else target.long()


def _chances(output: Tensor, scores: Scores) -> Tensor:
    """Give the probabilities of class 1 `[n]` where there are two classes, of all classes `[n, K]` otherwise."""
    wide = output.double()
    if _single(wide):
        flat = wide.reshape(-1)
        return flat if scores == "probability" else flat.sigmoid()
    chances = wide if scores == "probability" else wide.softmax(1)
    return chances[:, 1] if wide.shape[1] == 2 else chances


def _check_decisions(output: Tensor, target: Tensor, owner: str) -> None:
    if _single(output):
        check_binary(output, target, owner=owner)
    else:
        check_classes(output, target, owner=owner)


def _check_chances(output: Tensor, target: Tensor, owner: str, *, scores: Scores) -> None:
    if output.dim() > 2:
        allowed = f"of shape [n], [n, 1] or [n, K] for {owner}; target has shape {list(target.shape)}"
        raise invalid("output", tuple(output.shape), allowed, "Flatten further axes into examples in a metric object.")
    _check_decisions(output, target, owner)
    if scores == "probability":
        _check_probabilities(output, owner)


def _check_probabilities(output: Tensor, owner: str) -> None:
    if bool(((output < 0) | (output > 1)).any()):
        found = f"output holds values from {float(output.min()):g} to {float(output.max()):g}"
        raise InvalidArgument(f"{found}: {owner} takes probabilities, from 0 to 1. Build it with scores='logit'.")


def _whole(argument: str, value: object, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise invalid(argument, value, f"an integer of {at_least} or more")
    return value


def _finite(argument: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(argument, value, "a finite number")
    return float(value)


def _known_scores(scores: object) -> Scores:
    if scores == "logit":
        return "logit"
    if scores == "probability":
        return "probability"
    raise invalid("scores", scores, "'logit' or 'probability'")


def _histogram_arguments(low: float | None, high: float | None, *, bins: int, scores: Scores) -> dict[str, Any]:
    scores = _known_scores(scores)
    first, last = (0.0, 1.0) if scores == "probability" else (-16.0, 16.0)
    low = first if low is None else _finite("low", low)
    high = last if high is None else _finite("high", high)
    if high <= low:
        raise invalid("high", high, f"above low={low}")
    return {"low": low, "high": high, "bins": _whole("bins", bins, 2), "scores": scores}


_PLAIN: Mapping[str, Callable[[], Metric]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "auc": auc,
        "average_precision": average_precision,
        "brier": brier,
        "calibration_error": calibration_error,
        "mse": mse,
        "rmse": rmse,
        "mae": mae,
    }
)
