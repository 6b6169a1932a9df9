"""The transform record: a stage of the update pipeline with a client half and a server half.

What leaves a client is one row `[L]`: the averaged part, averaged buffers and the summed part, one after the other.
Client halves run in order, server halves in reverse. Each stage declares facts; `Chain` checks them when it is built.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.errors import InvalidArgument
from atoll.privacy.client_noise import ClientNoise
from atoll.privacy.noise import Noise
from atoll.spec import Spec
from atoll.transforms.packing import unpack_values
from atoll.vectors import Layout

Codes = Mapping[str, Tensor]
"""An encoded tile: named tensors whose first axis is the client. What is called "rows" goes on to the next stage."""

Wire = Tensor | Codes
"""What leaves a stage: rows [C, L], or codes."""

Form = Mapping[str, tuple[torch.dtype, int]]
"""What codes of a client are made of: type and length of every named tensor."""


class PayloadError(InvalidArgument):
    """What a client sent is damaged, or was made for another layout."""


class Coder(NamedTuple):
    """A lossless code of bytes.

    Attributes:
        compress: (bytes) -> bytes.
        expand: (bytes, how many there were) -> the bytes; a `PayloadError` for whatever `compress` cannot have given.
    """

    compress: Callable[[bytes], bytes]
    expand: Callable[[bytes, int], bytes]


@dataclass(frozen=True, slots=True)
class Keys:
    """Keyed randomness of one stage for a tile of clients in a round, which the server can draw again.

    Attributes:
        seed: the run's.
        stage: names the stage.
        round: the round, from 0.
        clients: keys of the tile's clients.
        split: where the summed part of a row begins that enters the stage; None: it has none.
    """

    seed: int
    stage: str
    round: int
    clients: NDArray[np.uint64]
    split: int | None = None

    def uniform(self, purpose: str, count: int, begin: int = 0) -> Tensor:
        """Uniform numbers in [0, 1) of each client, 24 bits each: [C, count] float32.

        Args:
            purpose: what they are for.
            count: how many.
            begin: the place of the first one, a multiple of 8; number `begin + j` is the same whatever `begin` is.
        """
        words = random.stretch(self._key(purpose), self.round, self.clients, -(-count // 2), begin // 2)
        drawn = words.astype("<u8", copy=False).view("<u4")[:, :count] >> np.uint32(8)
        return torch.from_numpy(drawn.view(np.int32)).to(torch.float32).mul_(2.0**-24)

    def signs(self, purpose: str, count: int, begin: int = 0) -> Tensor:
        """Random signs of each client, -1 or 1: [C, count] float32; `begin` as of `uniform`, a multiple of 256."""
        words = random.stretch(self._key(purpose), self.round, self.clients, -(-count // 64), begin // 64)
        bits = torch.from_numpy(words.astype("<u8", copy=False).view(np.uint8))
        return unpack_values(bits, 1, count, torch.tensor([-1.0, 1.0]))

    def _key(self, purpose: str) -> int:
        return random.key(self.seed, self.stage, purpose)

    def of(self, rows: slice) -> "Keys":
        """Those of some of the tile's rows."""
        return Keys(self.seed, self.stage, self.round, self.clients[rows], self.split)

    @property
    def common(self) -> "Keys":
        """The same for everybody in the round, as of a single client."""
        return Keys(self.seed, self.stage, self.round, np.zeros(1, dtype=np.uint64), self.split)


def _stateless(size: int) -> None:
    return None


def _same(state: Any) -> Any:
    return state


def _keep(state: Any, aggregate: Any) -> Any:
    return state


def _no_memory(size: int) -> dict[str, Tensor]:
    return {}


def _as_long(length: int, split: int) -> tuple[int, int]:
    return length, split


def _no_codes(length: int, split: int) -> Form:
    return {}


