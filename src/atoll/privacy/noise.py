"""What a run is told about noise at the server: how much, or which epsilon it is to be calibrated for."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from atoll.errors import CompositionError, InvalidArgument, invalid
from atoll.privacy.accounting import Accountant, check_accountant, check_delta, check_epsilon, check_multiplier
from atoll.privacy.factorization import Strategy
from atoll.secret import Source

ROUNDING = 2.0**-18
"""Noise is larger by this share, for what rounding may add: a rotation in single precision to a row, double precision
to a sum."""

MOST = 2.0**17
"""What the grid holds, in standard deviations of the noise."""

GRID = 2.0**-32
"""The public grid's spacing is at most this share of the noise's standard deviation."""


def deviation(multiplier: float, bound: float, length: int, *, sensitivity: float = 1.0, rounds: int = 0) -> float:
    """Standard deviation of the noise on a sum of `length` numbers, to which one client adds at most `bound` in L2
    norm.

    It is multiplier times bound, and a little more: rounding the sum to the grid of spacing g may move it by up to
    sqrt(length) g for one client, which counts as part of what one client adds.

    Args:
        multiplier: standard deviation of the noise, divided by what one client moves.
        bound: L2 norm.
        length: of the sum.
        sensitivity: of a correlated strategy, by which what one client adds is multiplied.
        rounds: of a correlated strategy; in each of them what is taken back is rounded too.

    Raises:
        InvalidArgument: so much noise that rounding would count as much as what clients send.
    """
    rounding = multiplier * math.sqrt(length) * GRID * (sensitivity + 2 * math.sqrt(rounds))
    if rounding > 0.5:
        raise invalid(
            "noise_multiplier", multiplier, f"less for sums of {length:,} numbers", "Allow a larger epsilon or delta."
        )
    return multiplier * sensitivity * bound * (1 + ROUNDING) / (1 - rounding)


def releasing(multiplier: float, source: Source) -> Callable[[Tensor, float], Tensor]:
    """(sum [L] float64, L2 norm that one client adds at most) -> the sum with noise from this source."""

    def release(total: Tensor, bound: float) -> Tensor:
        std = deviation(multiplier, bound, total.numel())
        # The grid holds so much; cutting coordinates brings sums nearer to each other, never further apart.
        return source.add_normal(total, std, within=MOST * std)

    return release


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise as a stage was told of it: on the sum of all that clients send, or added by the clients.

    Attributes:
        noise_multiplier: its standard deviation divided by the clip norm; None: calibrated for `epsilon`.
        epsilon: what the whole run may spend; None: whatever the noise gives.
        delta: at which epsilon is told; None: 1e-5, or population ** -1.1 where that is smaller.
        budget: a run stops before the release that would spend more.
        accountant: None: the tightest that is right for the sampler.
        seed: of noise and cohorts that anybody can draw again, for tests; None: the cryptographic source.
        strategy: how noise is correlated between rounds, by name or ready; None: fresh noise in every round.
    """

    noise_multiplier: float | None
    epsilon: float | None
    delta: float | None
    budget: float | None
    accountant: Accountant | None
    seed: int | None
    strategy: str | Strategy | None = None

    def calibrated(self, stage: str) -> float:
        """The noise multiplier of a stage.

        Raises:
            CompositionError: it is to follow from an epsilon, and nobody has calibrated it.
        """
        if self.noise_multiplier is None:
            raise CompositionError(
                f"{stage}(epsilon={self.epsilon:g}) cannot calibrate itself here, where nobody knows how many rounds "
                "there will be: give noise_multiplier=, or use atoll.simulate."
            )
        return self.noise_multiplier


def noise(
    noise_multiplier: float | None,
    epsilon: float | None,
    delta: float | None,
    budget: float | None,
    accountant: Accountant | None,
    seed: int | None,
    strategy: str | Strategy | None = None,
) -> Noise:
    """The checked record.

    Raises:
        InvalidArgument: both or neither of a multiplier and an epsilon; a number outside its range.
    """
    if (noise_multiplier is None) == (epsilon is None):
        raise InvalidArgument(
            "noise needs noise_multiplier= or epsilon=, and not both: give a noise multiplier and be told what epsilon "
            "it spends, or an epsilon and let the noise be calibrated for it."
        )
    if noise_multiplier is not None:
        noise_multiplier = check_multiplier(noise_multiplier)
    if epsilon is not None:
        epsilon = check_epsilon(epsilon)
        if budget is not None:
            raise invalid("budget", budget, "left out with epsilon=", "An epsilon is the run's budget already.")
    if budget is not None:
        budget = check_epsilon(budget, "budget")
    if delta is not None:
        delta = check_delta(delta)
    if accountant is not None:
        accountant = check_accountant(accountant)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise invalid("seed", seed, "an integer for tests, or None for privacy")
    return Noise(noise_multiplier, epsilon, delta, budget, accountant, seed, strategy)
