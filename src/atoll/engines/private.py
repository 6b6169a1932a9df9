"""Local steps on clipped and noised sums of single examples' gradients (`atoll.privacy.example_level`).

One client after the other: its minibatches are Poisson samples, of which no two have the same size. The gradients of a
batch are those of a tile whose rows are examples: every row is the same model and sees one example. `PerExample` takes
them in as products, and adds up the clipped ones without ever writing a single one out, where a layer allows: of one
position the norm of a product left x right is |left| |right| (Goodfellow 2015, "Efficient per-example gradient
computations"), of several it follows from their inner products (Bu, Wang, Zha & Karypis 2023, "Differentially private
optimization on large model at small cost"), and the clipped sum is one product with the rows' factors.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from atoll.engines.blocks import Part
from atoll.engines.steps import Sink
from atoll.errors import CompositionError
from atoll.local import Plan
from atoll.privacy.noise import releasing
from atoll.secret import Source
from atoll.vectors import Trained

if TYPE_CHECKING:
    from atoll.cohort import Cohort

Sum = Callable[[int, Tensor, Tensor, Tensor, int, float], Tensor]
"""(client, parameters y [P], buffers [B], places of the batch [b], step, clip) -> sum of clipped gradients [P]
float64."""


def train_privately(
    cohort: "Cohort",
    clipped_sum: Sum,
    rows: Tensor,
    plan: Plan,
    *,
    anchor: Tensor | None,
    pull: float,
    shift: Tensor | None,
    train: Tensor | None,
    buffers: Tensor | None,
    purpose: str,
) -> Trained:
    """As `Cohort.sgd`, by steps on noised sums; it tells no loss, and buffers stay as they are."""
    told, multiplier = plan.privacy, cohort.noise_multiplier
    assert told is not None
    multiplier = told.noise_multiplier if multiplier is None else multiplier
    if multiplier is None:
        raise CompositionError(
            f"example_level(epsilon={told.epsilon:g}) cannot calibrate itself here, where nobody knows how many rounds "
            "there will be: give noise_multiplier=, or use atoll.simulate."
        )
    if cohort.counted is not None:
        if plan not in cohort.counted:
            raise CompositionError(
                "the algorithm trains on examples under noise more often, or by another plan, than it says, so that "
                "nobody would count it: make Algorithm(plans=...) list every plan of a visit, once for each training."
            )
        cohort.counted.remove(plan)
    held = (cohort.buffers if buffers is None else buffers).detach().clone()
    sizes = cohort.examples[:, 0].long().cpu().numpy()
    totals = plan.steps_of(sizes, cohort.clients, cohort.round)
    root = Source() if told.seed is None else Source(seed=told.seed)
    ended, rates = rows.detach().clone(), np.zeros(len(sizes))
    for i, (n, total) in enumerate(zip(sizes.tolist(), totals.tolist(), strict=True)):
        source = root.derive("examples", purpose, cohort.round, cohort.clients[i])
        share = sampling_rate(plan, n)
        y, velocity, second = rows[i].detach().clone(), torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        for step in range(total):
            places = torch.nonzero(source.bernoulli(share, n))[:, 0]
            found = clipped_sum(i, y, held[i], places, step, told.clip)
            gradient = (releasing(multiplier, source)(found, told.clip) / (share * n)).to(y)
            if pull:
                assert anchor is not None
                gradient = gradient + pull * (y - (anchor if anchor.ndim == 1 else anchor[i]))
            if shift is not None:
                gradient = gradient + (shift if shift.ndim == 1 else shift[i])
            rate = float(plan.rate(cohort.round, np.array([step]))[0])
            if plan.weight_decay and plan.optimizer != "adamw":
                gradient = gradient + plan.weight_decay * y
            if plan.optimizer == "sgd":
                velocity = plan.momentum * velocity + gradient
                change = -rate * velocity
            else:
                beta1, beta2 = plan.betas
                velocity = beta1 * velocity + (1 - beta1) * gradient
                second = beta2 * second + (1 - beta2) * gradient**2
                spread = (second / (1 - beta2 ** (step + 1))).sqrt() + plan.eps
                change = -rate * (velocity / (1 - beta1 ** (step + 1))) / spread
                if plan.optimizer == "adamw":
                    change = change - rate * plan.weight_decay * y
            y = y + (change if train is None else torch.where(train, change, 0.0))
            rates[i] += rate
        ended[i] = y
    nothing = torch.zeros(len(sizes), 1, dtype=torch.float64)
    return Trained(
        ended, held, torch.from_numpy(totals).to(rows)[:, None], torch.from_numpy(rates).to(rows)[:, None],
        nothing, nothing.clone(),
    )  # fmt: skip


def sampling_rate(plan: Plan, examples: int) -> float:
    """Probability with which each of a client's examples is in a minibatch."""
    return 1.0 if plan.batch_size is None else min(1.0, plan.batch_size / max(examples, 1))