@dataclass(frozen=True, slots=True)
class Transform:
    """A stage of the pipeline, as pure functions and facts.

    Attributes:
        spec: name and arguments.
        encode: client half: (rows, memory rows, shared, keys) -> (wire, memory rows).
        decode_each: server half on clients' rows: (codes, shared, length L that entered, keys) -> rows; what left the
            stage as rows is called "rows" among the codes. None: nothing to undo.
        decode_sum: server half on a weighted sum of rows: (sum [L'], shared, length L, keys) -> sum [L]; None: nothing
            to undo, or only on each row.
        init: (L) -> server state.
        share: (state) -> what clients must know.
        update: (state, aggregate) -> state after the round.
        settle: (server state, combined row [L], cohort / population) -> (row for the algorithm, state); None: the row
            as it is. The row holds the mean of the averaged part and the sum of the summed part.
        memory: (L) -> a client's memory at its first visit.
        size: (length, split) of what enters -> of the rows that leave.
        codes: (length, split) of what enters -> what a client sends beside the rows that leave.
        gives: "rows", or "codes" when only `decode_each` can read what leaves the stage.
        sums: whether the sum of what leaves the stage tells the sum of what entered it.
        unbiased: whether the decoded row has the row that entered as its expectation.
        lossless: whether the decoded row is the row that entered.
        aligned: whether number j of the rows that leave is number j of those that entered, in every round.
        feedback: whether it remembers what is lost, so that nothing lossy may stand behind it.
        contracts: whether the error is shorter than the row by a factor, so that `error_feedback` can hold it.
        bound: (L2 bound on what enters or None) -> L2 bound on what the server decodes or None.
        fixed_size: whether the bytes do not depend on the values.
        randomness: "none"; "shared" when the server draws the same to decode; "private" when it need not.
        judge: (rows [C, L] as the server reads them, whether all that a client reports is finite [C]) -> why each is
            left out of the round, "" for none; None: the stage takes everybody's.
        bind: (layout of the averaged parameters) -> the stage for it; None: it needs to know of none.
        coder: what codes all that leaves the stages before it, byte by byte; None: it is a stage on rows.
        noise: what is added to the sum of the rows that leave the stage, before the server decodes it any further.
        learn: (server state, sum of the rows that left the stage, expected cohort) -> state after the round, for stages
            whose rows carry more than the row that entered.
        integers: the rows that leave are int64 and may be added up modulo 2^integers; None: they are numbers.
        scale: (L2 norms of the rows that enter [C, 1] float64) -> factors [C, 1], where `encode` does no more than
            multiply rows by these and the server undoes nothing; None: it does something else.
        check: refuses a cohort of so many clients before any work, by raising CompositionError.
        client_noise: what clients add to their rows in this stage, for their privacy.
        calibrate: (noise multiplier) -> the stage with it, where an epsilon was asked for.
    """

    spec: Spec
    encode: Callable[[Any, dict[str, Tensor], Any, Keys], tuple[Wire, dict[str, Tensor]]]
    decode_each: Callable[[Codes, Any, int, Keys], Tensor] | None = None
    decode_sum: Callable[[Tensor, Any, int, Keys], Tensor] | None = None
    init: Callable[[int], Any] = _stateless
    share: Callable[[Any], Any] = _same
    update: Callable[[Any, Any], Any] = _keep
    settle: Callable[[Any, Tensor, float], tuple[Tensor, Any]] | None = None
    memory: Callable[[int], dict[str, Tensor]] = _no_memory
    size: Callable[[int, int], tuple[int, int]] = _as_long
    codes: Callable[[int, int], Form] = _no_codes
    gives: Literal["rows", "codes"] = "rows"
    sums: bool = True
    unbiased: bool = True
    lossless: bool = False
    aligned: bool = True
    feedback: bool = False
    contracts: bool = True
    bound: Callable[[float | None], float | None] = lambda bound: bound
    fixed_size: bool = True
    randomness: Literal["none", "shared", "private"] = "none"
    judge: Callable[[Tensor, Tensor], Sequence[str]] | None = None
    bind: "Callable[[Layout], Transform] | None" = None
    coder: Coder | None = None
    noise: Noise | None = None
    learn: Callable[[Any, Tensor, float], Any] | None = None
    integers: int | None = None
    scale: Callable[[Tensor], Tensor] | None = None
    check: Callable[[int], None] = lambda count: None
    client_noise: ClientNoise | None = None
    calibrate: "Callable[[float], Transform] | None" = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.spec["name"])

    @property
    def protects(self) -> bool:
        """Whether it stands for noise that hides what a client sends."""
        return self.noise is not None or self.client_noise is not None

    @property
    def remembers(self) -> bool:
        """Whether clients keep something for it."""
        return bool(self.memory(1))


def as_it_is(rows: Tensor, memory: dict[str, Tensor], shared: Any, keys: Keys) -> tuple[Wire, dict[str, Tensor]]:
    """The client half of a stage that leaves rows alone."""
    return rows, memory
