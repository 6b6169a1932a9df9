"""Frames: named tensors as bytes, and the only place where bytes from another party become tensors.

A frame is a file in the layout of safetensors, in the one form its reference writer gives: eight bytes of header
length, a JSON header padded to eight bytes, and one contiguous body, little endian. Whoever reads a frame says which
tensors it expects (`Schema`); limits are checked before anything is allocated, nothing in a frame is executed, followed
or used as a file name, and a frame that differs from its one form by a single byte is refused.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from atoll.errors import InvalidArgument
from atoll.net.buffers import Buffer
from atoll.net.control import content_hash

Reason = Literal["truncated", "limit", "header", "name", "dtype", "shape", "layout", "schema", "value", "hash"]
"""Why a frame was refused."""


class FrameError(InvalidArgument):
    """Bytes that are not the frame that was expected; `reason` is one of `Reason`."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Limits:
    """What a frame may hold at most.

    Attributes:
        bytes: of the whole frame.
        header: bytes of the header.
        tensors: how many.
        dimensions: of a tensor.
        name: characters of a name.
    """

    bytes: int = 2**36
    header: int = 2**20
    tensors: int = 2**12
    dimensions: int = 8
    name: int = 256


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is expected.

    Attributes:
        name: printable ASCII.
        dtype: one of `DTYPES`.
        shape: a length for every dimension; None where any length will do that the limits allow.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


Schema = tuple[TensorSpec, ...]
"""The tensors of a frame, in any order."""

# In the order in which the reference writer puts types, last first: the widest come first, so that all are aligned.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PLACES = {code: place for place, code in enumerate(DTYPES)}
ALIGNMENT = 8

