"""Half precision: two bytes for a number.

    s = power of two for which the largest |x| / s lies in [1, 2);  send s and x / s, rounded to nearest

A power of two changes no digit, and keeps updates out of the subnormal and beyond-range numbers of float16, whose
relative error is at most 2^-11 for values down to 2^-14 of the largest; that of bfloat16 is 2^-9.
Micikevicius et al. 2018, "Mixed precision training" (the scale). Bytes: 2 L, and 4 for s.
"""

from typing import Literal

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def half(dtype: Literal["float16", "bfloat16"] = "float16") -> Transform:
    """Send numbers in half precision, rounded to nearest.

    Args:
        dtype: "float16" (11 bits of digits) or "bfloat16" (8 bits, the range of float32).
    """
    if dtype not in _DTYPES:
        raise invalid("dtype", dtype, '"float16" or "bfloat16"')

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        peak = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        # The exponent fits float32 whatever the rows' own range is.
        exponent = torch.frexp(peak).exponent.clamp(-120, 128) - 1
        scale = torch.ldexp(torch.ones_like(peak), exponent)
        return {"rounded": (rows / scale).to(_DTYPES[dtype]), "scale": scale.float()}, memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        return codes["rounded"].double() * codes["scale"].double()

    return Transform(
        record("half", dtype=dtype),
        encode,
        decode_each=decode,
        codes=lambda length, split: {"rounded": (_DTYPES[dtype], length), "scale": (torch.float32, 1)},
        gives="codes",
        sums=False,
        unbiased=False,
        bound=lambda before: None,
    )
