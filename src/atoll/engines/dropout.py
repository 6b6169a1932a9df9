"""Dropout whose masks are keyed by (seed, purpose, round, client, step), so that every engine draws the same ones."""

import random as python_random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

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


class Draw:
    """Dropout masks of rows: each call takes the next purpose, so that the same forward takes the same masks.

    Args:
        seed: the experiment's seed.
        purpose: what is trained.
        round: the round.
        clients: keys of the rows' clients, uint64 [C].
        steps: local step of each row, int64 [C].
    """

    def __init__(
        self, seed: int, purpose: str, round: int, clients: NDArray[np.uint64], steps: NDArray[np.int64]
    ) -> None:
        self.seed, self.purpose, self.round, self.clients, self.steps = seed, purpose, round, clients, steps
        self.calls = 0

    def masks(self, shape: Sequence[int], p: float, spatial: int | None, like: Tensor) -> Tensor:
        """The next masks [C, ...]: 0, or 1 / (1 - p) for what stays.

        Args:
            shape: of one row's input [b, ...].
            p: probability of a 0.
            spatial: axes of one example that share a draw; None: none.
            like: for dtype, which is single precision at least, and device.
        """
        drawn_shape = tuple(shape) if spatial is None else (*shape[:-spatial], *(1,) * spatial)
        purpose = random.key(self.seed, "dropout", self.purpose, self.round, self.calls)
        self.calls += 1
        drawn = random.uniforms(purpose, self.steps.astype(np.uint64), self.clients, int(np.prod(drawn_shape)))
        dtype = torch.promote_types(like.dtype, torch.float32)  # in lower precision 1 / (1 - p) would be another number
        mask = (drawn.to(like.device) >= p).to(dtype).div_(max(1.0 - p, torch.finfo(dtype).tiny))
        return mask.view(-1, *drawn_shape)


class KeyedDropout(TorchFunctionMode):
    """While active, `functional.dropout` and its feature-wise kinds take their masks from a draw.

    Args:
        draw: of the rows.
        row: number of the row a batched call works on (a batched scalar under vmap); None: a single row.
    """

    def __init__(self, draw: Draw, row: Tensor | None = None) -> None:
        super().__init__()
        self.draw = draw
        self.row = row

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
        masks = self.draw.masks(input.shape, p, spatial, input)
        own = masks[0] if self.row is None else masks.index_select(0, self.row.view(1)).squeeze(0)
        return input.mul_(own) if inplace else (input * own).to(input.dtype)


class SeededDraws:
    """Keys the generators that code draws from unasked, torch's, numpy's and Python's own, and puts them back."""

    def __init__(self, seed: int, purpose: str, round: int, client: int, step: int) -> None:
        self._seed = random.key(seed, "draws", purpose, round, client, step) & 0x7FFFFFFFFFFFFFFF

    def __enter__(self) -> None:
        self._before = states()
        torch.default_generator.manual_seed(self._seed)
        python_random.seed(self._seed)
        np.random.seed(self._seed & 0xFFFFFFFF)  # noqa: NPY002 - the generator a module may draw from

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore(self._before)


def states() -> tuple[Tensor, Any, Any]:
    """States of the generators that code draws from unasked."""
    return torch.default_generator.get_state(), np.random.get_state(), python_random.getstate()  # noqa: NPY002


def restore(before: tuple[Tensor, Any, Any]) -> None:
    """Put these states back."""
    torch.default_generator.set_state(before[0])
    np.random.set_state(before[1])  # noqa: NPY002
    python_random.setstate(before[2])


def drawn_since(before: tuple[Tensor, Any, Any]) -> bool:
    """Whether one of the generators has been drawn from since."""
    torch_now, numpy_now, python_now = states()
    same_numpy = all(np.array_equal(a, b) for a, b in zip(before[1], numpy_now, strict=True))
    return not (torch.equal(before[0], torch_now) and same_numpy and before[2] == python_now)