def factors(squares: Tensor, clip: float) -> Tensor:
    """What brings gradients of these squared norms [b] down to a norm; 0 for those that are not finite."""
    norms = squares.double().sqrt()
    # A hair shorter: sums of squares in single precision may be a little too small.
    scale = torch.where(norms > clip * (1 - 1e-5), clip * (1 - 1e-5) / norms, 1.0)
    return torch.where(torch.isfinite(norms), scale, 0.0)


def example_keys(client: np.uint64, places: Tensor) -> "np.ndarray":
    """Keys of a client's examples, for what is keyed by row, such as dropout."""
    spread = places.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return spread ^ client


class PerExample(Sink):
    """Takes in the gradients of rows that are examples, for the sum of the clipped ones.

    Args:
        parts: the parameters [b, ...], of which all rows are the same.
        wanted: numbers of those that are trained; None: all.
    """

    def __init__(self, parts: list[Part], wanted: frozenset[int] | None = None) -> None:
        self._parts, self._wanted = parts, wanted
        self._products: dict[int, tuple[Tensor, Tensor]] = {}
        self._whole: dict[int, Tensor] = {}

    def wants(self, number: int) -> bool:
        """Whether this parameter is trained."""
        return self._wanted is None or number in self._wanted

    def product(self, number: int, left: Tensor, right: Tensor) -> None:
        """The gradients are left [b, m, n] @ right [b, n, p]."""
        few = left.shape[2] ** 2 <= left.shape[1] * right.shape[2]
        if number in self._products or number in self._whole or not few:
            self.add(number, torch.bmm(left, right))
        else:
            self._products[number] = left, right

    def add(self, number: int, gradient: Tensor) -> None:
        """The gradients [b, ...] themselves."""
        shaped = gradient.reshape(len(gradient), -1)
        if number in self._products:  # a second piece: only their sum has a norm
            left, right = self._products.pop(number)
            self._whole[number] = torch.bmm(left, right).reshape(len(left), -1)
        self._whole[number] = self._whole[number] + shaped if number in self._whole else shaped

    def scatter(self, number: int, places: Tensor, values: Tensor) -> None:
        """The gradients of a table are sums of values [b, m, d] at places [b, m]."""
        part = self._parts[number]
        rows, size, width = part.shape
        table = values.new_zeros(rows, size, width)
        at = places.reshape(rows, -1, 1).expand(-1, -1, width)
        self.add(number, table.scatter_add_(1, at, values.reshape(rows, -1, width)))

    def squares(self) -> Tensor:
        """Squared norms of all trained parameters' gradients together, [b] float64."""
        total = torch.zeros(len(self._parts[0]), dtype=torch.float64)
        for left, right in self._products.values():
            if left.shape[2] == 1:
                total += left.square().sum((1, 2)).double() * right.square().sum((1, 2)).double()
            else:
                total += (torch.bmm(left.mT, left) * torch.bmm(right, right.mT)).sum((1, 2)).double().clamp(min=0)
        for gradient in self._whole.values():
            total += gradient.square().sum(1).double()
        return total

    def total(self, factor: Tensor) -> Tensor:
        """The sum of the gradients by factor [b], [P] float64; nought where nothing came."""
        found: list[Tensor] = []
        for number, part in enumerate(self._parts):
            if number in self._products:
                left, right = self._products[number]
                scaled = torch.where(factor[:, None, None] > 0, left, 0.0) * factor.to(left)[:, None, None]
                clean = torch.where(factor[:, None, None] > 0, right, 0.0)
                joined = scaled.transpose(0, 1).flatten(1) @ clean.flatten(0, 1)
                found.append(joined.reshape(-1).double())
            elif number in self._whole:
                clean = torch.where(factor[:, None] > 0, self._whole[number], 0.0)
                found.append((factor.to(clean) @ clean).double())
            else:
                found.append(torch.zeros(cast(Tensor, part)[0].numel(), dtype=torch.float64))
        return torch.cat(found)
