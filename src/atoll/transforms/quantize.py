"""Stochastic uniform quantisation to b bits with real bit packing.

With s = max |row| and 2^b - 1 equal steps over [-s, s], every value is rounded to one of its two neighbours with the
probabilities that make it unbiased. Alistarh, Grubic, Li, Tomioka & Vojnovic 2017, "QSGD", with the maximum norm.
Error of one value: at most 2 s / (2^b - 1), variance at most a quarter of its square. Bytes: L b / 8, and 4 for s.
"""

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.packing import pack, packed_bytes, pieces, unpack_values

_CODES = {False: torch.uint8, True: torch.int32}


def quantize(bits: int) -> Transform:
    """Send each value in `bits` bits, unbiased, with one scale for each client.

    Inside `error_feedback` and `ef21` it needs 4 bits: with fewer the error of a row without one dominating number may
    be longer than the row.

    Args:
        bits: 1 to 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise invalid("bits", bits, "an integer from 1 to 16")
    levels = 2**bits - 1

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        peak = (
            torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
            if rows.shape[1]
            else rows.new_zeros(len(rows), 1)
        )
        # The scale travels as float32 and must not fall below the largest value.
        scale = peak.float()
        scale = torch.where(scale.to(peak.dtype) < peak, torch.nextafter(scale, scale.new_tensor(torch.inf)), scale)
        # Half precision has too few digits for a place between two levels.
        wide = torch.promote_types(rows.dtype, torch.float64 if bits > 12 else torch.float32)
        unit = torch.where(scale > 0, scale, 1.0).to(wide)
        packed = rows.new_empty(len(rows), packed_bytes(rows.shape[1], bits), dtype=torch.uint8)
        for own, begin, end in pieces(*rows.shape):
            position = rows[own, begin:end].to(wide, copy=True).div_(unit[own]).add_(1).mul_(levels / 2)
            draw = keys.of(own).uniform("round", end - begin, begin)
            position.add_(draw.to(rows.device)).clamp_(0, levels)
            # Whole numbers of bytes begin every piece, and what is cut off behind the point is rounded down.
            packed[own, begin * bits // 8 : packed_bytes(end, bits)] = pack(position.to(_CODES[bits > 8]), bits)
        return {"codes": packed, "scale": scale}, memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        places = torch.arange(levels + 1, dtype=torch.float64, device=codes["codes"].device)
        scale = codes["scale"].double()
        return unpack_values(codes["codes"], bits, length, places.mul_(2 / levels).sub_(1)).mul_(scale)

    return Transform(
        record("quantize", bits=bits),
        encode,
        decode_each=decode,
        codes=lambda length, split: {"codes": (torch.uint8, packed_bytes(length, bits)), "scale": (torch.float32, 1)},
        gives="codes",
        sums=False,
        contracts=bits >= 4,
        bound=lambda before: None,
        randomness="private",
    )
