"""The transform record: a stage of the update pipeline with a client half and a server half.

What leaves a client is one row `[L]`: the averaged part, averaged buffers and the summed part, one after the other.
Client halves run in order, server halves in reverse. Each stage declares facts; `Chain` checks them when it is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atoll import random
from atoll.spec import Spec

Codes = Mapping[str, Tensor]
"""An encoded tile: named tensors whose first axis is the client."""

Wire = Tensor | Codes
"""What travels between two stages: rows [C, L], or codes."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Keyed randomness of one stage for a tile of clients in a round."""

    seed: int
    stage: str
    round: int
    clients: NDArray[np.uint64]

    def uniform(self, purpose: str, count: int) -> Tensor:
        """Uniform numbers in [0, 1) of each client: [C, count] float32."""
        return random.uniforms(random.key(self.seed, self.stage, purpose), self.round, self.clients, count)


def _stateless(size: int) -> None:
    return None


def _same(state: Any) -> Any:
    return state


def _keep(state: Any, aggregate: Any) -> Any:
    return state


def _no_memory(size: int) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True)
class Transform:
    """A stage of the pipeline, as pure functions and facts.

    Attributes:
        spec: name and arguments.
        encode: client half: (wire, memory rows, shared, keys) -> (wire, memory rows).
        decode_each: server half on one client's row: (codes, shared, length L) -> rows; None: nothing to undo.
        decode_sum: server half on a weighted sum of rows: (sum [L], shared) -> sum [L]; None: nothing to undo.
        init: (L) -> server state.
        share: (state) -> what clients must know.
        update: (state, aggregate) -> state after the round.
        memory: (L) -> a client's memory at its first visit.
        gives: "rows", or "codes" when only `decode_each` can read what leaves the stage.
        sums: whether the sum of what leaves the stage tells the sum of what entered it.
        unbiased: whether the decoded row has the row that entered as its expectation.
        bound: (L2 bound on what enters or None) -> L2 bound on what leaves or None.
        fixed_size: whether the bytes do not depend on the values.
    """

    spec: Spec
    encode: Callable[[Any, dict[str, Tensor], Any, Keys], tuple[Wire, dict[str, Tensor]]]
    decode_each: Callable[[Codes, Any, int], Tensor] | None = None
    decode_sum: Callable[[Tensor, Any], Tensor] | None = None
    init: Callable[[int], Any] = _stateless
    share: Callable[[Any], Any] = _same
    update: Callable[[Any, Any], Any] = _keep
    memory: Callable[[int], dict[str, Tensor]] = _no_memory
    gives: Literal["rows", "codes"] = "rows"
    sums: bool = True
    unbiased: bool = True
    bound: Callable[[float | None], float | None] = lambda bound: bound
    fixed_size: bool = True

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.spec["name"])
