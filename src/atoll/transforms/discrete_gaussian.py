"""Discrete Gaussian noise added by clients: differential privacy without trusting the server with updates.

Kairouz, Liu & Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation", algorithms 1 and 2. See `atoll.privacy.distributed`.
"""

from atoll.transforms.base import Transform
from atoll.transforms.distributed import distributed


def discrete_gaussian(
    *, clip: float, noise_multiplier: float, survivors: int, clients: int, bits: int = 32, seed: int | None = None
) -> Transform:
    """Clip, rotate, round and add discrete Gaussian noise at every client; it stands last, before a summing channel.

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
    return distributed("discrete_gaussian", clip, noise_multiplier, survivors, clients, bits, seed)
