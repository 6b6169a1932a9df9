"""Bytes that processes share: a file, or memory without a name, mapped into each of them.

What one process writes the others see at once. A process that is forked later inherits the descriptor and maps the same
bytes; when the file has grown, `follow` maps the new length.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Region:
    """A growing stretch of shared bytes.

    Args:
        path: the file; None: memory without a name.
        size: bytes that are there already.
    """

    def __init__(self, path: Path | None = None, size: int = 0) -> None:
        self.descriptor = -1
        self._durable = path is not None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        elif hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("atoll")
        else:
            handle, name = tempfile.mkstemp()
            os.unlink(name)
            self.descriptor = handle
        self.size = 0
        self._map: mmap.mmap | None = None
        self.follow(size)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def grow(self, size: int) -> None:
        """Make it at least so many bytes long; what is there stays."""
        if size > self.size:
            if self._durable and hasattr(os, "posix_fallocate"):
                # A full disk is an error here, not a signal when the bytes are written.
                os.posix_fallocate(self.descriptor, 0, size)
            else:
                os.ftruncate(self.descriptor, size)
            self.follow(size)

    def follow(self, size: int) -> None:
        """Map what another process has grown. Tensors of the old mapping stay valid: they see the same bytes."""
        if size != self.size:
            self._map = mmap.mmap(self.descriptor, size)
            self.size = size

    def tensor(self, dtype: torch.dtype, count: int, offset: int = 0) -> Tensor:
        """A flat view [count] of the bytes from an offset on."""
        if not count:
            return torch.empty(0, dtype=dtype)
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def flush(self) -> None:
        """Write a file's bytes to its disk."""
        if self._map is not None:
            self._map.flush()
