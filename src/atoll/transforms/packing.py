"""Bit packing: integers of a few bits each as bytes, lowest bit first."""

from collections.abc import Iterator
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

PIECE = 2**16
"""Numbers a codec works on at a time: they stay in the cache from the first operation to the last."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers in [0, 2**bits) of each row [C, n] into bytes [C, ceil(n bits / 8)].

    A few codes fill a few whole bytes. Each of these is worked out for the whole row at once, of the codes that reach
    into it.
    """
    count, each = 8 // gcd(8, bits), bits // gcd(8, bits)
    size = packed_bytes(codes.shape[1], bits)
    if count > 1 and each == 1:
        return _fold(codes.to(torch.uint8), bits)[:, :size]
    narrow = codes.to(torch.uint8 if bits <= 8 else torch.int32 if bits < 32 else torch.int64)
    if short := -codes.shape[1] % count:
        narrow = torch.nn.functional.pad(narrow, (0, short))
    grouped = narrow.reshape(len(codes), narrow.shape[1] // count, count)
    out = torch.empty(len(codes), grouped.shape[1], each, dtype=torch.uint8, device=codes.device)
    for byte in range(each):
        # What a shift moves out of the byte falls away when it is written to one.
        parts = [_shifted(grouped[:, :, k], k * bits - 8 * byte) for k in _reaching(byte, 8, bits)]
        out[:, :, byte] = _joined(parts)
    return out.flatten(1)[:, :size]


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo `pack`: [C, length], uint8 for up to 8 bits, else int64."""
    count, each = 8 // gcd(8, bits), bits // gcd(8, bits)
    wide = packed if bits <= 8 else packed.to(torch.int64)
    if short := -packed.shape[1] % each:
        wide = torch.nn.functional.pad(wide, (0, short))
    grouped = wide.reshape(len(packed), wide.shape[1] // each, each)
    out = torch.empty(len(packed), grouped.shape[1], count, dtype=wide.dtype, device=packed.device)
    for k in range(count):
        parts = [_shifted(grouped[:, :, byte], 8 * byte - k * bits) for byte in _reaching(k, bits, 8)]
        out[:, :, k] = _joined(parts) & (2**bits - 1)
    return out.flatten(1)[:, :length]


def unpack_values(packed: Tensor, bits: int, length: int, levels: Tensor) -> Tensor:
    """`levels[unpack(...)]`, [C, length] in the levels' type: where codes fill bytes, by a table of whole bytes."""
    if 8 % bits:
        out = levels.new_empty(len(packed), length)
        whole = PIECE // 8 * 8
        for row, made in zip(packed, out, strict=True):
            for begin in range(0, length, whole):
                end = min(length, begin + whole)
                codes = unpack(row[None, begin * bits // 8 : packed_bytes(end, bits)], bits, end - begin)
                torch.index_select(levels, 0, codes[0].to(torch.int32), out=made[begin:end])
        return out
    each = 8 // bits
    table = levels[_in_bytes(bits).to(levels.device)]
    out, flat = levels.new_empty(packed.numel(), each), packed.reshape(-1)
    for begin in range(0, len(flat), PIECE // each):
        part = flat[begin : begin + PIECE // each]
        torch.index_select(table, 0, part.to(torch.int32), out=out[begin : begin + len(part)])
    return out.view(len(packed), packed.shape[1] * each)[:, :length]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed integers."""
    return -(-count * bits // 8)


def pieces(count: int, length: int) -> Iterator[tuple[slice, int, int]]:
    """Parts (rows, begin, end) of rows [count, length] of about `PIECE` numbers: of one row, or some whole rows.

    Places are multiples of 256.
    """
    if length >= PIECE:
        for row in range(count):
            for begin in range(0, length, PIECE):
                yield slice(row, row + 1), begin, min(length, begin + PIECE)
    elif length:
        most = PIECE // length
        for row in range(0, count, most):
            yield slice(row, min(count, row + most)), 0, length


def _fold(codes: Tensor, bits: int) -> Tensor:
    """Pack 1, 2 or 4 bits: eight codes, a byte each, are one word, in which neighbours move together."""
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).reshape(-1)
    words = filled.clone().view(torch.int64)  # a copy begins where a word may begin
    merged = 1
    while merged * bits < 8:
        words = words | (words >> merged * (8 - bits))
        merged *= 2
    return words.view(torch.uint8)[:: 8 // bits].reshape(len(codes), -(-codes.shape[1] // 8) * bits)


@lru_cache
def _in_bytes(bits: int) -> Tensor:
    """The codes in every byte there is, int64 [256, 8 / bits]."""
    return unpack(torch.arange(256, dtype=torch.uint8)[:, None], bits, 8 // bits).to(torch.int64)


def _reaching(place: int, size: int, other: int) -> range:
    """Which of the items of `other` bits each reach into item `place` of `size` bits."""
    return range(place * size // other, (place * size + size - 1) // other + 1)


def _shifted(codes: Tensor, left: int) -> Tensor:
    return codes << left if left > 0 else codes >> -left if left else codes


def _joined(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out | part
    return out
