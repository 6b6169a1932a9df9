"""Specs: what a part of an experiment is, as plain JSON, so that runs can be resumed, compared and approved by it."""

import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any, cast

import numpy as np
import torch

Spec = dict[str, Any]
"""A JSON object with a `name` and the arguments the part was built with."""


def record(name: str, /, **arguments: object) -> Spec:
    """The spec of something built by calling `name` with these arguments."""
    return {"name": name, **{k: canonical(v) for k, v in arguments.items()}}


TOLD: tuple[type, ...] = (
    bool, int, float, str, torch.Tensor, np.ndarray, np.generic, tuple, list, Mapping, set, frozenset
)  # fmt: skip
"""What is told of the values a callable reads or an object holds."""

_WITHIN: ContextVar[frozenset[int]] = ContextVar("within", default=frozenset[int]())
"""Containers and callables that are being told: they may hold each other in a circle."""


def canonical(value: object) -> Any:
    """A JSON form of an argument: parts by their own spec, callables by source hash, tensors by content hash."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return canonical(value.item())
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype), "blake2b": digest(value)}
    return _once(value, _compound)


def _once(value: object, tell: Callable[[Any], Any]) -> Any:
    """What is told of a value; of one that is being told already, that there is a circle."""
    within = _WITHIN.get()
    if id(value) in within:
        return {"circle": type(value).__qualname__}
    token = _WITHIN.set(within | {id(value)})
    try:
        return tell(value)
    finally:
        _WITHIN.reset(token)


def _compound(value: object) -> Any:
    if isinstance(value, Mapping):
        return {_key(k): canonical(v) for k, v in cast(Mapping[object, object], value).items()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in cast(tuple[object, ...], value)]
    if isinstance(value, set | frozenset):
        return sorted(
            (canonical(v) for v in cast(frozenset[object], value)), key=lambda v: json.dumps(v, sort_keys=True)
        )
    own = getattr(value, "spec", None)
    if isinstance(own, dict):
        return cast(Spec, own)
    if is_dataclass(value) and not isinstance(value, type):
        return record(type(value).__qualname__, **{f.name: getattr(value, f.name) for f in fields(value)})
    if isinstance(value, functools.partial):
        return record("partial", function=value.func, arguments=value.args, keywords=value.keywords)
    if callable(value):
        return _callable(value)
    return {"object": type(value).__qualname__}


def _key(key: object) -> str:
    """A mapping's key as text; a container by its contents, since sets have no order of their own."""
    return json.dumps(canonical(key), sort_keys=True) if isinstance(key, tuple | frozenset) else str(key)


def _callable(value: Any) -> Spec:
    told: Spec = {"callable": getattr(value, "__qualname__", type(value).__qualname__), "source": source_hash(value)}
    if inspect.ismethod(value):
        told["of"] = _once(value.__self__, attributes)
    elif inspect.isfunction(value):
        defaults = {"positional": value.__defaults__, "keyword": value.__kwdefaults__}
        told |= {n: canonical(d) for n, d in defaults.items() if d}
    elif not inspect.isroutine(value) and not inspect.isclass(value):
        told["of"] = attributes(value)
    return told


def attributes(holder: object, *, values: bool = True) -> Any:
    """What an object holds that a spec can tell: numbers, texts, tensors and containers, not other objects.

    Args:
        holder: the object.
        values: whether a module's parameters and buffers are told.
    """
    own = getattr(holder, "spec", None)
    if isinstance(own, dict):
        return cast(Spec, own)
    held = {n: v for n, v in getattr(holder, "__dict__", {}).items() if v is None or isinstance(v, TOLD)}
    if isinstance(holder, torch.nn.Module):
        held = {n: v for n, v in held.items() if n not in vars(torch.nn.Module())}
        told, left = holder.state_dict(), set[str]()
        if not values:
            named = (holder.named_parameters(remove_duplicate=False), holder.named_buffers(remove_duplicate=False))
            left = {n for tensors in named for n, _ in tensors}
        held |= {"repr": repr(holder), **{n: v for n, v in told.items() if n not in left}}  # else a layer's extra state
    return record(type(holder).__qualname__, **held)


def source_hash(code: object) -> str | None:
    """BLAKE2b of a callable's or class's source text and of what its closure holds; None where there is no source."""
    target = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    try:
        text: str | None = inspect.getsource(target)
    except (OSError, TypeError):
        text = None
    # A held function is told by its own source alone: functions may hold each other in a circle.
    held = [_held(cell) for cell in getattr(code, "__closure__", None) or ()]
    compiled = getattr(inspect.unwrap(code) if callable(code) else code, "__code__", None)
    if isinstance(compiled, types.CodeType):
        outside = getattr(code, "__globals__", {})
        names = {n: outside[n] for n in _names(compiled) if isinstance(outside.get(n), TOLD)}
        held.append({n: canonical(v) for n, v in names.items()})
        # Several lambdas may stand on one line, and code typed at a prompt has no source: their bytecode tells them.
        if text is None or compiled.co_name == "<lambda>":
            held.append(_bytecode(compiled))
    elif text is None:
        return None
    return hashlib.blake2b(((text or "") + json.dumps(held, sort_keys=True)).encode(), digest_size=16).hexdigest()


def _names(code: types.CodeType) -> list[str]:
    """Names that code looks up, the functions and comprehensions in it included."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _bytecode(code: types.CodeType) -> list[Any]:
    inner = [_bytecode(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    plain = [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
    return [code.co_code.hex(), plain, list(code.co_names), inner]


def _held(cell: Any) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None
    if inspect.isroutine(value) and not hasattr(value, "spec"):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return getattr(value, "__qualname__", None)
    return canonical(value)


def digest(*tensors: torch.Tensor) -> str:
    """BLAKE2b of the contents of tensors, in order."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if flat.numel():
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def identity(spec: Spec) -> str:
    """BLAKE2b of a spec's canonical JSON."""
    return hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two specs differ, one line for each place: `algorithm.plan.lr: 0.1 != 0.2`."""
    if isinstance(left, dict) and isinstance(right, dict):
        a, b = cast(Spec, left), cast(Spec, right)
        lines: list[str] = []
        for name in dict.fromkeys([*a, *b]):
            where = f"{path}.{name}" if path else name
            if name not in a or name not in b:
                lines.append(f"{where}: only in the {'new' if name in b else 'old'} one")
            else:
                lines.extend(differences(a[name], b[name], where))
        return lines
    return [] if left == right else [f"{path}: {left!r} != {right!r}"]
