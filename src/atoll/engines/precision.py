"""Mixed precision of local training.

Micikevicius et al. 2018, "Mixed precision training"; Kalamkar et al. 2019, "A study of BFLOAT16 for deep learning
training".

Parameters, the optimiser's state, the step, losses and all sums stay in single precision. What goes through a matrix
product or a convolution is rounded to bfloat16 first, in the forward and in the backward, as `torch.autocast` does:

    W [m, n] float32,  x [b, n]  ->  z = bf16(x) bf16(W)^T  ->  dW = bf16(dz)^T bf16(x)  ->  W <- W - rate float32(dW)

bfloat16 has the exponents of float32 and 8 bits of significand: nothing overflows that did not, so that no loss is
scaled, and a product's factors are rounded by at most 1 part in 256. Evaluation, and Hessians times vectors, stay in
single precision throughout.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LOW = torch.bfloat16
"""What products are rounded to."""


def products(device: torch.device, *, mixed: bool) -> AbstractContextManager[object]:
    """While active, torch's products and convolutions are in bfloat16 where `mixed` says so."""
    if not mixed:
        return nullcontext()
    # No cache of rounded parameters: local steps change them in place.
    return torch.autocast(device.type, dtype=LOW, cache_enabled=False)


def widened(output: Tensor, *, mixed: bool) -> Tensor:
    """A model's output in single precision, as losses take it under mixed precision."""
    return output.float() if mixed and output.dtype == LOW else output
