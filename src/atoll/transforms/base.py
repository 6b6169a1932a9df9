"""The transform record: a stage of the update pipeline with a client half and a server half.

What leaves a client is one row `[L]`: the averaged part, averaged buffers and the summed part, one after the other.
Client halves run in order, server halves in reverse. Each stage declares facts; `Chain` checks them when it is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.privacy.noise import Noise
from atoll.spec import Spec

Codes = Mapping[str, Tensor]
"""An encoded tile: named tensors whose first axis is the client. What is called "rows" goes on to the next stage."""

Wire = Tensor | Codes
"""What leaves a stage: rows [C, L], or codes."""


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

    def uniform(self, purpose: str, count: int) -> Tensor:
        """Uniform numbers in [0, 1) of each client: [C, count] float32."""
        return random.uniforms(random.key(self.seed, self.stage, purpose), self.round, self.clients, count)

    def signs(self, purpose: str, count: int) -> Tensor:
        """Random signs of each client: [C, count] float32, -1 or 1."""
        words = random.words(random.key(self.seed, self.stage, purpose), self.round, self.clients, -(-count // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, count=count)
        return torch.from_numpy(bits).to(torch.float32).mul_(2).sub_(1)

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


def _no_bytes(length: int, split: int, item: int) -> int:
    return 0


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
        bytes: (length, split, bytes of a number) of what enters -> bytes a client sends beside the rows that leave.
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
        noise: what is added to the sum of the rows that leave the stage, before the server decodes it any further.
        learn: (server state, sum of the rows that left the stage, expected cohort) -> state after the round, for stages
            whose rows carry more than the row that entered.
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
    bytes: Callable[[int, int, int], int] = _no_bytes
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
    noise: Noise | None = None
    learn: Callable[[Any, Tensor, float], Any] | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.spec["name"])

    @property
    def remembers(self) -> bool:
        """Whether clients keep something for it."""
        return bool(self.memory(1))
