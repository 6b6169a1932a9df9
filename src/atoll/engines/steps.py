"""The local step on rows: where the gradients of a group's parameters go.

    y <- y - rate * (gradient + pull * (y - anchor) + shift)

under the plan's optimiser. A backward hands over the gradient of one parameter after the other. Plain sgd and momentum
take the step inside the product that would have made the gradient, which is then never written; the pull and weight
decay are the product's factor, and what does not depend on y (`shift - pull * anchor`) is one vector beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.engines.arena import Arena
from atoll.engines.blocks import Blocks, Part
from atoll.engines.factors import Factors
from atoll.engines.precision import LOW
from atoll.engines.schedule import Members
from atoll.errors import invalid
from atoll.local import CLIP_EPS, Plan
from atoll.vectors import Layout


class Sink(ABC):
    """Takes in gradients of parameters by their number in the layout; each once, unless the rule was told otherwise."""

    @abstractmethod
    def wants(self, number: int) -> bool:
        """Whether this parameter is trained."""

    @abstractmethod
    def product(self, number: int, left: Tensor, right: Tensor) -> None:
        """The gradient [k, ...] is left [k, m, n] @ right [k, n, p], in the parameter's order of values."""

    @abstractmethod
    def add(self, number: int, gradient: Tensor) -> None:
        """The gradient [k, ...] itself."""

    def sum(self, number: int, values: Tensor) -> None:
        """The gradient [k, m] is the sum of values [k, n, m] over examples and their positions."""
        self.add(number, values.sum(dim=1))

    @abstractmethod
    def scatter(self, number: int, places: Tensor, values: Tensor) -> None:
        """The gradient of a table [k, n, d] is the sum of values [k, m, d] at places [k, m]."""


class Gradients(Sink):
    """Keeps the gradients: `found[number]` is [k, ...], or None where nothing came.

    Args:
        parts: the parameters, for their shapes.
        trained: numbers of those that are trained; None: all.
    """

    def __init__(self, parts: Sequence[Part], trained: frozenset[int] | None = None) -> None:
        self._parts = parts
        self._trained = trained
        self.found: list[Tensor | None] = [None] * len(parts)

    def wants(self, number: int) -> bool:
        return self._trained is None or number in self._trained

    def product(self, number: int, left: Tensor, right: Tensor) -> None:
        self.add(number, torch.bmm(left, right))

    def add(self, number: int, gradient: Tensor) -> None:
        before = self.found[number]
        shaped = gradient.reshape(self._parts[number].shape)
        if shaped.dtype == LOW:
            shaped = shaped.to(self._numbers(number).dtype)
        self.found[number] = shaped if before is None else before + shaped

    def scatter(self, number: int, places: Tensor, values: Tensor) -> None:
        table = torch.zeros_like(self._numbers(number))
        rows, size, width = table.shape
        table.view(rows * size, width).index_add_(0, _global(places, size), values.reshape(-1, width))
        self.add(number, table)

    def filled(self) -> list[Tensor]:
        """The gradients, zeros where nothing came."""
        return [torch.zeros_like(self._numbers(i)) if g is None else g for i, g in enumerate(self.found)]

    def _numbers(self, number: int) -> Tensor:
        """A parameter that does not stand as factors: only plain sgd works on these."""
        return cast(Tensor, self._parts[number])


def _global(places: Tensor, size: int) -> Tensor:
    """Places [k, m] in the rows' own tables as places [k * m] in the tables one after the other."""
    start = torch.arange(len(places), device=places.device)[:, None] * size
    return (places.reshape(len(places), -1) + start).view(-1)


