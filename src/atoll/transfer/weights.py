"""Weights in torch's old file format, read without running anything that stands in the file."""

import io
import pickletools
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from atoll.errors import DataError

ITEMS = {"torch FloatStorage": 4, "torch LongStorage": 8}
"""Bytes of a number, by the kind of storage."""

Program = list[tuple[str, Any]]
"""Instructions of a pickled program, and their arguments."""


class Stored(NamedTuple):
    """A tensor in a file: raw numbers that fill a storage of its own."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    content: bytes


def load_in_order(module: nn.Module, tensors: list[Stored]) -> None:
    """Put tensors into a module's parameters and buffers, one after the other.

    Raises:
        DataError: there are more or fewer of them, or one has another shape or type than its place.
    """
    own = module.state_dict()
    if len(own) != len(tensors):
        raise DataError(f"the file holds {len(tensors)} tensors, the network has {len(own)}.")
    for (name, place), stored in zip(own.items(), tensors, strict=True):
        if stored.shape != tuple(place.shape) or len(stored.content) != place.nbytes:
            raise DataError(f"{stored.name} has the shape {stored.shape}, but {name} needs {tuple(place.shape)}.")
        flat = torch.frombuffer(bytearray(stored.content), dtype=place.dtype)
        place.copy_(flat.as_strided(stored.shape, stored.strides))


def read_tensors(content: bytes) -> list[Stored]:
    """The tensors in a file of torch's old format, in their order.

    The file describes its tensors by pickled programs. They are never run: they are listed, and names, shapes and
    numbers of storages are read from the list. Each tensor must fill a storage of its own.

    Raises:
        DataError: it is not such a file.
    """
    stream = io.BytesIO(content)
    try:
        for _ in range(3):  # magic number, version, kind of machine
            _program(stream)
        described = _described(_program(stream))
        if not described:
            raise ValueError("it holds no tensors")
        order = [str(arg) for op, arg in _program(stream) if op == "BINUNICODE"]
        if sorted(order) != sorted(described):
            raise ValueError("tensors share storages")
        read: dict[str, bytes] = {}
        for key in order:
            name, item, shape, _ = described[key]
            count = int.from_bytes(stream.read(8), "little")
            read[key] = stream.read(item * count)
            if len(read[key]) != item * count or count != prod(shape):
                raise ValueError(f"{name} is cut short")
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"the weights are not a whole file of torch's old format: {error}.") from error
    return [Stored(name, shape, strides, read[key]) for key, (name, _, shape, strides) in described.items()]


def _program(stream: io.BytesIO) -> Program:
    """The instructions of the pickled program at the stream's place, listed and not run."""
    return [(op.name, arg) for op, arg, _ in pickletools.genops(stream)]


def _described(program: Program) -> dict[str, tuple[str, int, tuple[int, ...], tuple[int, ...]]]:
    """Name, bytes of a number, shape and strides of each tensor, by the key of its storage, in their order.

    A tensor's instructions are: its name, the kind of its storage, the storage's key, a reference to it (BINPERSID),
    then the offset, the lengths of its axes and its strides.
    """
    found: dict[str, tuple[str, int, tuple[int, ...], tuple[int, ...]]] = {}
    kinds: dict[int, str] = {}
    texts: list[str] = []
    kind, numbers = "", list[int]()
    key = ""
    for place, (op, arg) in enumerate(program):
        if op == "GLOBAL" and arg in ITEMS:
            kind = str(arg)
            if program[place + 1][0] == "BINPUT":
                kinds[program[place + 1][1]] = kind
        elif op == "BINGET" and arg in kinds:
            kind = kinds[arg]
        elif op == "BINUNICODE" and arg == "_metadata":
            break
        elif op == "BINUNICODE" and arg not in ("storage", "cpu"):
            texts.append(str(arg))
        elif op == "BINPERSID":
            name, key = texts[-2:]
            found[key], numbers = (name, ITEMS[kind], (), ()), []
        elif op in ("BININT", "BININT1", "BININT2"):
            numbers.append(int(arg))
        elif op == "NEWFALSE":
            name, item, _, _ = found[key]
            offset, axes = numbers[0], len(numbers) // 2
            if offset or len(numbers) != 2 * axes + 1:
                raise ValueError(f"{name} is a part of its storage")
            found[key] = (name, item, tuple(numbers[1 : axes + 1]), tuple(numbers[axes + 1 :]))
    return found
