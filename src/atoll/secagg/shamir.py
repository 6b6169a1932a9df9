"""Shamir's secret sharing over a prime field.

    f(x) = s + a_1 x + ... + a_{t-1} x^{t-1}  mod q,   a_i uniform from the secure source,   share at x: f(x)
    s = sum_j f(x_j) prod_{i != j} x_i / (x_i - x_j)  mod q

q = 2^256 + 297 is the smallest prime above 2^256, so every 32-byte secret is an element. Any t - 1 shares are uniform
and independent of the secret.

Cost: t n small products to share, t^2 to combine, in Python's integers.

Source: Shamir 1979, "How to share a secret".
"""

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from atoll.errors import invalid

PRIME = 2**256 + 297
SECRET = 32
"""Bytes of a secret."""
SHARE = 33
"""Bytes of a share."""


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """A share for each point.

    Args:
        secret: 32 bytes.
        threshold: shares that give the secret again; one fewer tell nothing.
        points: distinct positive integers below the prime.

    Returns:
        33 bytes for each point, in their order.
    """
    if len(secret) != SECRET:
        raise invalid("secret", f"{len(secret)} bytes", f"{SECRET} bytes")
    if not 1 <= threshold <= len(points):
        raise invalid("threshold", threshold, f"from 1 to the number of points, {len(points)}")
    if len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise invalid("points", list(points), "distinct integers above 0")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    shares: list[bytes] = []
    for x in points:
        # Points are small: the sum is cheaper to reduce once than at every step.
        value = 0
        for c in coefficients:
            value = (value + c) * x
        shares.append(((value + int.from_bytes(secret, "little")) % PRIME).to_bytes(SHARE, "little"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of exactly as many shares as the threshold, by point.

    Returns:
        32 bytes; None where these shares were not made from 32 bytes. Shares that do not belong together mostly give
        some other secret: compare it with what was committed to.
    """
    points = tuple(sorted(shares))
    values = [int.from_bytes(shares[x], "little") for x in points]
    total = sum(v * w for v, w in zip(values, _weights(points), strict=True)) % PRIME
    return total.to_bytes(SECRET, "little") if total < 1 << 8 * SECRET else None


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0, with one inversion for all."""
    above, below = [1] * len(points), [1] * len(points)
    for j, x in enumerate(points):
        for i, other in enumerate(points):
            if i != j:
                above[j] = above[j] * other % PRIME
                below[j] = below[j] * (other - x) % PRIME
    running = [1]
    for b in below:
        running.append(running[-1] * b % PRIME)
    inverse = pow(running[-1], -1, PRIME)
    weights = [0] * len(points)
    for j in reversed(range(len(points))):
        weights[j] = above[j] * inverse * running[j] % PRIME
        inverse = inverse * below[j] % PRIME
    return tuple(weights)
