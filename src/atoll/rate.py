"""Learning-rate schedules: multipliers of the plan's rate, by round or by local step.

A schedule is called as `schedule(round, step)` and gives the number that the plan's learning rate is multiplied by.
`round` counts the rounds of the run from 0. `step` counts the local steps within the round from 0, so a schedule
`by="step"` starts afresh in every round; `step` may be a whole array of steps, one per client of a tile, and the answer
then has its shape. `position` below is whichever of the two `by` names.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from atoll.errors import invalid

if TYPE_CHECKING:
    from torch import Tensor

By: TypeAlias = Literal["round", "step"]
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.integer[Any]]


@runtime_checkable
class Schedule(Protocol):
    """What a learning-rate schedule offers."""

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        ...

    @overload
    def __call__(self, round: int, step: int) -> float: ...
    @overload
    def __call__(self, round: int, step: Integers) -> Floats: ...
    @overload
    def __call__(self, round: int, step: "Tensor") -> "Tensor": ...
    def __call__(self, round: int, step: "int | Integers | Tensor") -> "float | Floats | Tensor":
        """Give the multiplier, or one for every element of `step`."""
        ...


class _Schedule:
    """The common part: arrays in, arrays out, around `_multiplier` on numpy arrays."""

    __slots__ = ()

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        raise NotImplementedError

    @overload
    def __call__(self, round: int, step: int) -> float: ...
    @overload
    def __call__(self, round: int, step: Integers) -> Floats: ...
    @overload
    def __call__(self, round: int, step: "Tensor") -> "Tensor": ...
    def __call__(self, round: int, step: "int | Integers | Tensor") -> "float | Floats | Tensor":
        """Give the multiplier of the learning rate.

        Args:
            round: the round, from 0.
            step: the local step within the round, from 0; an integer, or a numpy or torch array of integers.

        Returns:
            A float for an integer; for an array a float64 array of its shape, kind and device.
        """
        if isinstance(step, int | np.integer):
            return float(_evaluate(self._multiplier, round, np.asarray(step)))
        if isinstance(step, np.ndarray):
            return _evaluate(self._multiplier, round, step)
        import torch

        if not isinstance(step, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise invalid("step", step, "an integer, or a numpy or torch array of integers")
        steps: Integers = step.detach().cpu().numpy()  # pyright: ignore[reportUnknownMemberType]
        return torch.from_numpy(_evaluate(self._multiplier, round, steps)).to(step.device)  # pyright: ignore[reportUnknownMemberType]


def _evaluate(multiplier: Callable[[Floats, Floats], Floats], round: int, step: Integers) -> Floats:
    _whole("round", round, at_least=0)
    if not np.issubdtype(step.dtype, np.integer):
        raise invalid("step", step.dtype, "of an integer dtype")
    if step.size and step.min() < 0:
        raise invalid("step", int(step.min()), "0 or more")
    steps = step.astype(np.float64)
    # numpy turns results without axes into scalars.
    return np.asarray(multiplier(np.full_like(steps, float(round)), steps))


@dataclass(frozen=True, slots=True)
class Constant(_Schedule):
    """The plan's rate, unchanged."""

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        return {"name": "constant"}

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        return np.ones_like(step)


@dataclass(frozen=True, slots=True)
class Exponential(_Schedule):
    """decay ^ floor(position / every)."""

    decay: float
    every: int
    by: By

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        return {"name": "exponential", "decay": self.decay, "every": self.every, "by": self.by}

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        return self.decay ** np.floor(_position(self.by, round, step) / self.every)


@dataclass(frozen=True, slots=True)
class Cosine(_Schedule):
    """floor + (1 - floor) (1 + cos(pi min(position / total, 1))) / 2."""

    total: int
    floor: float
    by: By

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        return {"name": "cosine", "total": self.total, "floor": self.floor, "by": self.by}

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        part = np.minimum(_position(self.by, round, step) / self.total, 1.0)
        return self.floor + (1.0 - self.floor) * (1.0 + np.cos(np.pi * part)) / 2.0


