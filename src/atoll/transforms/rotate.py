"""Randomised Hadamard rotation: spreads what a row holds evenly over its coordinates.

    x <- H D x  in blocks;  D: random signs, H: the orthonormal Walsh-Hadamard matrix;  undone by D H

Ailon & Chazelle 2009, "The fast Johnson-Lindenstrauss transform"; Suresh, Yu, Kumar & McMahan 2017, "Distributed mean
estimation with limited communication". Signs are the same for everybody in a round, so that rows still sum. A quantiser
behind it has less to lose: the largest number of a block of n shrinks to about sqrt(2 log n / n) of the block's norm.
"""

from functools import lru_cache

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.packing import PIECE

BLOCK = 4096


def rotate(*, block: int = BLOCK) -> Transform:
    """Rotate rows in blocks, whatever their length; the length stays.

    What is left behind the last whole block is cut into blocks of smaller powers of two. No block holds numbers of the
    averaged and of the summed part.

    Args:
        block: numbers in a block, a power of two up to 2^20.
    """
    check_block(block)

    def turn(rows: Tensor, keys: Keys, *, back: bool) -> Tensor:
        length = rows.shape[1]
        signs = keys.common.signs("rotation", length)[0].to(rows)
        out = torch.empty_like(rows)
        # One client at a time: the bits of a product may depend on how many rows it has.
        for row, turned in zip(rows, out, strict=True):
            for begin, end, size in pieces(length, keys.split, block):
                for at in range(begin, end, max(PIECE, size)):
                    to = min(end, at + max(PIECE, size))
                    own = row[at:to] if back else row[at:to] * signs[at:to]
                    turned[at:to] = hadamard(own.view(-1, size)).view(-1)
        return out.mul_(signs) if back else out

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        return turn(rows, keys, back=False), memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        return turn(codes["rows"], keys, back=True)

    return Transform(
        record("rotate", block=block),
        encode,
        decode_each=decode,
        decode_sum=lambda total, shared, length, keys: turn(total[None], keys, back=True)[0],
        aligned=False,
        lossless=True,
        randomness="shared",
    )


def check_block(block: object) -> None:
    """Refuse anything but a power of two."""
    if isinstance(block, bool) or not isinstance(block, int) or not 2 <= block <= 2**20 or block & (block - 1):
        raise invalid("block", block, "a power of two from 2 to 2^20")


def pieces(length: int, split: int | None, block: int) -> list[tuple[int, int, int]]:
    """Stretches (begin, end, size of a block) of whole blocks and, behind them, of ever smaller powers of two."""
    found: list[tuple[int, int, int]] = []
    middle = length if split is None else split
    for at, end in ((0, middle), (middle, length)):
        size = block
        while at < end:
            whole = (end - at) // size * size
            if whole:
                found.append((at, at + whole, size))
                at += whole
            size //= 2
    return found


def hadamard(rows: Tensor, scale: float = 1.0) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of each row [m, 2^k], times a scale; without one its own inverse.

    The matrix is a Kronecker product of two small ones, so that two products do it.
    """
    count, size = rows.shape
    left = 1 << (size.bit_length() - 1) // 2
    right = size // left
    # Batches of small products, which are twice as fast as one with a matrix that is long and thin.
    halfway = torch.bmm(
        rows.view(count, left, right), sylvester(right, rows).mul(scale / size**0.5).expand(count, -1, -1)
    )
    return torch.bmm(sylvester(left, rows).expand(count, -1, -1), halfway).view(count, size)


def sylvester(size: int, like: Tensor) -> Tensor:
    """The Hadamard matrix [size, size] of ones and minus ones, Sylvester's construction."""
    return _sylvester(size, like.dtype, like.device)


@lru_cache
def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
