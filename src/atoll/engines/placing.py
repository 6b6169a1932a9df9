"""Training on another device than the CPU: what goes there, and what comes back.

Packed examples go there once and stay; they are gathered there. A round's task goes there once. Of a tile only what the
server adds up comes back, and what its clients remember. The order of examples, dropout and all other keyed randomness
are drawn on the CPU, as ever, and sent: draws are the same wherever a run trains. Evaluation, client memory and the
server's step stay on the CPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoll.data import FederatedDataset
from atoll.errors import CompositionError, RunError, invalid
from atoll.messages import Partial, Task
from atoll.model import Model
from atoll.tree import moved

if TYPE_CHECKING:
    from atoll.rounds import Process

CPU = torch.device("cpu")

KINDS: dict[str, Callable[[], bool]] = {"cpu": lambda: True, "cuda": torch.cuda.is_available}
"""Devices that can be asked for, and whether they are there."""


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by `device=`.

    Raises:
        InvalidArgument: an unknown kind of device, or one that is not there.
    """
    if device == "auto":
        return CPU
    allowed = '"auto", "cpu", "cuda" or "cuda:N"'
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise invalid("device", device, allowed) from error
    if found.type not in KINDS:
        raise invalid("device", str(device), allowed)
    if not KINDS[found.type]():
        raise invalid("device", str(device), '"cpu" on this machine, where torch finds no such device')
    return found


class Placed:
    """A process's tasks and data on a device.

    Args:
        device: where to train.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._data: tuple[FederatedDataset, FederatedDataset] | None = None
        self._task: tuple[Task, Task] | None = None

    def check(self, process: "Process") -> None:
        """Refuse what cannot train there.

        Raises:
            CompositionError: with the reason and the way out.
        """
        _check_constants(process.model, self.device)
        if process.protects_examples:
            raise CompositionError(
                f"device={str(self.device)!r} cannot stand beside example-level privacy yet, whose noise and sums are "
                'made on the CPU: use device="cpu".'
            )

    def exactly(self) -> AbstractContextManager[object]:
        """While active, convolutions there are in the precision they are given in, by algorithms that repeat.

        Left alone, cuDNN rounds factors of single precision to 10 bits (TF32), and chooses algorithms by timing.
        """
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)

    def data(self, data: FederatedDataset) -> FederatedDataset:
        """The same clients with their training examples there: of the data asked for last, copied once."""
        if self._data is None or self._data[0] is not data:
            self._data = None  # what is there makes room first
            try:
                there = data.train.to(self.device)
            except torch.OutOfMemoryError as error:
                size = sum(t.nbytes for t in data.train.fields.values())
                raise RunError(
                    f"the training examples ({size:,} bytes) do not fit into the memory of {self.device}: use "
                    'device="cpu", or smaller fields (images as uint8, scaled by the model).'
                ) from error
            self._data = data, FederatedDataset(data.clients, there)
        return self._data[1]

    def task(self, task: Task) -> Task:
        """The same task with its tensors there."""
        if self._task is None or self._task[0] is not task:
            tree = {"message": task.message, "buffers": task.buffers, "private": task.private, "shared": task.shared}
            self._task = task, replace(task, **moved(tree, self.device))
        return self._task[1]

    def rest(self) -> None:
        """Forget the round's task."""
        self._task = None

    def home(self, partial: Partial) -> Partial:
        """A tile's partial on the CPU."""

        def back(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.cpu()

        codes = None if partial.codes is None else {n: t.cpu() for n, t in partial.codes.items()}
        return replace(
            partial, total=back(partial.total), rows=back(partial.rows), codes=codes, weight=partial.weight.cpu(),
            metrics=partial.metrics.cpu(),
        )  # fmt: skip


def _check_constants(model: Model, device: torch.device) -> None:
    held = list(model.constants())
    if held:
        raise CompositionError(
            f"device={str(device)!r} cannot train a model with frozen parameters or fixed buffers yet ({held[0]}), "
            'which stay on the CPU: use device="cpu".'
        )
