"""EDEN: rotate, then quantise with the best quantiser of a Gaussian, scaled so that it is unbiased.

Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak & Mitzenmacher 2022, "EDEN: communication-efficient and robust
distributed mean estimation for federated learning"; one bit is their DRIVE of 2021. For every block x of n numbers:

    z = R x;  q = Q(z sqrt(n) / |z|)  with Q the Lloyd-Max quantiser of N(0, 1) with 2^b levels
    S = |x|^2 / <z, q>;  decoded as S R^T q

R is two randomised Hadamard rotations of the client's own, so that z looks Gaussian even when x is sparse. Unbiased up
to what such a rotation lacks of a uniform one, which falls with the block; the mean squared error is
(1 / (1 - D) - 1) |x|^2 for the quantiser's distortion D: 0.571, 0.133, 0.036, 0.0096 of |x|^2 at 1 to 4 bits. Clients'
errors are independent, so they average out. Bytes: b / 8 for a number, 4 for S of every block; the last
block is filled up to a power of two of at least 256.
"""

from functools import lru_cache

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.packing import pack, packed_bytes, unpack
from atoll.transforms.rotate import BLOCK, hadamard

LEAST = 256
"""Numbers in the smallest block: below it a rotated row does not look Gaussian."""


def eden(bits: int) -> Transform:
    """Send each number in `bits` bits, unbiased, with the least error that rotation and a scalar quantiser can have.

    Args:
        bits: 1 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise invalid("bits", bits, "an integer from 1 to 8")

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        length = rows.shape[1]
        signs, levels, edges = _signs(keys, length, rows), *_quantizer(bits, rows)
        codes = torch.empty(len(rows), padded(length), dtype=torch.uint8, device=rows.device)
        scales = torch.empty(len(rows), len(_sizes(length)), device=rows.device)
        # One client at a time: the bits of a product may depend on how many rows it has.
        for i, row in enumerate(rows):
            peak = row.abs().amax() if length else row.new_zeros(())
            unit = torch.where(peak > 0, peak, 1.0)  # squares must neither overflow nor vanish
            full = torch.nn.functional.pad(row / unit, (0, padded(length) - length))
            at = 0
            for begin, end, size in _stretches(length):
                x = full[begin:end].view(-1, size)
                first, second = (s[i, begin:end].view(-1, size) for s in signs)
                z = hadamard(hadamard(x * first) * second)
                squared = z.square().sum(dim=1, keepdim=True)
                spread = (squared / size).sqrt()
                code = torch.bucketize(z / torch.where(spread > 0, spread, 1.0), edges)
                along = (z * levels[code]).sum(dim=1, keepdim=True)
                scale = torch.where(along > 0, squared / torch.where(along > 0, along, 1.0), 0.0)
                codes[i, begin:end] = code.view(-1).to(torch.uint8)
                scales[i, at : at + len(x)] = (scale[:, 0] * unit).float()
                at += len(x)
        return {"codes": pack(codes, bits), "scales": scales}, memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        scales = codes["scales"]
        levels, _ = _quantizer(bits, scales)
        values = levels[unpack(codes["codes"], bits, padded(length))]
        signs = _signs(keys, length, scales)
        out = torch.empty_like(values)
        for i, row in enumerate(values):
            at = 0
            for begin, end, size in _stretches(length):
                q = row[begin:end].view(-1, size)
                first, second = (s[i, begin:end].view(-1, size) for s in signs)
                back = hadamard(hadamard(q) * second) * first
                out[i, begin:end] = (back * scales[i, at : at + len(q), None]).view(-1)
                at += len(q)
        return out[:, :length]

    return Transform(
        record("eden", bits=bits),
        encode,
        decode_each=decode,
        bytes=lambda length, split, item: packed_bytes(padded(length), bits) + 4 * len(_sizes(length)),
        gives="codes",
        sums=False,
        bound=lambda before: None,
        randomness="shared",
    )


def padded(length: int) -> int:
    """Numbers in all blocks."""
    return sum(_sizes(length))


def _sizes(length: int) -> list[int]:
    rest = length % BLOCK
    last = [max(LEAST, 1 << (rest - 1).bit_length())] if rest else []
    return [BLOCK] * (length // BLOCK) + last


def _stretches(length: int) -> list[tuple[int, int, int]]:
    whole = length // BLOCK * BLOCK
    found = [(0, whole, BLOCK)] if whole else []
    return found + [(whole, whole + size, size) for size in _sizes(length)[length // BLOCK :]]


def _signs(keys: Keys, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return keys.signs("first", padded(length)).to(like), keys.signs("second", padded(length)).to(like)


def _quantizer(bits: int, like: Tensor) -> tuple[Tensor, Tensor]:
    levels, edges = lloyd_max(bits)
    return levels.to(like), edges.to(like)


@lru_cache
def lloyd_max(bits: int) -> tuple[Tensor, Tensor]:
    """Levels [2^bits] and the edges between them [2^bits - 1] of the least squared error for N(0, 1), in float64.

    Each level is the mean of the Gaussian between its edges, each edge the middle of two levels. Max 1960, "Quantizing
    for minimum distortion"; Lloyd 1982. It starts from the levels that are best for many bits.
    """
    count = 2**bits
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = 3**0.5 * torch.special.ndtri(middle)
    for _ in range(20_000):
        edges = torch.cat(
            (levels.new_tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf]))
        )
        density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
        mass = torch.special.ndtr(edges)
        renewed = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
        renewed = (renewed - renewed.flip(0)) / 2
        moved = float((renewed - levels).abs().max())
        levels = renewed
        if moved < 1e-12:
            break
    return levels, (levels[1:] + levels[:-1]) / 2