class Rule:
    """The plan's rule for the rows of a tile, with the optimiser's state.

    Args:
        plan: how to train.
        layout: of the parameters.
        y: their blocks, which the steps change.
        anchor: rows [C, P] or a vector [P].
        pull: strength of the pull towards the anchor.
        shift: rows [C, P] or a vector [P] added to every gradient.
        train: mask [P] of the parameters that change; None: all.
        arena: memory for what lives no longer than the tile.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        y: Blocks,
        *,
        anchor: Tensor | None = None,
        pull: float = 0.0,
        shift: Tensor | None = None,
        train: Tensor | None = None,
        arena: Arena | None = None,
    ) -> None:
        if pull and anchor is None:
            raise invalid("anchor", None, "given when pull is not 0")
        self.plan, self.pull = plan, pull
        self.trained = None if train is None else frozenset(i for i, t in enumerate(_cut(layout, train)) if t.any())
        self.mask = (
            None if train is None or not splits(layout, train) else Blocks.shown(layout, train.to(y.like.device))
        )
        constant: Tensor | None = None
        anchor, shift = (t[0] if t is not None and _one(t) else t for t in (anchor, shift))
        if pull and anchor is not None:
            constant = -pull * anchor.detach() if shift is None else shift.detach() - pull * anchor.detach()
        elif shift is not None:
            constant = shift.detach()
        self.constant = None if constant is None else Blocks.held(layout, constant, arena)
        adaptive = plan.optimizer != "sgd"
        self.first = Blocks.zeros(layout, len(y), y.like) if adaptive or plan.momentum else None
        self.second = Blocks.zeros(layout, len(y), y.like) if adaptive else None

    def begin(
        self, parts: list[Part], members: Members, rates: NDArray[np.float64], steps: NDArray[np.int64]
    ) -> "Step":
        """A step of a group.

        Args:
            parts: the group's parameters [k, ...], which the step changes in place.
            members: the group.
            rates: learning rate of each row, [k].
            steps: local step of each row, from 0, [k].
        """
        within = self.plan.optimizer == "sgd" and self.plan.clip is None and self.mask is None
        if within and bool((rates == rates[0]).all()):
            return InProduct(self, parts, members, rates)
        return Whole(self, parts, members, rates, steps)


def by_factors(
    plan: Plan,
    round: int,
    steps: int,
    layout: Layout,
    rows: Tensor,
    anchor: Tensor | None,
    pull: float,
    shift: Tensor | None,
    train: Tensor | None,
) -> bool:
    """Whether the rule's steps can be taken on factors of what changed: plain sgd from one vector, at one rate.

    A pull towards that vector only scales what changed. Arguments are those of `Cohort.sgd`, with the round and the
    largest number of steps.
    """
    if plan.optimizer != "sgd" or plan.momentum or plan.weight_decay or plan.clip is not None:
        return False
    if shift is not None or not _one(rows):
        return False
    if pull and (anchor is None or anchor.data_ptr() != rows.data_ptr() or (anchor.ndim == 2 and not _one(anchor))):
        return False
    if train is not None and splits(layout, train):
        return False
    return plan.schedule is None or len(np.unique(plan.rate(round, np.arange(steps)))) == 1


def splits(layout: Layout, train: Tensor) -> bool:
    """Whether a mask [P] trains only some numbers of a parameter."""
    return any(bool(t.any()) and not bool(t.all()) for t in _cut(layout, train))


def _cut(layout: Layout, vector: Tensor) -> list[Tensor]:
    return [vector[a:b] for _, _, a, b in layout]


def _one(rows: Tensor) -> bool:
    """Whether rows [C, P] are all one vector."""
    return rows.ndim == 2 and (len(rows) == 1 or rows.stride(0) == 0)


class Step(Sink):
    """One step of a group. `finish` comes after the last gradient."""

    def __init__(self, rule: Rule, parts: list[Part], members: Members) -> None:
        self._rule, self._parts, self._members = rule, parts, members
        self._constant = None if rule.constant is None else rule.constant.tensors(members)
        self._trained = rule.trained

    def wants(self, number: int) -> bool:
        return self._trained is None or number in self._trained

    @abstractmethod
    def finish(self) -> None:
        """Take the step of whatever is left."""

    def again(self, rates: NDArray[np.float64], steps: NDArray[np.int64]) -> "Step":
        """The group's next step; arguments as for `Rule.begin`."""
        return self._rule.begin(self._parts, self._members, rates, steps)


