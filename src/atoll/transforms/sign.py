"""Signs and one scale: a bit for a number.

    send s = |x|_1 / L and sign(x); decoded as s sign(x), with sign(0) = 1

Karimireddy, Rebjock, Stich & Jaggi 2019, "Error feedback fixes SignSGD and other gradient compression schemes". Biased:
use it inside `error_feedback`. Bytes: L / 8, and 4 for s.
"""

import torch
from torch import Tensor

from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.packing import pack, packed_bytes, unpack_values


def sign() -> Transform:
    """Send the sign of every number and the mean of their absolute values."""

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Codes, dict[str, Tensor]]:
        scale = (
            [row.abs().mean(dtype=torch.float64) for row in rows] if rows.shape[1] else [torch.zeros(())] * len(rows)
        )
        return {"signs": pack(rows >= 0, 1), "scale": torch.stack(scale)[:, None].float()}, memory

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        return unpack_values(codes["signs"], 1, length, codes["scale"].new_tensor([-1, 1])).mul_(codes["scale"])

    return Transform(
        record("sign"),
        encode,
        decode_each=decode,
        codes=lambda length, split: {"signs": (torch.uint8, packed_bytes(length, 1)), "scale": (torch.float32, 1)},
        gives="codes",
        sums=False,
        unbiased=False,
        bound=lambda before: None if before is None else before * (1 + 1e-6),
    )
