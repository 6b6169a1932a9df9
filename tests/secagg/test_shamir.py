"""Shares: any threshold of them give the secret, fewer fit every secret."""

import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import InvalidArgument
from atoll.secagg.shamir import PRIME, combine, split


def probably_prime(n: int) -> bool:
    """Miller and Rabin's test with forty bases."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in random.Random(0).sample(range(2, 10**9), 40):
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_prime_is_the_smallest_above_every_secret() -> None:
    assert probably_prime(PRIME)
    assert not any(probably_prime(n) for n in range(2**256, PRIME))


def naive(shares: dict[int, bytes]) -> int:
    """Lagrange's polynomial at 0 in rational numbers, then modulo the prime."""
    total = 0
    for x, share in shares.items():
        weight = Fraction(1)
        for other in shares:
            if other != x:
                weight *= Fraction(other, other - x)
        total += int.from_bytes(share, "little") * weight.numerator * pow(weight.denominator, -1, PRIME)
    return total % PRIME


@settings(max_examples=60)
@given(secret=st.binary(min_size=32, max_size=32), data=st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 2**20), min_size=1, max_size=12, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    chosen = {x: shares[x] for x in data.draw(st.permutations(points))[:threshold]}
    assert combine(chosen) == secret
    assert naive(chosen) == int.from_bytes(secret, "little")


def test_one_fewer_fits_every_secret() -> None:
    """For any secret there is exactly one polynomial through it and t - 1 shares: they say nothing of the secret."""
    points, threshold = [1, 2, 3, 4, 5], 4
    shares = dict(zip(points, split(b"\x07" * 32, threshold, points), strict=True))
    for chosen in itertools.combinations(points, threshold - 1):
        known = {x: shares[x] for x in chosen}
        for claimed in (0, 1, 2**256 - 1):
            # The value at a point of its own that makes the secret what is claimed.
            base, slope = naive({**known, 9: bytes(33)}), naive({**known, 9: (1).to_bytes(33, "little")})
            value = (claimed - base) * pow(slope - base, -1, PRIME) % PRIME
            assert combine({**known, 9: value.to_bytes(33, "little")}) == claimed.to_bytes(32, "little")


def test_a_share_is_uniform() -> None:
    """Of the shares of one secret, the top bits that a uniform field element has: chi-squared over 16 classes."""
    counts = [0] * 16
    for _ in range(1600):
        counts[int.from_bytes(split(bytes(32), 2, [1, 2])[0], "little") >> 252 & 15] += 1
    assert sum((c - 100) ** 2 / 100 for c in counts) < 45  # 15 degrees of freedom: beyond it once in 10^4


def test_shares_that_do_not_belong_together() -> None:
    first, second = split(bytes(32), 2, [1, 2]), split(bytes(32), 2, [1, 2])
    assert combine({1: first[0], 2: second[1]}) != bytes(32)


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(32), 0, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 2, [0, 1]),
        (bytes(32), 2, [1, 1]),
        (bytes(32), 2, [1, PRIME]),
    ],
)
def test_arguments_that_are_not_allowed(secret: bytes, threshold: int, points: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        split(secret, threshold, points)