class InProduct(Step):
    """Sgd, with or without momentum, at one rate for all rows: the step is taken as each gradient comes.

    With beta = 1 - rate (pull + weight decay):  y <- beta y - rate gradient - rate constant. With momentum, the
    velocity takes the product in: v <- momentum v + gradient + ..., then y <- y - rate v.
    """

    def __init__(self, rule: Rule, parts: list[Part], members: Members, rates: NDArray[np.float64]) -> None:
        super().__init__(rule, parts, members)
        rate = float(rates[0])
        self._rates, self._rate, self._decay = rates, rate, rule.pull + rule.plan.weight_decay
        self._velocity = None if rule.first is None else rule.first.tensors(members)
        if self._velocity is None:
            self._beta, self._alpha = 1.0 - rate * self._decay, -rate
        else:
            self._beta, self._alpha = rule.plan.momentum, 1.0
        self._came = [False] * len(parts)
        # Nothing is left to do once every gradient has come.
        self._plain = self._velocity is None and self._constant is None

    def product(self, number: int, left: Tensor, right: Tensor) -> None:
        own = self._taking(number)
        if isinstance(own, Factors):
            own.append(left.mT, right, beta=self._scale(number), alpha=self._alpha)
            return
        if left.dtype != own.dtype:  # the product is rounded, the step is not
            if (beta := self._scale(number)) != 1.0:
                own.mul_(beta)
            own.add_(torch.bmm(left, right).view(own.shape), alpha=self._alpha)
            return
        own.view(len(own), left.shape[1], right.shape[2]).baddbmm_(
            left, right, beta=self._scale(number), alpha=self._alpha
        )

    def add(self, number: int, gradient: Tensor) -> None:
        own = cast(Tensor, self._taking(number))
        if (beta := self._scale(number)) != 1.0:
            own.mul_(beta)
        own.add_(gradient.reshape(own.shape), alpha=self._alpha)

    def scatter(self, number: int, places: Tensor, values: Tensor) -> None:
        own = cast(Tensor, self._taking(number))
        if (beta := self._scale(number)) != 1.0:
            own.mul_(beta)
        rows, size, width = own.shape
        table = own.view(rows * size, width)
        table.index_add_(0, _global(places, size), values.reshape(-1, width), alpha=self._alpha)

    def again(self, rates: NDArray[np.float64], steps: NDArray[np.int64]) -> Step:
        if rates is not self._rates:
            return super().again(rates, steps)
        self._came = [False] * len(self._parts)
        return self

    def finish(self) -> None:
        if self._plain and all(self._came):
            return
        for number, (part, came) in enumerate(zip(self._parts, self._came, strict=True)):
            if not self.wants(number):
                continue
            if isinstance(part, Factors):  # its constant is the pull's, which stands in what it starts from
                if not came:
                    part.scale(self._beta)
                continue
            own = part if self._velocity is None else self._velocity[number]
            if not came and self._beta != 1.0:
                own.mul_(self._beta)
            constant = None if self._constant is None else self._constant[number]
            if self._velocity is None:
                if constant is not None:
                    part.sub_(constant, alpha=self._rate)
                continue
            if self._decay:
                own.add_(part, alpha=self._decay)
            if constant is not None:
                own.add_(constant)
            part.sub_(own, alpha=self._rate)
        if isinstance(self._members, Tensor) and self._rule.first is not None and self._velocity is not None:
            self._rule.first.put(self._members, self._velocity)

    def _taking(self, number: int) -> Part:
        return self._parts[number] if self._velocity is None else self._velocity[number]

    def _scale(self, number: int) -> float:
        """The factor of what is there: it acts once, with the first gradient."""
        if self._came[number]:
            return 1.0
        self._came[number] = True
        return self._beta


