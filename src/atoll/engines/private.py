"""Local steps on clipped and noised sums of single examples' gradients (`atoll.privacy.example_level`).

Minibatches are Poisson samples, of which no two have the same size. No gradient of a single example is written out
where a layer allows: of one position the norm of a product left x right is |left| |right| (Goodfellow 2015, "Efficient
per-example gradient computations"), of several it follows from their inner products (Bu, Wang, Zha & Karypis 2023,
"Differentially private optimization on large model at small cost"), and the clipped sum is one product with the
examples' factors. There are two forms of this:

`PerBatch`: the rows are clients, whose batches are filled up to the largest with examples of factor nought. For models
whose parameters are read by linear layers alone.
`PerExample`: one client after the other; the gradients of its batch are those of a tile whose rows are examples: every
row is the same model and sees one example.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from atoll.engines.arena import Arena
from atoll.engines.blocks import Part
from atoll.engines.steps import Sink
from atoll.errors import CompositionError
from atoll.local import Plan
from atoll.privacy.noise import releasing
from atoll.secret import Source
from atoll.vectors import Change, Layout, Trained

if TYPE_CHECKING:
    from atoll.cohort import Cohort

Sums = Callable[[Sequence[int], Tensor, Tensor, Sequence[Tensor], int, float], Iterable[Tensor]]
"""(numbers of clients [k], parameters y [C, P], buffers [C, B], places of each one's batch, step, clip) -> each one's
sum of clipped gradients [P], in double precision or y's own."""


def train_privately(
    cohort: "Cohort",
    clipped_sums: Sums,
    rows: Tensor,
    plan: Plan,
    *,
    anchor: Tensor | None,
    pull: float,
    shift: Tensor | None,
    train: Tensor | None,
    buffers: Tensor | None,
    purpose: str,
    arena: Arena,
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
    sources = [root.derive("examples", purpose, cohort.round, client) for client in cohort.clients]
    shares = [sampling_rate(plan, n) for n in sizes.tolist()]
    expected = [share * n for share, n in zip(shares, sizes.tolist(), strict=True)]
    releases = [releasing(multiplier, source) for source in sources]
    y, rates = arena.empty(*rows.shape, like=rows).copy_(rows.detach()), np.zeros(len(sizes))
    bare = plan.plain and not pull and shift is None and train is None
    first = torch.zeros_like(y) if plan.optimizer != "sgd" or plan.momentum else None
    second = torch.zeros_like(y) if plan.optimizer != "sgd" else None
    for step in range(int(totals.max(initial=0))):
        active = np.flatnonzero(totals > step).tolist()
        places = [torch.nonzero(sources[i].bernoulli(shares[i], int(sizes[i])))[:, 0] for i in active]
        rate = float(plan.rate(cohort.round, np.array([step]))[0])
        for i, found in zip(active, clipped_sums(active, y, held, places, step, told.clip), strict=True):
            own, gradient = y[i], releases[i](found, told.clip).to(y)
            rates[i] += rate
            if bare:
                own.sub_(gradient, alpha=rate / expected[i])
                continue
            gradient.div_(expected[i])
            if pull:
                assert anchor is not None
                gradient.add_(own - (anchor if anchor.ndim == 1 else anchor[i]), alpha=pull)
            if shift is not None:
                gradient.add_(shift if shift.ndim == 1 else shift[i])
            if plan.weight_decay and plan.optimizer != "adamw":
                gradient.add_(own, alpha=plan.weight_decay)
            if first is None:
                way = gradient
            elif second is None:
                way = first[i].mul_(plan.momentum).add_(gradient)
            else:
                way = _adam(plan, first[i], second[i], gradient, step)
                if plan.optimizer == "adamw":
                    way.add_(own, alpha=plan.weight_decay)
            own.sub_(way if train is None else torch.where(train, way, 0.0), alpha=rate)

    def change(start: Tensor) -> Change:
        shape = len(y), y.shape[1]
        return Change(shape, lambda: torch.sub(y, start.detach(), out=arena.empty(*shape, like=y)))

    nothing = torch.zeros(len(sizes), 1, dtype=torch.float64)
    return Trained(
        y, held, torch.from_numpy(totals).to(rows)[:, None], torch.from_numpy(rates).to(rows)[:, None],
        nothing, nothing.clone(), change=change,
    )  # fmt: skip


def _adam(plan: Plan, first: Tensor, second: Tensor, gradient: Tensor, step: int) -> Tensor:
    """The direction of Adam; moments are renewed in place."""
    beta1, beta2 = plan.betas
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = (second / (1 - beta2 ** (step + 1))).sqrt_().add_(plan.eps)
    return (first / (1 - beta1 ** (step + 1))).div_(spread)


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
        """The sum of the gradients by factor [b], [P]; nought where nothing came."""
        like = cast(Tensor, self._parts[0])
        sizes = [cast(Tensor, part)[0].numel() for part in self._parts]
        sums, own = like.new_empty(sum(sizes)), factor.to(like)
        whole = bool((factor > 0).all())  # else what is not finite must not be multiplied by nought
        for number, into in enumerate(sums.split(sizes)):
            if number in self._products:
                left, right = self._products[number]
                if not whole:
                    left, right = (torch.where(factor[:, None, None] > 0, t, 0.0) for t in (left, right))
                scaled = (left * own[:, None, None]).transpose(0, 1).flatten(1)
                torch.mm(scaled, right.flatten(0, 1), out=into.view(scaled.shape[0], -1))
            elif number in self._whole:
                found = self._whole[number]
                torch.mv((found if whole else torch.where(factor[:, None] > 0, found, 0.0)).t(), own, out=into)
            else:
                into.zero_()
        return sums


class PerBatch(Sink):
    """Takes in the gradients of rows that are clients, for the sums of their examples' clipped ones.

    Args:
        layout: of the parameters.
        sums: memory for the answer [k, P].
        counts: examples of each row, of the b that the largest has.
        wanted: numbers of the parameters that are trained; None: all.
    """

    def __init__(
        self, layout: Layout, sums: Tensor, counts: Sequence[int], wanted: frozenset[int] | None = None
    ) -> None:
        self._layout, self._sums, self._counts, self._wanted = layout, sums, counts, wanted
        self._examples = max(counts)
        self._products: dict[int, tuple[Tensor, Tensor | None]] = {}

    def wants(self, number: int) -> bool:
        """Whether this parameter is trained."""
        return self._wanted is None or number in self._wanted

    def product(self, number: int, left: Tensor, right: Tensor) -> None:
        """The gradients are left [k, m, b t] @ right [k, b t, p], with t positions of each example."""
        self._products[number] = left, right

    def sum(self, number: int, values: Tensor) -> None:
        """The gradients are sums of values [k, b t, m]."""
        self._products[number] = values.mT, None

    def add(self, number: int, gradient: Tensor) -> None:
        """Refused: a gradient that is summed over the batch tells nothing of its examples."""
        raise AssertionError("only linear layers hand over what single examples add")

    def scatter(self, number: int, places: Tensor, values: Tensor) -> None:
        """Refused, as `add`."""
        raise AssertionError("only linear layers hand over what single examples add")

    def squares(self) -> Tensor:
        """Squared norms of all trained parameters' gradients together, [k, b] float64."""
        total = torch.zeros(len(self._sums), self._examples, dtype=torch.float64)
        for left, right in self._products.values():
            total += self._squares(left, right)
        return total

    def _squares(self, left: Tensor, right: Tensor | None) -> Tensor:
        k, m, b = len(left), left.shape[1], self._examples
        if left.shape[2] == b:
            square = left.square().sum(1)
            return square if right is None else square * right.square().sum(2)
        slopes = left.unflatten(2, (b, -1)).movedim(1, 3).flatten(0, 1)  # [k b, t, m]
        if right is None:
            return slopes.sum(1).square().sum(1).view(k, b)
        inputs = right.unflatten(1, (b, -1)).flatten(0, 1)  # [k b, t, p]
        if inputs.shape[1] ** 2 > m * inputs.shape[2]:  # positions are so many that the gradients are smaller
            return torch.bmm(slopes.mT, inputs).square().sum((1, 2)).view(k, b)
        return (torch.bmm(slopes, slopes.mT) * torch.bmm(inputs, inputs.mT)).sum((1, 2)).clamp(min=0).view(k, b)

    def totals(self, factor: Tensor, finite: Tensor) -> Tensor:
        """The sums of the gradients by factor [k, b], [k, P]; nought where nothing came.

        Args:
            factor: of each example.
            finite: whether its gradient is: else it must not be multiplied, even by nought.
        """
        sums, whole = self._sums, bool(finite.all())
        real = torch.arange(self._examples) < torch.tensor(self._counts)[:, None]
        own = torch.where(real, factor, 0.0).to(sums)
        for number, (_, shape, begin, end) in enumerate(self._layout):
            if number not in self._products:
                sums[:, begin:end].zero_()
                continue
            left, right = self._products[number]
            positions = left.shape[2] // self._examples
            scale = own.repeat_interleave(positions, dim=1)[:, None]
            if not whole:
                kept = finite.repeat_interleave(positions, dim=1)[:, None]
                left = torch.where(kept, left, 0.0)
                right = None if right is None else torch.where(kept.mT, right, 0.0)
            if right is None:
                sums[:, begin:end] = torch.bmm(left, scale.mT)[:, :, 0]
                continue
            scaled, into = left * scale, sums[:, begin:end].unflatten(1, shape)
            for k, count in enumerate(self._counts):  # row by row: into what is strided, products go through a copy
                upto = count * positions
                torch.mm(scaled[k, :, :upto], right[k, :upto], out=into[k])
        return sums
