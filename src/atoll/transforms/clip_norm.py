"""L2 clipping of everything that leaves a client.

    row <- row min(1, c / |row|_2)

over the averaged part, averaged buffers and sums together, so that one client moves the sum by at most c.
McMahan, Ramage, Talwar & Zhang 2018, "Learning differentially private recurrent language models" (flat clipping).
"""

import torch
from torch import Tensor

from atoll.errors import invalid
from atoll.spec import record
from atoll.transforms.base import Keys, Transform
from atoll.vectors import lengths


def clip_norm(norm: float) -> Transform:
    """Scale every client's row down to an L2 norm of at most `norm`; shorter rows are left alone.

    It cannot stand inside `error_feedback` or `ef21`: what it cuts off rows that stay longer than `norm` would add up.

    Args:
        norm: the bound c, above 0, in units of the update.
    """
    if isinstance(norm, bool) or not 0 < norm < float("inf"):
        raise invalid("norm", norm, "a finite number above 0")

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        # Rounding the factor and the products adds up to one part in 1 / eps; noise counts on the bound.
        shorter = norm * (1 - 2 * torch.finfo(rows.dtype).eps)
        return rows * shrinking(lengths(rows), norm, shorter).to(rows.dtype), memory

    return Transform(
        record("clip_norm", norm=norm),
        encode,
        unbiased=False,
        contracts=False,
        bound=lambda before: norm if before is None else min(before, norm),
        scale=lambda sizes: shrinking(sizes, norm, norm * (1 - 2 * torch.finfo(sizes.dtype).eps)),
    )


def shrinking(sizes: Tensor, norm: float, shorter: float) -> Tensor:
    """Factors [C, 1] that bring rows of these norms [C, 1] down to `shorter`; 1 for those within `norm`."""
    return torch.where(sizes > norm, shorter / sizes, 1.0)
