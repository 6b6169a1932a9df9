"""The pipeline: transforms composed, checked once when it is built, and ended by a channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.transforms.base import Keys, Transform, Wire
from atoll.transforms.channel import Channel


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a row after the whole chain."""

    sums: bool
    unbiased: bool
    bound: float | None
    fixed_size: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """Transforms in client order and the channel behind them.

    Raises:
        CompositionError: two stages do not fit; the text names both and the way out.
    """

    stages: tuple[Transform, ...]
    channel: Channel

    def __post_init__(self) -> None:
        codec: Transform | None = None
        for stage in self.stages:
            if codec is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand after {codec.name}: {codec.name} gives codes, {stage.name} needs rows. "
                    f"Put {stage.name} before {codec.name}."
                )
            if stage.gives == "codes":
                codec = stage
        if self.channel.sums_only:
            for stage in self.stages:
                if not stage.sums or stage.gives == "codes":
                    raise CompositionError(
                        f"{stage.name} cannot stand before the channel {self.channel.name}, which only adds: what "
                        f"{stage.name} sends does not sum. Leave {stage.name} out ({self.channel.name} has a fixed "
                        'point of its own), or use channel="plain".'
                    )

    @property
    def facts(self) -> Facts:
        """Facts propagated through the stages."""
        bound: float | None = None
        for stage in self.stages:
            bound = stage.bound(bound)
        return Facts(
            all(s.sums for s in self.stages),
            all(s.unbiased for s in self.stages),
            bound,
            all(s.fixed_size for s in self.stages),
        )

    def init(self, length: int) -> tuple[Any, ...]:
        """Server state of every stage for rows of this length."""
        return tuple(stage.init(length) for stage in self.stages)

    def share(self, state: Sequence[Any]) -> tuple[Any, ...]:
        """What clients must know of every stage."""
        return tuple(stage.share(s) for stage, s in zip(self.stages, state, strict=True))

    def update(self, state: Sequence[Any], aggregate: Any) -> tuple[Any, ...]:
        """State of every stage after a round."""
        return tuple(stage.update(s, aggregate) for stage, s in zip(self.stages, state, strict=True))

    def memory(self, length: int) -> dict[str, Tensor]:
        """A client's memory of every stage at its first visit, by `stage number/name`."""
        return {f"{i}/{n}": t for i, stage in enumerate(self.stages) for n, t in stage.memory(length).items()}

    def encode(
        self,
        rows: Tensor,
        memory: dict[str, Tensor],
        shared: Sequence[Any],
        *,
        seed: int,
        round: int,
        clients: NDArray[np.uint64],
    ) -> tuple[Wire, dict[str, Tensor]]:
        """Client halves, in order."""
        wire: Wire = rows
        renewed: dict[str, Tensor] = {}
        for i, stage in enumerate(self.stages):
            own = {n.split("/", 1)[1]: t for n, t in memory.items() if n.startswith(f"{i}/")}
            wire, own = stage.encode(wire, own, shared[i], Keys(seed, f"transforms/{i}", round, clients))
            renewed.update({f"{i}/{n}": t for n, t in own.items()})
        return wire, renewed

    def decode_each(self, wire: Wire, shared: Sequence[Any], length: int, dtype: torch.dtype) -> Tensor:
        """Server halves on clients' rows, in reverse: [C, length]."""
        for stage, known in zip(reversed(self.stages), reversed(tuple(shared)), strict=True):
            if stage.decode_each is not None:
                wire = stage.decode_each(wire, known, length)  # pyright: ignore[reportArgumentType]
        assert isinstance(wire, Tensor)
        return wire.to(dtype)

    def decode_sum(self, total: Tensor, shared: Sequence[Any]) -> Tensor:
        """Server halves on the combined row, in reverse: [length]."""
        for stage, known in zip(reversed(self.stages), reversed(tuple(shared)), strict=True):
            if stage.decode_sum is not None:
                total = stage.decode_sum(total, known)
        return total


def compose(transforms: Sequence[Transform], channel: Channel) -> Chain:
    """The chain of these transforms and this channel."""
    if isinstance(transforms, Transform):
        raise invalid("transforms", transforms.name, "a sequence", f"Write transforms=({transforms.name}(...),).")
    for stage in transforms:
        if not isinstance(stage, Transform):
            raise invalid("transforms", stage, "a sequence of transforms such as atoll.transforms.clip_norm(1.0)")
    return Chain(tuple(transforms), channel)
