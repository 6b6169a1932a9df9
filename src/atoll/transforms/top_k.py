"""The largest numbers of a row and where they stand.

Aji & Heafield 2017, "Sparse communication for distributed gradient descent"; Stich, Cordonnier & Jaggi 2018,
"Sparsified SGD with memory". Biased: use it inside `error_feedback`. With k = ceil(fraction L): k numbers, which go on
as a shorter row, and k places of ceil(log2 L) bits.
"""

import math

import numpy as np
import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, PayloadError, Transform
from atoll.transforms.packing import pack, packed_bytes, unpack


def top_k(fraction: float) -> Transform:
    """Send only the numbers of largest absolute value, over the whole row.

    Of equal ones the first are sent. What leaves is a row of k numbers that another stage may code.

    Args:
        fraction: of the numbers to send, in (0, 1]; rounded up.
    """
    check_fraction(fraction)

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        length = rows.shape[1]
        kept = kept_of(length, fraction)
        places = torch.empty(len(rows), kept, dtype=torch.int64, device=rows.device)
        for row, chosen in zip(rows if kept else (), places, strict=False):
            # What is not finite counts as largest: such a row is refused for it, not for what it does here.
            size = row.to(torch.promote_types(row.dtype, torch.float32)).abs().nan_to_num_(torch.inf, torch.inf)
            least = float(np.partition(size.cpu().numpy(), length - kept)[length - kept])
            above, equal = (size > least).nonzero()[:, 0], (size == least).nonzero()[:, 0]
            torch.cat((above, equal[: kept - len(above)]), out=chosen)
        places = places.sort(dim=1).values
        return {"places": pack(places, place_bits(length)), "rows": rows.gather(1, places)}, memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        places = unpack(codes["places"], place_bits(length), kept_of(length, fraction)).to(torch.int64)
        if places.numel() and int(places.max()) >= length:
            raise PayloadError(f"top_k: a place is beyond the row of {length} numbers: the payload is damaged.")
        return codes["rows"].new_zeros(len(places), length).scatter_(1, places, codes["rows"])

    def size(length: int, split: int) -> tuple[int, int]:
        kept = kept_of(length, fraction)
        return kept, kept

    return Transform(
        record("top_k", fraction=fraction),
        encode,
        decode_each=decode,
        size=size,
        codes=lambda length, split: {
            "places": (torch.uint8, packed_bytes(kept_of(length, fraction), place_bits(length)))
        },
        sums=False,
        unbiased=fraction == 1,
        aligned=False,
        lossless=fraction == 1,
    )


def check_fraction(fraction: object) -> None:
    """Refuse anything but a number in (0, 1]."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise invalid("fraction", fraction, "a number above 0 and at most 1")


def kept_of(length: int, fraction: float) -> int:
    """How many of `length` numbers are sent: at least one where there is any."""
    # What a product is above a whole number by rounding alone must not make one number more.
    return min(length, max(1, math.ceil(length * fraction - 1e-9)))


def place_bits(length: int) -> int:
    """Bits that tell one of `length` places."""
    return max(1, (length - 1).bit_length())
