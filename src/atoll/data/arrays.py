"""From whatever a caller holds (arrays, lists, tensors, torch datasets) to named tensors with one row per example.

Numbers from numpy and lists are stored as float32, labels as int64; a floating torch tensor keeps its dtype.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from atoll.errors import DataError

TARGET = "y"

GROUP = "cut_group"
"""A field int64 [n] that numbers what belongs together (the windows of one recording, the pictures of one track): cuts
into training, validation and test keep it in one piece."""


def fields_of(value: Any, where: str) -> dict[str, Tensor]:
    """Turn one owner's examples into named tensors of equal length.

    Args:
        value: a tuple (x, y) or a mapping of field names to arrays, each [n, ...].
        where: whose examples these are, for the error messages.

    Returns:
        The fields, each [n, ...], in the order given.

    Raises:
        DataError: when the value has another form, a field cannot be a tensor, or lengths differ.
    """
    if isinstance(value, Mapping):
        named = cast(Mapping[Any, Any], value)
    elif isinstance(value, tuple) and len(cast(tuple[Any, ...], value)) == 2:
        named = dict(zip(("x", TARGET), cast(tuple[Any, Any], value), strict=True))
    else:
        raise DataError(
            f"{where}: examples must be a tuple (x, y) or a mapping of field names to arrays, got "
            f"{type(cast(object, value)).__name__}. Pass arrays with one row per example."
        )
    if not named:
        raise DataError(f"{where}: the mapping of fields is empty. Give at least one field, such as 'x'.")
    fields: dict[str, Tensor] = {}
    for name, array in named.items():
        if not isinstance(name, str):
            raise DataError(f"{where}: field names must be strings, got {name!r}.")
        fields[name] = tensor_of(array, name, where)
    lengths = {name: len(tensor) for name, tensor in fields.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise DataError(
            f"{where}: fields of different lengths: {listed}. Every field needs one row per example; "
            "check that features and targets come from the same rows."
        )
    return fields


def tensor_of(value: object, field: str, where: str) -> Tensor:
    """Turn one field into a tensor [n, ...] with the stored dtype.

    Args:
        value: a tensor, array, frame, series or nested list.
        field: the field's name; integers and booleans of "y" become int64.
        where: whose field this is, for the error messages.

    Returns:
        The tensor; memory is shared with the input where no conversion is needed.

    Raises:
        DataError: when the value is ragged, not numeric, or a single number.
    """
    tensor = value.detach() if isinstance(value, Tensor) else _from_numpy(value, field, where)
    if tensor.ndim == 0:
        raise DataError(f"{where}, field {field!r}: a single number, not one row per example. Wrap it in a list.")
    if field == TARGET and not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.to(torch.int64)
    return tensor


def _from_numpy(value: object, field: str, where: str) -> Tensor:
    try:
        array = np.asarray(_listed(value))
    except ValueError as error:
        raise DataError(
            f"{where}, field {field!r}: the rows have different shapes ({error}). Pad or cut them to one shape."
        ) from error
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64, copy=False)
    elif array.dtype.kind not in "biuf":
        raise DataError(
            f"{where}, field {field!r}: values of dtype {array.dtype} are not numbers "
            f"(first: {_first(array)!r}). Encode text and categories first, or read the table with "
            "FederatedDataset.from_frame, which does so."
        )
    # torch takes neither read-only memory nor negative strides; a 0-d array must stay one to be refused.
    return torch.as_tensor(array if array.flags.writeable and array.flags.c_contiguous else array.copy())


def _listed(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(cast(list[Any], value)[0], Tensor):
        return [np.asarray(item) for item in cast(list[Any], value)]
    return cast(Any, value)


def _first(array: np.ndarray[Any, Any]) -> object:
    return array.reshape(-1)[0] if array.size else None


def stack_items(dataset: Any, where: str) -> dict[str, Tensor]:
    """Read a torch map-style dataset into named tensors.

    Args:
        dataset: has `__len__` and `__getitem__`; items are (x, y) or mappings of named values.
        where: whose dataset this is, for the error messages.

    Returns:
        The fields, each [n, ...].

    Raises:
        DataError: when it is not map-style, is empty, or its items differ in form.
    """
    tensors = getattr(dataset, "tensors", None)
    if isinstance(tensors, tuple) and len(cast(tuple[object, ...], tensors)) == 2:
        return fields_of(cast(object, tensors), where)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{where}: {type(dataset).__name__} is not a map-style dataset (it lacks __len__ or __getitem__). "
            "Read an iterable dataset into arrays and use FederatedDataset.from_arrays."
        )
    count = len(dataset)
    if count == 0:
        raise DataError(f"{where}: the torch dataset is empty. Leave this client out.")
    columns: dict[str, list[object]] = {}
    for position in range(count):
        item: Any = dataset[position]
        if isinstance(item, Mapping):
            named = {str(key): entry for key, entry in cast(Mapping[Any, Any], item).items()}
        elif isinstance(item, Sequence) and len(cast(Sequence[Any], item)) == 2:
            named = dict(zip(("x", TARGET), cast(Sequence[Any], item), strict=True))
        else:
            raise DataError(
                f"{where}: item {position} is a {type(cast(object, item)).__name__}; items must be (x, y) or a "
                "mapping of named values."
            )
        if position and named.keys() != columns.keys():
            raise DataError(
                f"{where}: item {position} has fields {sorted(named)}, item 0 has {sorted(columns)}. "
                "Every item needs the same fields."
            )
        for name, entry in named.items():
            columns.setdefault(name, []).append(entry)
    return {name: _stacked(entries, name, where) for name, entries in columns.items()}


def _stacked(entries: list[object], field: str, where: str) -> Tensor:
    if not all(isinstance(entry, Tensor) for entry in entries):
        return tensor_of([np.asarray(entry) for entry in entries], field, where)
    try:
        return tensor_of(torch.stack(cast(list[Tensor], entries)), field, where)
    except RuntimeError as error:
        raise DataError(f"{where}, field {field!r}: items have different shapes. Pad or cut them to one.") from error
