"""Skellam noise added by clients: differential privacy without trusting the server with updates.

Agarwal, Kairouz & Liu 2021, "The Skellam mechanism for differentially private federated learning", algorithm 1. Sums
of Skellam noise are Skellam noise again, so that nothing is lost by the number of clients. See
`atoll.privacy.distributed`.
"""

from atoll.transforms.base import Transform
from atoll.transforms.distributed import distributed


def skellam(
    *, clip: float, noise_multiplier: float, survivors: int, clients: int, bits: int = 32, seed: int | None = None
) -> Transform:
    """Clip, rotate, round and add Skellam noise at every client; it stands last, before a summing channel.

    The noise of a client alone is smaller than that of a sum by sqrt(survivors): only the sum is protected, so the
    channel must hide everything else. Weights are uniform.

    Args:
        clip: L2 norm to which rows are clipped.
        noise_multiplier: standard deviation of the noise on a sum of `survivors` clients, divided by the L2 norm of
            what one client adds to it.
        survivors: smallest number of honest clients in a sum; sums of fewer are refused.
        clients: largest number of clients in a sum.
        bits: of the ring, at most the channel's.
        seed: noise that anybody can draw again, for tests: it protects nobody.
    """
    return distributed("skellam", clip, noise_multiplier, survivors, clients, bits, seed)
