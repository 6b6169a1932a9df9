"""Records of tensors and numbers as flat maps: what states and messages are made of, counted and stored."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch

from atoll.errors import RunError

Leaf = torch.Tensor | int | float | bool | str | None


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every leaf of nested named tuples, dataclasses, tuples, lists and mappings, with its path."""
    if tree is None or isinstance(tree, torch.Tensor | int | float | bool | str):
        yield path, tree
        return
    for name, child in _children(tree):
        yield from leaves(child, f"{path}/{name}" if path else name)


def rebuild(template: Any, values: Mapping[str, Leaf], path: str = "") -> Any:
    """A tree of the template's structure with the leaves given by path.

    Raises:
        RunError: a leaf is missing, or a tensor has another shape or dtype than the template's.
    """
    if template is None or isinstance(template, torch.Tensor | int | float | bool | str):
        if path not in values:
            raise RunError(f"stored state lacks {path!r}: it was written by another experiment or version.")
        value = values[path]
        if isinstance(template, torch.Tensor):
            if not isinstance(value, torch.Tensor) or value.shape != template.shape or value.dtype != template.dtype:
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
                raise RunError(
                    f"stored {path!r} is {found}, but this experiment needs {tuple(template.shape)} {template.dtype}."
                )
            return value.to(template.device)
        return value
    return _like(template, {n: rebuild(c, values, f"{path}/{n}" if path else n) for n, c in _children(template)})


def moved(tree: Any, device: torch.device) -> Any:
    """The same tree with its tensors on a device."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if tree is None or isinstance(tree, int | float | bool | str):
        return tree
    return _like(tree, {n: moved(c, device) for n, c in _children(tree)})


def _like(template: Any, built: dict[str, Any]) -> Any:
    """A record of the template's kind, of these children."""
    if isinstance(template, Mapping):
        return built
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(**built)
    if isinstance(template, list | tuple):
        return type(cast(tuple[Any, ...], template))(built.values())
    return replace(template, **built)


def nbytes(tree: Any) -> int:
    """Bytes of a tree's tensors, and eight for each number."""
    total = 0
    for _, leaf in leaves(tree):
        if isinstance(leaf, torch.Tensor):
            total += leaf.numel() * leaf.element_size()
        elif isinstance(leaf, int | float):
            total += 8
    return total


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [(str(k), v) for k, v in cast(Mapping[str, Any], tree).items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return [(n, getattr(tree, n)) for n in cast(tuple[str, ...], tree._fields)]  # pyright: ignore
    if isinstance(tree, list | tuple):
        return [(str(i), v) for i, v in enumerate(cast(tuple[Any, ...], tree))]
    if is_dataclass(tree):
        return [(f.name, getattr(tree, f.name)) for f in fields(tree)]
    raise TypeError(f"{type(tree).__name__} cannot be part of a state or a message: use tensors, numbers and records")
