"""Memory that the tiles of a round use one after the other."""

from math import prod

from torch import Tensor

ARENA_BYTES = 128 * 2**10
"""Smaller tensors are left to torch's allocator."""

ARENA_KEPT = 256 * 2**20
"""An arena of more than this is given back after a round."""


class Arena:
    """Memory that tiles use one after the other.

    A fresh tensor of some megabytes is a fresh mapping whose every page must first be filled in by the system; on
    models of that size this takes as long as the products. What was taken from an arena is valid until `reset`.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._used: list[Tensor] = []

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, with the dtype and device of another."""
        count = prod(shape)
        if like.device.type != "cpu" or count * like.element_size() < ARENA_BYTES:
            return like.new_empty(shape)
        fits = [t for t in self._free if t.dtype == like.dtype and t.numel() >= count]
        found = min(fits, key=Tensor.numel, default=None)
        if found is None:
            found = like.new_empty(count)
        else:
            self._free = [t for t in self._free if t is not found]
        self._used.append(found)
        return found[:count].view(shape)

    def release(self, tensor: Tensor) -> None:
        """Take one back before the others: nobody reads it any more."""
        at = [t for t in self._used if t.data_ptr() == tensor.data_ptr()]
        self._used = [t for t in self._used if t.data_ptr() != tensor.data_ptr()]
        self._free += at

    def reset(self) -> None:
        """Take everything back: nothing that came from here may be in use."""
        self._free += self._used
        self._used = []

    def trim(self) -> None:
        """Give back what is too much to be kept from one round to the next."""
        self.reset()
        if sum(t.nbytes for t in self._free) > ARENA_KEPT:
            self._free = []
