"""Channels: the last element of a pipeline, which carries rows to the server.

A channel has a client half (`seal`) and a server half (`new_sum`, `add`, `unseal`). `plain` shows the server every
row. `ring_sum` shows it nothing but sums: integers modulo 2^bits, the arithmetic secure aggregation stands on, without
its secrecy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.spec import Spec, record
from atoll.transforms.base import Codes, Keys


class Opened(NamedTuple):
    """What a summing channel tells the server after the round."""

    weighted: Tensor  # [L_mean] sum of weight times averaged part, float64
    sums: Tensor  # [L - L_mean] sum of the summed part, float64
    weight: float
    saturated: int  # values that had to be cut to the range


@dataclass(frozen=True, slots=True)
class Channel:
    """How rows reach the server.

    Attributes:
        spec: name and arguments.
        sums_only: whether the server sees nothing but sums.
        weight_cap: largest weight of a client it can carry; None: any.
        seal: client half of a summing channel: (rows [C, L], L_mean, weights [C, 1], clients in the cohort, keys)
            -> codes.
        unseal: server half: (sum of codes, L_mean, clients in the cohort, clients in the sum) -> Opened.
    """

    spec: Spec
    sums_only: bool = False
    weight_cap: float | None = None
    seal: Callable[[Tensor, int, Tensor, int, Keys], Codes] | None = None
    unseal: Callable[[Codes, int, int, int], Opened] | None = None

    @property
    def name(self) -> str:
        """The channel's name."""
        return str(self.spec["name"])


def plain() -> Channel:
    """Rows travel as they are; the server sees every client's row."""
    return Channel(record("plain"))


def ring_sum(*, clip: float, weight_cap: float = 1.0, bits: int = 32) -> Channel:
    """Sum fixed-point integers modulo 2^bits: exact, independent of order, and all that secure aggregation can see.

    A value v of weight w enters as the integer nearest to w v / step, rounded stochastically, so that the sum is
    unbiased; step is the smallest for which no sum of the cohort can wrap:

        step = 2 n clip weight_cap / (2^bits - 2 n - 2)

    for n clients. The error of a sum of k clients is below k step. This channel hides nothing by itself.

    Args:
        clip: largest absolute value of a coordinate of the row; larger ones are cut and counted. Put
            `transforms.clip_norm(c)` before it with c <= clip and nothing is ever cut; with `rand_k(fraction)` between,
            which scales what it sends up, c <= fraction clip.
        weight_cap: largest weight of a client. Larger weights are refused, not cut.
        bits: size of the ring, 8 to 48; up to 32 a value travels in 4 bytes, else in 8.
    """
    for name, value in (("clip", clip), ("weight_cap", weight_cap)):
        if isinstance(value, bool) or not 0 < value < float("inf"):
            raise invalid(name, value, "a finite number above 0")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 8 <= bits <= 48:
        raise invalid("bits", bits, "an integer from 8 to 48")
    modulus = 1 << bits

    def step(count: int) -> float:
        room = modulus - 2 * count - 2
        if room <= 2 * count:
            raise CompositionError(
                f"ring_sum(bits={bits}) is too small for {count} clients: use bits={min(48, bits + 16)} or more."
            )
        return 2 * count / room

    def seal(rows: Tensor, split: int, weights: Tensor, count: int, keys: Keys) -> Codes:
        heaviest = float(weights.max()) if len(weights) else 0.0
        if heaviest > weight_cap:
            raise CompositionError(
                f"ring_sum(weight_cap={weight_cap}) met a weight of {heaviest:g}: raise weight_cap to the largest "
                'weight a client may have, or use aggregators.mean(weights="uniform").'
            )
        share = weights.double().clamp(min=0) / weight_cap
        values = torch.cat((rows[:, :split].double() / clip * share, rows[:, split:].double() / clip, share), dim=1)
        cut = values.clamp(-1, 1)
        saturated = (values != cut).sum(dim=1, keepdim=True)
        draw = keys.uniform("round", cut.shape[1]).to(cut)
        integers = torch.floor(cut / step(count) + draw).to(torch.int64)
        return {"ring": _narrow(integers % modulus, bits), "saturated": saturated}

    def unseal(total: Codes, split: int, count: int, summed: int) -> Opened:
        ring = total["ring"].to(torch.int64) % modulus
        signed = torch.where(ring >= modulus // 2, ring - modulus, ring).double() * step(count)
        return Opened(
            weighted=signed[:split] * (clip * weight_cap),
            sums=signed[split:-1] * clip,
            weight=float(signed[-1]) * weight_cap,
            saturated=int(total["saturated"].sum()),
        )

    return Channel(record("ring_sum", clip=clip, weight_cap=weight_cap, bits=bits), True, weight_cap, seal, unseal)


def _narrow(values: Tensor, bits: int) -> Tensor:
    """Ring elements as they travel: four bytes up to 32 bits, else eight."""
    if bits > 32:
        return values
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


def add(codes: Codes) -> Codes:
    """Server half: the sum of a tile's sealed rows, modulo 2^64."""
    return {name: tensor.to(torch.int64).sum(dim=0) for name, tensor in codes.items()}


def merge(total: Codes, other: Codes) -> Codes:
    """Server half: the sum of two sums, modulo 2^64."""
    return {name: total[name] + tensor for name, tensor in other.items()}


def resolve(channel: "str | Channel") -> Channel:
    """The channel meant by `channel=`: "plain" or a channel object."""
    if isinstance(channel, Channel):
        return channel
    if channel == "plain":
        return plain()
    raise invalid("channel", channel, '"plain" or a channel such as atoll.transforms.ring_sum(clip=1.0)')