_Number = Annotated[int, Meta(ge=0, le=2**53)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    dtype: str
    shape: list[_Number]
    data_offsets: tuple[_Number, _Number]


_entries = msgspec.json.Decoder(dict[str, _Entry])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a frame: bytes from `begin` to `end`, counted from the frame's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    """The schema these tensors fit."""
    return tuple(TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items())


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """A frame of named tensors.

    Raises:
        FrameError: a name or a type that no frame can carry.
    """
    return b"".join(pieces(tensors))


def pieces(tensors: Mapping[str, Tensor]) -> list[Buffer]:
    """The same, in pieces that follow one another: the tensors' own memory, wherever it can be.

    Raises:
        FrameError: as for `encode`.
    """
    entries = _laid_out(tensors)
    header = _header(entries)
    parts: list[Buffer] = [len(header).to_bytes(8, "little") + header]
    for name in entries:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            parts.append(flat.view(torch.uint8).numpy().data)
    return parts


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the frame of such tensors, which is not made.

    Raises:
        FrameError: as for `encode`.
    """
    entries = _laid_out(tensors)
    return 8 + len(_header(entries)) + max((e.data_offsets[1] for e in entries.values()), default=0)


def _laid_out(tensors: Mapping[str, Tensor]) -> dict[str, _Entry]:
    """Where the tensors of a frame lie, in their order."""
    _check_machine()
    for name, tensor in tensors.items():
        if not _named_well(name, Limits().name):
            raise FrameError(
                "name", f"{name!r} cannot be a tensor's name: use at most 256 characters, A-z 0-9 . _ / -."
            )
        if tensor.dtype not in CODES:
            raise FrameError("dtype", f"{name}: {tensor.dtype} cannot travel; types that can: {', '.join(DTYPES)}.")
    entries: dict[str, _Entry] = {}
    at = 0
    for name in sorted(tensors, key=lambda n: (-PLACES[CODES[tensors[n].dtype]], n)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        entries[name] = _Entry(CODES[tensor.dtype], list(tensor.shape), (at, at + size))
        at += size
    return entries


def decode(
    content: Buffer,
    schema: Schema,
    limits: Limits | None = None,
    *,
    sha256: str | None = None,
    copy: bool = True,
) -> dict[str, Tensor]:
    """The tensors of a frame, in the schema's order.

    Args:
        content: the whole frame.
        schema: the tensors that are expected.
        limits: default `Limits()`.
        sha256: the announced `content_hash`; None: nothing was announced.
        copy: whether the tensors are copies; else they lie in the content, where it can be written to.

    Raises:
        FrameError: for whatever is not exactly that; nothing else is ever raised.
    """
    limits = limits or Limits()
    if len(content) > limits.bytes:
        raise FrameError("limit", f"the frame has {len(content)} bytes, more than the limit of {limits.bytes}.")
    if sha256 is not None and content_hash(content) != sha256:
        raise FrameError("hash", "the content is not what was announced: its SHA-256 differs.")
    places = locate(bytes(content[: 8 + limits.header]), len(content), schema, limits)
    out: dict[str, Tensor] = {}
    view = memoryview(content)
    for spec in schema:
        place = places[spec.name]
        out[spec.name] = tensor(view[place.begin : place.end], place.dtype, copy=copy).view(place.shape)
    return out


def tensor(content: Buffer, dtype: torch.dtype, *, copy: bool = True) -> Tensor:
    """A flat tensor [n] of raw bytes, which are copied, if asked for or if they cannot be written to.

    Raises:
        FrameError: a length that is no multiple of the type's, or truth values that are neither 0 nor 1.
    """
    _check_machine()
    if len(content) % dtype.itemsize:
        raise FrameError("layout", f"{len(content)} bytes are no whole number of {dtype}.")
    if not len(content):
        return torch.empty(0, dtype=dtype)
    view = memoryview(content)
    raw = torch.frombuffer(bytearray(view) if copy or view.readonly else view, dtype=torch.uint8)
    if dtype == torch.bool and int(raw.max()) > 1:
        raise FrameError("value", "a truth value is neither 0 nor 1.")
    return raw.view(dtype)


def locate(start: bytes, size: int, schema: Schema, limits: Limits | None = None) -> dict[str, Place]:
    """Where a frame's tensors lie, from its first bytes.

    Args:
        start: the frame's beginning; as much as the header needs, at most `8 + limits.header` bytes.
        size: bytes of the whole frame.
        schema: the tensors that are expected.
        limits: default `Limits()`.

    Raises:
        FrameError: for whatever is not exactly that.
    """
    limits = limits or Limits()
    if size > limits.bytes:
        raise FrameError("limit", f"the frame has {size} bytes, more than the limit of {limits.bytes}.")
    if size < 8 or len(start) < 8:
        raise FrameError("truncated", f"{size} bytes are too few for a frame.")
    length = int.from_bytes(start[:8], "little")
    if length > limits.header:
        raise FrameError("limit", f"the header claims {length} bytes, more than the limit of {limits.header}.")
    if 8 + length > size or 8 + length > len(start):
        raise FrameError("truncated", f"the header claims {length} bytes, more than there are.")
    header = start[8 : 8 + length]
    try:
        entries = _entries.decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError("header", "the header is not the JSON of a frame.") from error
    if len(entries) > limits.tensors:
        raise FrameError("limit", f"{len(entries)} tensors are more than the limit of {limits.tensors}.")
    at = 0
    for name, entry in entries.items():
        if not _named_well(name, limits.name):
            raise FrameError("name", "a tensor's name is too long or has characters that names cannot have.")
        if entry.dtype not in DTYPES:
            raise FrameError("dtype", f"{name} has a type that cannot travel.")
        if len(entry.shape) > limits.dimensions:
            raise FrameError("limit", f"{name} has {len(entry.shape)} dimensions, limit {limits.dimensions}.")
        # An empty tensor takes no bytes, whatever its other lengths are; a tensor's strides must still be numbers.
        if prod(n for n in entry.shape if n) > 2**53:
            raise FrameError("limit", f"{name} has lengths that no tensor can have.")
        begin, end = entry.data_offsets
        # Lengths are at most 2^53 each and integers have no width here, so that no product overflows.
        if begin != at or end - begin != prod(entry.shape) * DTYPES[entry.dtype].itemsize:
            raise FrameError("layout", f"{name} does not lie where its shape says.")
        at = end
    if 8 + length + at != size:
        raise FrameError("truncated", f"the header describes {8 + length + at} bytes, but there are {size}.")
    _check_schema(entries, schema)
    if header != _header(entries):
        raise FrameError("header", "the header is not in the one form that frames have.")
    return {
        name: Place(DTYPES[e.dtype], tuple(e.shape), 8 + length + e.data_offsets[0], 8 + length + e.data_offsets[1])
        for name, e in entries.items()
    }


def declared(content: Buffer, limits: Limits | None = None) -> Schema:
    """The tensors that a frame's header names, for whoever does not know what to expect; `decode` checks the frame.

    Raises:
        FrameError: there is no header within the limits.
    """
    limits = limits or Limits()
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > limits.header or 8 + length > len(content):
        raise FrameError("truncated", "there is no whole header within the limits.")
    try:
        entries = _entries.decode(content[8 : 8 + length])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError("header", "the header is not the JSON of a frame.") from error
    if len(entries) > limits.tensors:
        raise FrameError("limit", f"{len(entries)} tensors are more than the limit of {limits.tensors}.")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES or len(entry.shape) > limits.dimensions:
            raise FrameError("dtype", f"{name[:50]!r} has a type or a shape that cannot travel.")
    return tuple(TensorSpec(n, DTYPES[e.dtype], tuple(e.shape)) for n, e in entries.items())


def _check_schema(entries: Mapping[str, _Entry], schema: Schema) -> None:
    expected = {spec.name: spec for spec in schema}
    for name in expected:
        if name not in entries:
            raise FrameError("schema", f"{name} is missing.")
    for name, entry in entries.items():
        if name not in expected:
            raise FrameError("schema", f"{name} was not asked for.")
        spec = expected[name]
        if DTYPES[entry.dtype] != spec.dtype:
            raise FrameError("dtype", f"{name} is {DTYPES[entry.dtype]}, expected {spec.dtype}.")
        fits = len(entry.shape) == len(spec.shape) and all(
            wanted is None or wanted == found for wanted, found in zip(spec.shape, entry.shape, strict=True)
        )
        if not fits:
            raise FrameError("shape", f"{name} has the shape {tuple(entry.shape)[:9]}, expected {spec.shape}.")


def _header(entries: Mapping[str, _Entry]) -> bytes:
    order = sorted(entries, key=lambda n: (-PLACES[entries[n].dtype], n))
    header = msgspec.json.encode({name: entries[name] for name in order})
    return header + b" " * (-len(header) % ALIGNMENT)


def _named_well(name: str, longest: int) -> bool:
    plain = name.isascii() and all(c.isalnum() or c in "._/-" for c in name)
    return 0 < len(name) <= longest and plain and not name.startswith("/") and ".." not in name.split("/")


def _check_machine() -> None:
    if sys.byteorder != "little":
        raise FrameError("layout", "frames are little endian, and this machine is not.")
