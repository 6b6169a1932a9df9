"""The downlink: clients are sent what is new about the model, compressed.

    after round t:  c = C(x - w);  w <- w + decoded c          x: the server's model, w: what clients know

Gruntkowska, Tyurin & Richtarik 2023, "EF21-P and friends: improved theoretical communication complexity for distributed
optimization with bidirectional compression". What compression lost is still part of x - w in the next round, so w is
the error feedback of the server. Clients train from w; their updates move x. In a round that is a multiple of
`full_every`, w is x itself.

All who take part in a round know the same w. A client that missed rounds is sent all deltas since its last one, or the
whole w where that is shorter; so a reference belongs to a client and a round, and the server knows which round that is.
Every message has a header: the round, the round of the reference it goes on from, and the SHA-256 of the reference it
leads to, by which a client that does not arrive at it asks for the whole.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.random import client_keys
from atoll.spec import Spec, record
from atoll.transforms.base import Keys, PayloadError, Transform, Wire
from atoll.transforms.chain import Chain, compose, sent
from atoll.transforms.channel import plain
from atoll.transforms.error_feedback import compressor

HEADER = 8 + 8 + 32
"""Bytes before a message: its round, the round it goes on from, and the hash of where it leads."""

WINDOW = 64
"""Rounds after which a client that took part in none is sent the whole model."""


class Told(NamedTuple):
    """What the server knows of the downlink.

    Attributes:
        reference: w, what clients of the coming round know, [D].
        sizes: bytes of the last messages, from one round to the next, the latest last; int64 [WINDOW].
    """

    reference: Tensor
    sizes: Tensor


class Message(NamedTuple):
    """What takes a client from one reference to the next.

    Attributes:
        round: of the reference it leads to.
        base: of the reference it goes on from; -1: from none, it holds the whole.
        check: `fingerprint` of the reference it leads to.
        wire: the encoded difference, or the reference itself as a row [1, D].
    """

    round: int
    base: int
    check: bytes
    wire: Wire

    @property
    def size(self) -> int:
        """Bytes on the wire, header included."""
        return HEADER + sent(self.wire)


@dataclass(frozen=True, slots=True)
class Downlink:
    """How the model reaches the clients; pure.

    Attributes:
        chain: what compresses differences.
        full_every: w becomes x in rounds that are a multiple of it; None: never after the first.
    """

    chain: Chain
    full_every: int | None = None

    @property
    def spec(self) -> Spec:
        """Name and arguments."""
        return record("delta", stages=list(self.chain.stages), full_every=self.full_every)

    def init(self, vector: Tensor) -> Told:
        """Before round 0, when nobody knows anything."""
        return Told(vector.clone(), torch.full((WINDOW,), self.full(vector), dtype=torch.int64))

    def full(self, vector: Tensor) -> int:
        """Bytes of the message that holds the whole model."""
        return HEADER + vector.numel() * vector.element_size()

    def advance(self, told: Told, vector: Tensor, seed: int, round: int) -> tuple[Told, Message]:
        """The server's half: what clients will know in a round, and the message that takes them there.

        Args:
            told: what was known in the round before.
            vector: the model x after it, [D].
            seed: of the run.
            round: the round to come.
        """
        if self.full_every is not None and round % self.full_every == 0:
            reference, wire, base = vector.clone(), vector[None], -1
        else:
            keys, nothing = _keys(seed, round, vector), (None,) * len(self.chain.stages)
            wire, _ = self.chain.encode((vector - told.reference)[None], {}, nothing, keys)
            got = self.chain.decode_each(wire, nothing, len(vector), keys, vector.dtype)
            reference, base = told.reference + got[0], round - 1
        message = Message(round, base, fingerprint(reference), wire)
        sizes = torch.cat((told.sizes[1:], told.sizes.new_tensor([message.size])))
        return Told(reference, sizes), message

    def receive(self, known: Tensor | None, message: Message, seed: int, like: Tensor) -> Tensor:
        """A client's half: the reference [D] of a message.

        Args:
            known: its reference of the round the message goes on from; None: it has none.
            message: what came.
            seed: of the run.
            like: a vector of the model's length and type.

        Raises:
            PayloadError: the message is damaged or for another model, or does not lead where it should: the client's
                reference is not the server's, and it needs the whole.
        """
        if message.base < 0:
            wire = message.wire
            if not isinstance(wire, Tensor) or wire.shape != (1, len(like)) or wire.dtype != like.dtype:
                raise PayloadError("the message does not hold a whole model of this layout.")
            found = wire[0].clone()
        elif known is None or known.shape != like.shape or known.dtype != like.dtype:
            raise PayloadError(
                f"the message goes on from the reference of round {message.base + 1}, which is not here: ask for the "
                "whole model."
            )
        else:
            keys, nothing = _keys(seed, message.round, like), (None,) * len(self.chain.stages)
            found = known + self.chain.decode_each(message.wire, nothing, len(like), keys, like.dtype)[0]
        if fingerprint(found) != message.check:
            raise PayloadError(
                f"the reference of round {message.round + 1} is not the server's: its hash differs. Ask for the whole "
                "model."
            )
        return found

    def bytes(self, told: Told, round: int, last: int | None) -> int:
        """Bytes that a client is sent of the model in a round.

        Args:
            told: what is known in the round.
            round: the round.
            last: the round before it in which the client last took part; None: none, or longer ago than `WINDOW`.
        """
        whole = self.full(told.reference)
        missed = WINDOW + 1 if last is None else round - last
        return whole if missed > WINDOW else min(whole, int(told.sizes[WINDOW - missed :].sum()))


def delta(*stages: Transform, full_every: int | None = None) -> Downlink:
    """Send the model's change since clients last knew it: `downlink=delta(top_k(0.05), quantize(4), full_every=50)`.

    Args:
        stages: in the server's order; their error must be shorter than what enters (`top_k`, `sign`, `half`, `eden`,
            `quantize` with 4 bits or more). `entropy_code` may be the last.
        full_every: rounds after which clients get the model itself; None: never, but for those that know nothing of it.

    Raises:
        CompositionError: stages that cannot stand here.
    """
    if full_every is not None and (isinstance(full_every, bool) or not isinstance(full_every, int) or full_every < 1):
        raise invalid("full_every", full_every, "a number of rounds of at least 1, or None")
    for stage in stages:
        if isinstance(stage, Transform) and stage.bind is not None:
            raise CompositionError(
                f"{stage.name} cannot stand in the downlink: clients would need its bases, which are as long as what "
                "it sends. Use top_k, quantize or eden there."
            )
    inner = stages[:-1] if stages and isinstance(stages[-1], Transform) and stages[-1].coder is not None else stages
    if not stages:
        raise invalid("stages", stages, "at least one transform", "Write for instance delta(top_k(0.05)).")
    if inner:
        compressor("the downlink", inner)
    return Downlink(compose(stages, plain()), full_every)


def resolve(downlink: "Downlink | Sequence[Transform]") -> Downlink | None:
    """The downlink meant by `downlink=`: None where whole models are sent."""
    if isinstance(downlink, Downlink):
        return downlink
    if isinstance(downlink, Transform):
        raise invalid("downlink", downlink.name, "a sequence", f"Write downlink=({downlink.name}(...),).")
    if not isinstance(downlink, Sequence) or isinstance(downlink, str):
        raise invalid("downlink", downlink, "a sequence of transforms, or atoll.transforms.delta(...)")
    return delta(*downlink) if downlink else None


def fingerprint(reference: Tensor) -> bytes:
    """SHA-256 of a reference's numbers, little endian."""
    return hashlib.sha256(reference.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def served(before: Mapping[str, int], clients: Sequence[str], round: int) -> dict[str, int]:
    """Clients and the round in which they last took part, after this one: those that may be sent deltas."""
    return {c: r for c, r in before.items() if r > round - WINDOW} | dict.fromkeys(clients, round)


def _keys(seed: int, round: int, vector: Tensor) -> Keys:
    return Keys(seed, "downlink", round, client_keys(("",)), len(vector))