class Whole(Step):
    """Adam, clipping, masks inside a parameter, a rate for each row: the step is taken when all gradients are there."""

    def __init__(
        self, rule: Rule, parts: list[Part], members: Members, rates: NDArray[np.float64], steps: NDArray[np.int64]
    ) -> None:
        super().__init__(rule, parts, members)
        self._gradients = Gradients(parts, rule.trained)
        self._rates, self._steps = rates, steps

    def product(self, number: int, left: Tensor, right: Tensor) -> None:
        self._gradients.product(number, left, right)

    def add(self, number: int, gradient: Tensor) -> None:
        self._gradients.add(number, gradient)

    def scatter(self, number: int, places: Tensor, values: Tensor) -> None:
        self._gradients.scatter(number, places, values)

    def finish(self) -> None:
        rule, plan = self._rule, self._rule.plan
        first = None if rule.first is None else rule.first.tensors(self._members)
        second = None if rule.second is None else rule.second.tensors(self._members)
        parts = cast("list[Tensor]", self._parts)
        wanted = [i for i in range(len(parts)) if self.wants(i)]
        gradients = self._corrected(parts, wanted)
        for i in wanted:
            part, gradient = parts[i], gradients[i]
            rate = torch.from_numpy(self._rates).to(part).view(-1, *(1,) * (part.ndim - 1))
            if plan.optimizer != "adamw" and plan.weight_decay:
                gradient = gradient.add(part, alpha=plan.weight_decay)
            if first is not None and second is not None:
                change = self._adam(first[i], second[i], gradient)
            elif first is not None:
                change = first[i].mul_(plan.momentum).add_(gradient)
            else:
                change = gradient
            if plan.optimizer == "adamw" and plan.weight_decay:
                change = change.add(part, alpha=plan.weight_decay)
            change = change * rate
            part.sub_(change if rule.mask is None else torch.where(rule.mask.tensors()[i], change, 0.0))
        if isinstance(self._members, Tensor):
            for held, copies in ((rule.first, first), (rule.second, second)):
                if held is not None and copies is not None:
                    held.put(self._members, copies)

    def _corrected(self, parts: list[Tensor], wanted: list[int]) -> dict[int, Tensor]:
        """Gradients of the trained parameters with pull and shift in them, no longer than the plan allows."""
        rule, clip = self._rule, self._rule.plan.clip
        found = {i: g for i, g in enumerate(self._gradients.filled()) if i in set(wanted)}
        for i, gradient in found.items():
            if rule.pull:
                gradient = gradient.add(parts[i], alpha=rule.pull)
            if self._constant is not None:
                gradient = gradient + self._constant[i]
            if clip is not None and rule.mask is not None:
                gradient = torch.where(rule.mask.tensors()[i], gradient, 0.0)
            found[i] = gradient
        if clip is None or not found:
            return found
        norm = torch.stack([g.flatten(1).square().sum(dim=1) for g in found.values()]).sum(dim=0).sqrt()
        scale = (clip / (norm + CLIP_EPS)).clamp(max=1.0)
        return {i: g * scale.view(-1, *(1,) * (g.ndim - 1)) for i, g in found.items()}

    def _adam(self, first: Tensor, second: Tensor, gradient: Tensor) -> Tensor:
        """The direction of Adam; moments are renewed in place."""
        plan = self._rule.plan
        beta1, beta2 = plan.betas
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # In float64: 1 - beta**t loses half of float32's digits in the first steps.
        scale1, scale2 = (
            torch.from_numpy(1 - beta ** (self._steps + 1.0)).to(first).view(-1, *(1,) * (first.ndim - 1))
            for beta in plan.betas
        )
        return (first / scale1) / ((second / scale2).sqrt() + plan.eps)
