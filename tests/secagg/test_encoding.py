"""Fixed point: no sum wraps, nothing is biased, cuts are counted, counts are exact."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import InvalidArgument
from atoll.secagg.encoding import Scale, decode, decode_counts, encode, encode_counts, secure_uniforms, signed


@settings(max_examples=200)
@given(clients=st.integers(1, 2**14), bits=st.integers(8, 48))
def test_no_sum_can_wrap(clients: int, bits: int) -> None:
    """The proof, number by number: the largest sums of all clients read as signed integers are what they are."""
    try:
        scale = Scale(clients, bits)
    except InvalidArgument:
        assert clients > 2 ** (bits - 1) - 1
        return
    assert clients * scale.largest <= 2 ** (bits - 1) - 1 < 2 ** (scale.ring - 1)
    for value in (1.0, -1.0):
        # The largest draw there is: it must not round past the end.
        ring, cut = encode(np.full((1, 2), value), scale, np.full((1, 2), 1 - 2.0**-24, dtype=np.float32))
        total = ((ring[0].astype(object) * clients) % 2**scale.ring).astype(scale.dtype)
        found = signed(total, scale)[0]
        assert abs(found) <= clients * scale.largest
        assert abs(found - value * clients * scale.largest) <= (clients if value < 0 else 0)
        assert decode(total, scale, clients)[0] == found / scale.largest
        assert cut.tolist() == [0]


@pytest.mark.parametrize("bits", [8, 16, 31, 32, 33, 40, 48])
def test_sums_are_near(bits: int) -> None:
    scale, draw = Scale(7, bits), np.random.default_rng(bits)
    values = draw.uniform(-1, 1, size=(7, 50))
    ring, _ = encode(values, scale)
    total = np.sum(ring, axis=0, dtype=scale.dtype)
    assert np.abs(decode(total, scale, 7) - values.sum(axis=0)).max() <= 7 / scale.largest


def test_rounding_has_no_bias() -> None:
    scale = Scale(8, 8)
    values = np.tile([0.3, -0.7, 0.01, 0.0, 1.0, -1.0], (20_000, 1))
    found = signed(encode(values, scale)[0], scale) / scale.largest
    assert (np.abs(found.mean(axis=0) - values[0]) <= 5 * 0.5 / scale.largest / 20_000**0.5).all()


def test_what_is_beyond_the_range_is_cut_and_counted() -> None:
    scale = Scale(3, 32)
    ring, cut = encode(np.array([[2.0, -0.5, -9.0], [0.1, 0.2, 0.3]]), scale)
    assert cut.tolist() == [2, 0]
    assert signed(ring[0], scale)[[0, 2]].tolist() == [scale.largest, -scale.largest]


def test_a_sum_that_clients_within_the_range_cannot_give() -> None:
    """One client with 2^31 in a coordinate: seen where it does not hide below what the others may have sent."""
    scale = Scale(10, 24)
    total = np.array([0, 5 * scale.largest + 1, 2**31], dtype=scale.dtype)
    with pytest.raises(InvalidArgument, match=r"2 elements beyond.*discard this sum"):
        decode(total, scale, 5)
    assert decode(total[:2], scale, 6)[1] > 5


@given(
    counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=9), bits=st.integers(8, 48), spare=st.integers(0, 100)
)
def test_counts_are_exact(counts: list[int], bits: int, spare: int) -> None:
    scale = Scale(len(counts), bits)
    ring = encode_counts(np.array(counts), max(counts) + spare, scale)
    assert ring.shape == (len(counts), scale.digits(max(counts) + spare))
    assert decode_counts(np.sum(ring, axis=0, dtype=scale.dtype), scale) == sum(counts)


def test_draws_come_from_the_secure_source() -> None:
    first, second = secure_uniforms(10_000), secure_uniforms(10_000)
    assert not np.array_equal(first, second)
    assert first.min() >= 0 and first.max() < 1
    counts = np.bincount((first * 100).astype(int), minlength=100)
    assert ((counts - 100) ** 2 / 100).sum() < 160


@pytest.mark.parametrize(
    ("clients", "bits", "said"),
    [
        (0, 32, "clients=0"),
        (3, 7, "bits=7"),
        (3, 49, "bits=49"),
        (3, 32.0, "bits=32.0"),
        (200, 8, "at least 9, so that no sum of 200 clients can wrap.*Use bits=32"),
    ],
)
def test_grids_that_are_refused(clients: int, bits: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Scale(clients, bits)
