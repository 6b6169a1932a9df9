"""Skellam noise added by clients: differential privacy without trusting the server with updates.

Agarwal, Kairouz & Liu 2021, "The Skellam mechanism for differentially private federated learning", algorithm 1. Sums
of Skellam noise are Skellam noise again, so that nothing is lost by the number of clients. See
`atoll.privacy.distributed`.
"""

from atoll.privacy.noise import noise
from atoll.transforms.base import Transform
from atoll.transforms.distributed import distributed


def skellam(
    *,
    clip: float,
    survivors: int,
    clients: int,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    budget: float | None = None,
    bits: int = 32,
    seed: int | None = None,
) -> Transform:
    """Clip, rotate, round and add Skellam noise at every client; it stands last, before a summing channel.

    The noise of a client alone is smaller than that of a sum by sqrt(survivors): only the sum is protected, so the
    channel must hide everything else, sums of fewer than `survivors` too: `secure_sum(least=survivors, ...)`. Weights
    are uniform. `atoll.simulate` counts every sum that is released.

    Args:
        clip: L2 norm to which rows are clipped.
        survivors: smallest number of honest clients in a sum; sums of fewer are refused.
        clients: largest number of clients in a sum.
        noise_multiplier: standard deviation of the noise on a sum of `survivors` clients, divided by the L2 norm of
            what one client adds to it.
        epsilon: instead of it: calibrate the noise so that all rounds together spend no more than this.
        delta: at which epsilon is told, below 1 / population; default 1e-5, or population ** -1.1 where that is
            smaller.
        budget: with noise_multiplier: stop the run before the release that would spend more.
        bits: of the ring, at most the channel's.
        seed: noise that anybody can draw again. For tests alone: the run is marked as not private.
    """
    told = noise(noise_multiplier, epsilon, delta, budget, None, seed)
    return distributed("skellam", clip, told, survivors, clients, bits)
