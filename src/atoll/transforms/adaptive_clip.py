"""Clipping at a norm that follows a quantile of the clients' own norms.

Andrew, Thakkar, McMahan & Ramaswamy 2021, "Differentially private learning with adaptive clipping", algorithm 1.

    b_i = 1 if |x_i| <= C else 0                       before clipping
    send x_i min(1, C / |x_i|) / C and k (b_i - 1/2)
    b = 1/2 + (sum of (b_i - 1/2) + noise) / m,   C <- C exp(-rate (b - quantile))

Symbols: C the clip norm, m the expected cohort, k what makes one noise do for both. Under noise of multiplier z the bit
sum gets a standard deviation of s_b = z / (2 sqrt(share)) and the update z_x = z / sqrt(1 - share) times C, and

    1 / z^2 = 1 / z_x^2 + 1 / (2 s_b)^2                (theorem 1)

so that update and bit together cost what z says: the share of the budget that goes to the bits is `share`. In the paper
s_b = m / 20, which is share = (10 z / m)^2. The norm itself is never sent.
Cost in floats: one more up, one more down.
"""

import math

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Keys, Transform

RANGE = 1e12
"""C stays within this factor of where it began, whatever the noise on the bits says."""


def adaptive_clip(initial: float = 0.1, *, quantile: float = 0.5, rate: float = 0.2, share: float = 0.01) -> Transform:
    """Clip every client's row at a norm that moves to a quantile of the norms.

    Args:
        initial: clip norm of the first round, above 0, in units of the update. Too small does little harm.
        quantile: share of the clients whose rows are to stay as they are, in [0, 1].
        rate: how fast the clip norm follows, above 0.
        share: of the privacy budget that finding the norm takes, in (0, 1); 0.01 makes the noise on updates 0.5 %
            larger.
            The bits' mean has noise of standard deviation z / (2 sqrt(share) m): keep that below 0.1.
    """
    for name, value, most in (("initial", initial, math.inf), ("rate", rate, math.inf), ("share", share, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
            raise invalid(name, value, "a finite number above 0" if most == math.inf else "a share in (0, 1)")
    if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 <= quantile <= 1:
        raise invalid("quantile", quantile, "a share of the clients in [0, 1]")
    scale = 2 * math.sqrt(share / (1 - share))  # k

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: Tensor, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        norm, within = float(shared), 1 - 4 * torch.finfo(rows.dtype).eps  # rounding must not lengthen a row
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        factor = torch.where(lengths > norm * within, within / lengths, 1 / norm)
        bits = ((lengths <= norm).double() - 0.5) * (scale * within)
        return torch.cat((rows * factor.to(rows.dtype), bits.to(rows.dtype)), dim=1), memory

    def learn(state: Tensor, total: Tensor, expected: float) -> Tensor:
        inside = 0.5 + float(total[-1]) / scale / expected
        moved = state * math.exp(min(max(-rate * (inside - quantile), -30.0), 30.0))
        return moved.clamp(initial / RANGE, initial * RANGE)

    return Transform(
        record("adaptive_clip", initial=initial, quantile=quantile, rate=rate, share=share),
        encode,
        decode_sum=lambda total, shared, length, keys: total[:-1] * float(shared),
        init=lambda size: torch.tensor([initial], dtype=torch.float64),
        size=lambda length, split: (length + 1, split),
        unbiased=False,
        contracts=False,
        bound=lambda before: 1 / math.sqrt(1 - share),  # of update and bit together, in units of C
        learn=learn,
    )
