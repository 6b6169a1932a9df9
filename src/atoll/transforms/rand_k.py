"""Random numbers of a row, the same places for everybody in a round.

    x_j L / k  for k places j that seed and round decide;  nothing elsewhere

Konecny, McMahan, Yu, Richtarik, Suresh & Bacon 2016, "Federated learning: strategies for improving communication
efficiency" (random masks); Stich, Cordonnier & Jaggi 2018. Unbiased, with variance (L / k - 1) |x|^2. The server draws
the places itself: they cost no bytes, and rows still sum. Averaged and summed part are thinned out each for itself.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.spec import record
from atoll.transforms.base import Codes, Keys, Transform
from atoll.transforms.top_k import check_fraction, kept_of


def rand_k(fraction: float) -> Transform:
    """Send the numbers at some places, scaled so that the row is unbiased.

    Args:
        fraction: of the numbers to send, in (0, 1]; rounded up in each part.
    """
    check_fraction(fraction)

    def places(length: int, keys: Keys) -> tuple[Tensor, Tensor]:
        """Places [k] in ascending order and the factors [k] of what is sent from there."""
        split = length if keys.split is None else keys.split
        found, factors, draw = list[Tensor](), list[Tensor](), keys.common
        for name, begin, count in (("averaged", 0, split), ("summed", split, length - split)):
            kept = kept_of(count, fraction)
            purpose = random.key(draw.seed, draw.stage, "places", name)
            found.append(torch.from_numpy(_chosen(random.stretch(purpose, draw.round, draw.clients, count)[0], kept)))
            found[-1] += begin
            factors.append(torch.full((kept,), count / max(kept, 1), dtype=torch.float64))
        return torch.cat(found), torch.cat(factors)

    def encode(rows: Tensor, memory: dict[str, Tensor], shared: None, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        where, factors = places(rows.shape[1], keys)
        return rows[:, where.to(rows.device)] * factors.to(rows), memory

    def spread(rows: Tensor, length: int, keys: Keys) -> Tensor:
        where, _ = places(length, keys)
        out = rows.new_zeros(*rows.shape[:-1], length)
        out[..., where.to(rows.device)] = rows
        return out

    def size(length: int, split: int) -> tuple[int, int]:
        averaged = kept_of(split, fraction)
        return averaged + kept_of(length - split, fraction), averaged

    def decode(codes: Codes, shared: None, length: int, keys: Keys) -> Tensor:
        return spread(codes["rows"], length, keys)

    return Transform(
        record("rand_k", fraction=fraction),
        encode,
        decode_each=decode,
        decode_sum=lambda total, shared, length, keys: spread(total, length, keys),
        size=size,
        aligned=False,
        lossless=fraction == 1,
        contracts=fraction == 1,
        bound=lambda before: None if before is None else before / fraction,
        randomness="shared",
    )


def _chosen(words: NDArray[np.uint64], kept: int) -> NDArray[np.int64]:
    """The places of the smallest words, in ascending order."""
    # The place stands in the low bits: parting numbers is many times faster than asking for their order.
    low = np.uint64((1 << max(1, (len(words) - 1).bit_length())) - 1)
    words &= ~low
    words |= np.arange(len(words), dtype=np.uint64)
    if 0 < kept < len(words):
        words = np.partition(words, kept - 1)
    return np.sort(words[:kept] & low).view(np.int64)
