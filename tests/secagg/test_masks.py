"""Masks: key streams in a ring, block by block."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from atoll.errors import InvalidArgument
from atoll.secagg.masks import BLOCK, add_masks
from atoll.secagg.primitives import stream

KEYS = [bytes([i]) * 32 for i in range(5)]


def whole(key: bytes, count: int, dtype: str) -> NDArray[Any]:
    return np.frombuffer(stream(key).update(bytes(count * np.dtype(dtype).itemsize)), dtype=dtype)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("count", [0, 1, BLOCK // 8 - 1, BLOCK // 4, BLOCK // 4 + 1, BLOCK // 2 + 3])
def test_blocks_are_pieces_of_one_stream(dtype: str, count: int) -> None:
    vector = np.arange(count).astype(dtype)
    add_masks(vector, [(KEYS[0], 1), (KEYS[1], -1), (KEYS[2], 1)])
    due = np.arange(count).astype(dtype) + whole(KEYS[0], count, dtype) - whole(KEYS[1], count, dtype)
    assert np.array_equal(vector, due + whole(KEYS[2], count, dtype))


def test_masks_cancel_and_wrap() -> None:
    vector = np.full(1000, 2**32 - 1, dtype="<u4")
    add_masks(vector, [(k, 1) for k in KEYS])
    assert not np.array_equal(vector, np.full(1000, 2**32 - 1, dtype="<u4"))
    add_masks(vector, [(k, -1) for k in reversed(KEYS)])
    assert np.array_equal(vector, np.full(1000, 2**32 - 1, dtype="<u4"))


def test_more_masks_than_are_open_at_a_time() -> None:
    keys = [i.to_bytes(32, "little") for i in range(1100)]
    vector = np.zeros(7, dtype="<u4")
    add_masks(vector, [(k, 1) for k in keys])
    assert np.array_equal(vector, np.sum([whole(k, 7, "<u4") for k in keys], axis=0, dtype="<u4"))


def test_memory_is_that_of_a_block() -> None:
    vector = np.zeros(2**22, dtype="<u4")
    tracemalloc.start()
    add_masks(vector, [(k, 1) for k in KEYS])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * BLOCK < vector.nbytes / 50


def test_a_mask_is_uniform_over_the_whole_ring() -> None:
    """Bytes in each place, and the largest value: chi-squared over 256 classes, four places."""
    mask = whole(bytes(range(32)), 2**18, "<u4")
    for place in range(4):
        counts = np.bincount((mask >> (8 * place)) & 255, minlength=256)
        assert ((counts - 1024) ** 2 / 1024).sum() < 350  # 255 degrees of freedom: beyond it once in 10^4
    assert mask.max() > 2**32 - 2**17 and mask.min() < 2**17


@pytest.mark.parametrize("dtype", ["<i4", "<f4", "<u2", ">u4"])
def test_other_numbers_are_refused(dtype: str) -> None:
    with pytest.raises(InvalidArgument):
        add_masks(np.zeros(4, dtype=dtype), [(KEYS[0], 1)])