@dataclass(frozen=True, slots=True)
class Warmup(_Schedule):
    """min(1, (position + 1) / total) times `then` at max(0, position - total)."""

    total: int
    then: Schedule
    by: By

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        return {"name": "warmup", "total": self.total, "then": self.then.spec, "by": self.by}

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        ramp = np.minimum((_position(self.by, round, step) + 1.0) / self.total, 1.0)
        if self.by == "round":
            round = np.maximum(round - self.total, 0.0)
        else:
            step = np.maximum(step - self.total, 0.0)
        if isinstance(self.then, _Schedule):
            return ramp * self.then._multiplier(round, step)
        first = int(round.flat[0]) if round.size else 0
        return ramp * np.asarray(self.then(first, step.astype(np.int64)), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class InverseSqrt(_Schedule):
    """sqrt(offset / (offset + position))."""

    offset: float
    by: By

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        return {"name": "inverse_sqrt", "offset": self.offset, "by": self.by}

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        return np.sqrt(self.offset / (self.offset + _position(self.by, round, step)))


@dataclass(frozen=True, slots=True)
class Piecewise(_Schedule):
    """The factor of the last boundary reached, 1 before the first."""

    pieces: tuple[tuple[int, float], ...]  # (boundary, factor), by boundary
    by: By

    @property
    def spec(self) -> dict[str, Any]:
        """The schedule's name and arguments, ready for JSON."""
        return {"name": "piecewise", "pieces": [list(piece) for piece in self.pieces], "by": self.by}

    def _multiplier(self, round: Floats, step: Floats) -> Floats:
        boundaries = np.array([boundary for boundary, _ in self.pieces], dtype=np.float64)
        factors = np.array([1.0, *(factor for _, factor in self.pieces)])
        return factors[np.searchsorted(boundaries, _position(self.by, round, step), side="right")]


def constant() -> Constant:
    """Keep the plan's rate."""
    return Constant()


def exponential(decay: float, every: int = 1, *, by: By = "round") -> Exponential:
    """Multiply the rate by `decay` once every `every` rounds or steps: decay ^ floor(position / every).

    Args:
        decay: the factor, above 0 and at most 1.
        every: rounds or steps between two decays.
        by: "round" or "step" (within the round).

    Raises:
        InvalidArgument: a value outside its range.
    """
    decay = _number("decay", decay, "above 0 and at most 1", lambda value: 0.0 < value <= 1.0)
    return Exponential(decay=decay, every=_whole("every", every, at_least=1), by=_axis(by))


def cosine(total: int, floor: float = 0.0, *, by: By = "round") -> Cosine:
    """Let the rate fall along half a cosine from 1 at position 0 to `floor` at `total`, and stay there.

    Args:
        total: rounds or steps of the fall.
        floor: the last multiplier, from 0 to 1.
        by: "round" or "step" (within the round).

    Returns:
        The schedule of Loshchilov and Hutter, SGDR (2017), equation 5, without restarts.

    Raises:
        InvalidArgument: a value outside its range.
    """
    floor = _number("floor", floor, "from 0 to 1", lambda value: 0.0 <= value <= 1.0)
    return Cosine(total=_whole("total", total, at_least=1), floor=floor, by=_axis(by))


def warmup(total: int, then: Schedule | None = None, *, by: By = "round") -> Warmup:
    """Let the rate rise in a straight line over the first `total` rounds or steps, then follow another schedule.

    The multiplier is 1 / total at position 0 and 1 at total - 1. `then` sees positions less `total`; while the rate
    still rises it is held at its own position 0 and multiplies the rise.

    Args:
        total: rounds or steps of the rise.
        then: the schedule that follows; constant by default.
        by: "round" or "step" (within the round).

    Raises:
        InvalidArgument: a value outside its range, or a `then` that is no schedule.
    """
    follow = constant() if then is None else then
    if not isinstance(follow, Schedule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise invalid("then", then, "a schedule or None", "Use a builder of atoll.rate, such as cosine(total=100).")
    return Warmup(total=_whole("total", total, at_least=1), then=follow, by=_axis(by))


def inverse_sqrt(offset: float = 1.0, *, by: By = "round") -> InverseSqrt:
    """Let the rate fall as sqrt(offset / (offset + position)), the decay that convergence proofs of SGD ask for.

    Args:
        offset: above 0, in rounds or steps; the rate has halved after three offsets.
        by: "round" or "step" (within the round).

    Raises:
        InvalidArgument: a value outside its range.
    """
    offset = _number("offset", offset, "above 0", lambda value: value > 0.0)
    return InverseSqrt(offset=offset, by=_axis(by))


def piecewise(factors: Mapping[int, float], *, by: By = "round") -> Piecewise:
    """Set the multiplier anew at given rounds or steps; it is 1 before the first.

    Args:
        factors: from a boundary (the first round or step with the new value) to the multiplier of the plan's rate from
            there on. The values replace each other; they are not multiplied together.
        by: "round" or "step" (within the round).

    Raises:
        InvalidArgument: no boundary, a boundary that is no integer of 0 or more, or a factor below 0.
    """
    if not isinstance(factors, Mapping) or not factors:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise invalid("factors", factors, "a mapping with at least one boundary", "For example {100: 0.1, 150: 0.01}.")
    pieces = sorted(
        (
            _whole("boundary", boundary, at_least=0),
            _number("factor", factor, "0 or more", lambda value: value >= 0.0),
        )
        for boundary, factor in factors.items()
    )
    return Piecewise(pieces=tuple(pieces), by=_axis(by))


def _position(by: By, round: Floats, step: Floats) -> Floats:
    return round if by == "round" else step


def _axis(by: object) -> By:
    if by == "round":
        return "round"
    if by == "step":
        return "step"
    raise invalid("by", by, "'round' or 'step'")


def _whole(argument: str, value: object, *, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        raise invalid(argument, value, f"an integer of {at_least} or more")
    return int(value)


def _number(argument: str, value: object, allowed: str, fits: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid(argument, value, f"a number {allowed}")
    number = float(value)
    if not math.isfinite(number) or not fits(number):
        raise invalid(argument, value, f"a number {allowed}")
    return number
