"""A device for tests where there is no other: its tensors lie in the CPU's memory, but behave as those of a GPU do.

An operation on tensors of both devices is an error, as it is there (numbers, which have no axes, may be mixed). What
makes the program wait for the device is counted: numbers that are looked at, and tensors that are copied back.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "standin"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor of the device; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        """A tensor that looks like `held`."""
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def new_tensor(self, data: Any) -> Tensor:  # torch's own makes it below what a mode sees
        return torch.tensor(data, dtype=self.dtype).to(DEVICE)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor of another device has no numpy array")


class Waits:
    """How often the program had to wait for the device."""

    looked = 0
    copied = 0


_waits = Waits()
_RETURNS = (aten._to_copy.default, aten.copy_.default)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    seen: list[Tensor] = []
    tree_map(lambda v: seen.append(v) if isinstance(v, Tensor) else None, (args, kwargs))
    there = [t for t in seen if isinstance(t, OnDevice)]
    here = [t for t in seen if not isinstance(t, OnDevice) and t.ndim]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if func is aten._local_scalar_dense.default and there:
        _waits.looked += 1
    moves = func in _RETURNS
    if moves and there and ((asked is not None and asked.type == "cpu") or (here and here[0] is args[0])):
        _waits.copied += 1
    if there and here and not moves:
        raise RuntimeError(f"{func}: tensors of the CPU and of {DEVICE}")
    on_device = bool(there) if asked is None else asked.type == NAME
    if func is aten.copy_.default:
        on_device = isinstance(args[0], OnDevice)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain = tree_map(lambda v: v.held if isinstance(v, OnDevice) else v, (args, kwargs))
    if func is aten._to_copy.default and asked is not None:
        found = plain_args[0].to(dtype=plain.get("dtype") or plain_args[0].dtype, copy=True)
    else:
        found = func(*plain_args, **plain)
    own = {id(t.held): t for t in there}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnDevice):
            return value
        if not on_device:
            return value
        return own[id(value)] if id(value) in own else OnDevice(value)

    return tree_map(back, found)


class _Mode(TorchDispatchMode):
    """Sends what is made on the device, or from tensors of it, to it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be told of this mode, torch's compiler would have to be imported, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def standin() -> Generator[Waits]:
    """The device, while this lasts; gives what is counted."""
    _waits.looked = _waits.copied = 0
    with _Mode():
        yield _waits
