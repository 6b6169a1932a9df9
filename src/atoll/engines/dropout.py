"""Dropout whose masks are keyed by (seed, purpose, round, client, step), so that every engine draws the same ones."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atoll import random

# Axes of one example that share a draw: whole channels are dropped by the feature-wise kinds.
_KINDS: dict[Callable[..., Tensor], int | None] = {
    functional.dropout: None,
    functional.dropout1d: 1,
    functional.dropout2d: 2,
    functional.dropout3d: 3,
}


class KeyedDropout(TorchFunctionMode):
    """While active, `functional.dropout` and its feature-wise kinds take their masks from keyed randomness.

    Args:
        seed: the experiment's seed.
        purpose: what is trained.
        round: the round.
        clients: keys of the rows' clients, uint64 [C].
        steps: local step of each row, int64 [C].
        row: number of the row a batched call works on (a batched scalar under vmap); "all" when tensors have the rows
            as first axis; None for a single row without that axis.
    """

    def __init__(
        self,
        seed: int,
        purpose: str,
        round: int,
        clients: NDArray[np.uint64],
        steps: NDArray[np.int64],
        row: Tensor | Literal["all"] | None = None,
    ) -> None:
        super().__init__()
        self._key = (seed, "dropout", purpose, round)
        self._clients = clients
        self._steps = steps.astype(np.uint64)
        self.row = row
        self.calls = 0

    @property
    def _all(self) -> bool:
        return isinstance(self.row, str)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _KINDS:
            return func(*args, **(kwargs or {}))
        return self._drop(_KINDS[func], *args, **(kwargs or {}))

    def _drop(
        self, spatial: int | None, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        own_shape = input.shape[1:] if self._all else input.shape
        shape = own_shape if spatial is None else (*own_shape[:-spatial], *(1,) * spatial)
        count = int(np.prod(shape))
        purpose = random.key(*self._key, self.calls)
        self.calls += 1
        drawn = random.uniforms(purpose, self._steps, self._clients, count).to(input.device)
        mask = (drawn >= p).to(input.dtype).div_(max(1.0 - p, torch.finfo(input.dtype).tiny)).view(-1, *shape)
        if isinstance(self.row, Tensor):
            own = mask.index_select(0, self.row.view(1)).squeeze(0)
        else:
            own = mask if self._all else mask[0]
        return input.mul_(own) if inplace else input * own


class SeededDraws:
    """Keys torch's own generator for code that draws from it, and puts its state back afterwards."""

    def __init__(self, seed: int, purpose: str, round: int, client: int, step: int) -> None:
        self._seed = random.key(seed, "draws", purpose, round, client, step) & 0x7FFFFFFFFFFFFFFF

    def __enter__(self) -> None:
        self._before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.default_generator.set_state(self._before)
