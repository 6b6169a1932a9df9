"""Correlated noise on a sum that is released in every round, on a public grid.

    Y_t = [X_t] + N_t,    N_t = Z_t - [what the strategy takes back of N_0 .. N_(t-1)],

where [.] rounds to multiples of the grid's spacing g and Z_t is discrete Gaussian noise on it. All three are points of
the grid and exact in double precision, so that no low bit of Y_t tells of X_t. Under a Toeplitz strategy Y_t is then,
given what was released before, fresh noise Z_t on

    (C [X])_t + a function of the Y before + what rounding the second term did

Rounding X lets one client of norm c add c + g sqrt(L) to a round's sum of L numbers; rounding what is taken back moves
a coordinate by g at most in each of n rounds, and double precision by less than as much again. All rounds together
shift by

    sens(C) (c + g sqrt(L)) + 2 g sqrt(n L)

at most, for which the noise is sized (`noise.deviation`). Under a tree all is a sum of nodes, and exact. The noise does
not depend on the data. It may never be drawn again for a round that was released: the difference of the two sums would
be the clients' own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.errors import InvalidArgument
from atoll.privacy.factorization import Draw, Strategy
from atoll.privacy.noise import MOST, deviation
from atoll.secret import Source, grid


class Correlated:
    """The noise of a run, round after round.

    Args:
        strategy: whose noise can lie on a grid.
        multiplier: standard deviation of what is drawn, divided by the strategy's sensitivity and the bound.
        bound: L2 norm that one client adds to a round's sum at most.
        round: the first one to come.
        state: of the strategy before it [vectors, L]; None before round 0, where it is nought.
    """

    def __init__(
        self, strategy: Strategy, multiplier: float, bound: float, round: int = 0, state: Tensor | None = None
    ) -> None:
        self.strategy, self.round, self.state = strategy, round, state
        self._multiplier, self._bound = multiplier, bound

    def deviation(self, length: int) -> float:
        """Standard deviation of what is drawn for sums of so many numbers."""
        own = self.strategy
        return deviation(self._multiplier, self._bound, length, sensitivity=own.sensitivity, rounds=own.rounds)

    def add(self, total: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        """The round's sum [L] with noise, and the vectors [., L] that were drawn for it, which are secret.

        Raises:
            InvalidArgument: a sum that is not finite, which no noise hides; nothing was drawn.
        """
        if not bool(torch.isfinite(total).all()):
            raise InvalidArgument(
                "the sum holds NaN or infinities, which noise cannot protect: clip what is summed, and refuse what is "
                "not finite, before noise is added."
            )
        std, drawn = self.deviation(total.numel()), list[Tensor]()

        def draw() -> Tensor:
            drawn.append(source.normal(std, total.numel()))
            return drawn[-1].clone()

        noise, spacing = self._next(total.numel(), draw), grid(std)
        sum = total.to(torch.float64).clamp(-MOST * std, MOST * std).div_(spacing).round_().mul_(spacing)
        return sum.add_(noise.to(sum.device)), torch.stack(drawn)

    def redo(self, drawn: Sequence[Tensor] | Tensor) -> None:
        """Go on behind a round whose sum was released with these vectors."""
        kept = iter(drawn)
        self._next(drawn[0].numel(), lambda: next(kept).clone())

    def _next(self, length: int, draw: Draw) -> Tensor:
        if self.state is None:
            self.state = self.strategy.init(length)
        noise = self.strategy.next(self.round, self.state, draw, spacing=grid(self.deviation(length)))
        self.round += 1
        return noise
