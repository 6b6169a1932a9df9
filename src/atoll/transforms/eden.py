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
from atoll.transforms.packing import PIECE, pack, packed_bytes, unpack_values
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
        levels, edges = _quantizer(bits, rows)
        packed = torch.empty(len(rows), packed_bytes(padded(length), bits), dtype=torch.uint8, device=rows.device)
        scales = torch.empty(len(rows), len(_sizes(length)), device=rows.device)
        # One client at a time: the bits of a product may depend on how many rows it has.
        for i, row in enumerate(rows):
            low, high = row.aminmax() if length else (row.new_zeros(()),) * 2
            # Squares must neither overflow nor vanish; a power of two changes no digit.
            unit = 2.0 ** int(torch.frexp(torch.maximum(high, -low)).exponent.clamp(-120, 120))
            own, at = keys.of(slice(i, i + 1)), 0
            for begin, end, size in _stretches(length):
                first, second = _signs(own, begin, end, size, row)
                x = torch.nn.functional.pad(row[begin:end], (0, end - length)) if end > length else row[begin:end]
                z = hadamard(hadamard(first.mul_(x.view(-1, size)), 1 / unit).mul_(second))
                norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
                squared = norm.square()
                if bits == 1:  # the levels are one number and its negative
                    code = (z > 0).view(torch.uint8)
                    along = torch.linalg.vector_norm(z, 1, dim=1, keepdim=True) * levels[1]
                else:
                    code = torch.bucketize(z * torch.where(norm > 0, size**0.5 / norm, 1.0), edges, out_int32=True)
                    along = (z * levels.index_select(0, code.view(-1)).view_as(z)).sum(dim=1, keepdim=True)
                scale = torch.where(along > 0, squared / torch.where(along > 0, along, 1.0), 0.0)
                packed[i, begin * bits // 8 : end * bits // 8] = pack(code.view(1, -1), bits)
                scales[i, at : at + len(z)] = (scale[:, 0] * unit).float()
                at += len(z)
        return {"codes": packed, "scales": scales}, memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        scales = codes["scales"]
        levels, _ = _quantizer(bits, scales)
        out = scales.new_empty(len(scales), length)
        for i, made in enumerate(out):
            own, at = keys.of(slice(i, i + 1)), 0
            for begin, end, size in _stretches(length):
                piece = codes["codes"][i : i + 1, begin * bits // 8 : end * bits // 8]
                q = unpack_values(piece, bits, end - begin, levels).view(-1, size)
                first, second = _signs(own, begin, end, size, q)
                back = hadamard(hadamard(q).mul_(second)).mul_(first).mul_(scales[i, at : at + len(q), None])
                made[begin:end] = back.view(-1)[: length - begin]
                at += len(q)
        return out

    return Transform(
        record("eden", bits=bits),
        encode,
        decode_each=decode,
        codes=lambda length, split: {
            "codes": (torch.uint8, packed_bytes(padded(length), bits)),
            "scales": (torch.float32, len(_sizes(length))),
        },
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
    """Stretches (begin, end, size of a block) of about `PIECE` numbers; the last may reach beyond the length."""
    whole = length // BLOCK * BLOCK
    found = [(at, min(whole, at + PIECE), BLOCK) for at in range(0, whole, PIECE)]
    return found + [(whole, whole + size, size) for size in _sizes(length)[length // BLOCK :]]


def _signs(keys: Keys, begin: int, end: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (keys.signs(which, end - begin, begin).view(-1, size).to(like) for which in ("first", "second"))
    return first, second


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
