"""Memory for whole models."""

import errno
import mmap
from typing import Any

import pytest

from atoll.net import buffers


@pytest.mark.parametrize("length", [0, 1, buffers.LARGE, buffers.LARGE + 1])
def test_there_is_room_where_the_kernel_has_no_large_pages(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Small)
    made = buffers.room(length)
    assert len(made) == length and not made.readonly and not any(made[:10])
