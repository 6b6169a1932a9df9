"""Memory that whole models come and go in."""

import mmap
from contextlib import suppress

Buffer = bytes | bytearray | memoryview
"""Bytes of a frame or a message, which nobody changes once they are handed on."""

LARGE = 2**22
"""Bytes from which on pages are asked to be large."""


def room(length: int) -> memoryview:
    """New memory for so many bytes: in large pages where the system has them, which cost a fraction of small ones.

    Args:
        length: in bytes; above 0 or 0.

    Raises:
        OSError: there is not so much.
    """
    if length < LARGE:
        return memoryview(bytearray(length))
    made = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that has none, such as a real-time one
            made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)
