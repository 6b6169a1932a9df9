"""Packed examples: one tensor per field with all clients one after the other, and what is checked of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.arrays import GROUP, TARGET
from atoll.data.cutting import TEST, TRAIN, VALIDATION
from atoll.data.names import some
from atoll.errors import DataError, invalid


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The examples of all clients for one purpose, packed.

    Attributes:
        fields: one tensor [N, ...] per field, all clients one after the other.
        offsets: int64 [clients + 1] on the CPU; client i holds the rows from offsets[i] to offsets[i + 1].
    """

    fields: Mapping[str, Tensor]
    offsets: Tensor
    _sizes: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.fields:
            raise DataError("fields is empty: a split needs at least one field, such as 'x'.")
        lengths = {name: (len(tensor) if tensor.ndim else 0) for name, tensor in self.fields.items()}
        total = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            raise DataError(f"Fields of different lengths: {listed}. Every field needs one row per example.")
        offsets = torch.as_tensor(self.offsets, dtype=torch.int64, device="cpu")
        if offsets.ndim != 1 or len(offsets) == 0:
            raise invalid("offsets", tuple(offsets.shape), "of shape [clients + 1]")
        steps = offsets.diff()
        if int(offsets[0]) != 0 or int(offsets[-1]) != total:
            raise invalid(
                "offsets",
                (int(offsets[0]), int(offsets[-1])),
                f"0 at the start and the number of examples ({total}) at the end",
            )
        if len(steps) and int(steps.min()) < 0:
            place = int(steps.argmin())
            raise invalid("offsets", offsets[place : place + 2].numpy(), f"never decreasing (client {place})")
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "_sizes", steps)

    @property
    def sizes(self) -> Tensor:
        """Examples of each client: int64 [clients]; not to be written to."""
        return self._sizes

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def client(self, index: int) -> dict[str, Tensor]:
        """The examples of the client at a place in [0, clients), as views."""
        if not 0 <= index < len(self.offsets) - 1:
            raise invalid("index", index, f"in [0, {len(self.offsets) - 1})")
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return {name: tensor[start:stop] for name, tensor in self.fields.items()}

    def part(self, begin: int, end: int) -> "Split":
        """The clients at the places from begin to end, as views."""
        offsets = self.offsets[begin : end + 1]
        fields = {name: tensor[int(offsets[0]) : int(offsets[-1])] for name, tensor in self.fields.items()}
        return Split(fields, offsets - offsets[0])

    def to(self, device: torch.device | str) -> "Split":
        """The same split with its fields on a device; the offsets stay on the CPU."""
        return Split({name: tensor.to(device) for name, tensor in self.fields.items()}, self.offsets)

    def take(self, clients: Tensor) -> "Split":
        """The split of some clients, in the order given: int64 [k] places, gathered into new tensors."""
        sizes = self.sizes[clients]
        offsets = offsets_of(sizes)
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(sizes)
        rows = self.offsets[:-1][clients].repeat_interleave(sizes) + within
        return Split(gather(self.fields, rows), offsets)


def labels_of(fields: Mapping[str, Tensor], why: str) -> Tensor:
    """The integer labels int64 [N] of packed fields.

    Raises:
        DataError: when "y" is missing, not integer or not one label per example.
    """
    target = fields.get(TARGET)
    if target is None or target.ndim != 1 or target.is_floating_point() or target.is_complex():
        found = "missing" if target is None else f"{target.dtype} of shape {tuple(target.shape)}"
        raise DataError(
            f"{why} needs integer class labels: field 'y' is {found}. Pass labels as integers, one per example."
        )
    return target


def groups_of(fields: Mapping[str, Tensor]) -> NDArray[np.int64] | None:
    """What belongs together, int64 [N], by packed fields; None where every example stands for itself.

    Raises:
        DataError: when "cut_group" is not one integer per example.
    """
    group = fields.get(GROUP)
    if group is None:
        return None
    if group.ndim != 1 or group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise DataError(
            f"field 'cut_group' is {group.dtype} of shape {tuple(group.shape)}: it numbers what a cut keeps together. "
            "Give one integer per example, or name the field otherwise."
        )
    return group.cpu().numpy().astype(np.int64)


def gather(fields: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Rows int64 [k] of every field, in the order given."""
    return {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in fields.items()}


def divide(
    fields: Mapping[str, Tensor], offsets: Tensor, codes: NDArray[np.int8], order: Tensor | None = None
) -> dict[int, Split]:
    """Gather examples into training, validation and test.

    Args:
        fields: one tensor [N, ...] per field.
        offsets: int64 [clients + 1] of the packed order.
        codes: int8 [N] in the packed order, TRAIN, VALIDATION or TEST.
        order: int64 [N], which row of the fields stands at each packed place; None: they are packed already.

    Returns:
        A split for each of TRAIN, VALIDATION and TEST; the fields are returned as they are where nothing moves.
    """
    if order is None and not codes.any():
        empty = Split({name: tensor[:0] for name, tensor in fields.items()}, torch.zeros_like(offsets))
        return {TRAIN: Split(fields, offsets), VALIDATION: empty, TEST: empty}
    owner = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    out: dict[int, Split] = {}
    for code in (TRAIN, VALIDATION, TEST):
        packed = torch.as_tensor(np.flatnonzero(codes == code))
        sizes = torch.bincount(owner[packed], minlength=len(offsets) - 1)
        out[code] = Split(gather(fields, packed if order is None else order[packed]), offsets_of(sizes))
    return out


def offsets_of(sizes: Tensor) -> Tensor:
    """Where clients of these sizes begin: int64 [clients + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def check_finite(
    label: str,
    fields: Mapping[str, Tensor],
    offsets: Tensor | None,
    clients: Sequence[str],
    features: Sequence[str] = (),
) -> None:
    """Refuse NaN and infinite values.

    Args:
        label: which split these are.
        fields: one tensor [N, ...] per field.
        offsets: int64 [clients + 1]; None for examples that are nobody's.
        clients: the names.
        features: names of the columns of "x", for the message.

    Raises:
        DataError: naming the clients, the field, the columns and the remedy.
    """
    for name, tensor in fields.items():
        # A NaN or an infinity survives every sum, so a finite sum clears the field in one pass without a mask.
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
            continue
        bad = ~torch.isfinite(tensor)
        if not bool(bad.any()):
            continue
        rows = torch.nonzero(bad.reshape(len(tensor), -1).any(dim=1)).reshape(-1).cpu()
        where = "holdout"
        if offsets is not None:
            owners = np.unique(np.searchsorted(offsets.numpy(), rows.numpy(), side="right") - 1)
            where = some([clients[int(i)] for i in owners[:3]], len(owners), verb=False)
        column = ""
        if tensor.ndim == 2:
            columns = [int(c) for c in torch.nonzero(bad.any(dim=0)).reshape(-1)]
            shown = [f"{c} ({features[c]!r})" if c < len(features) else str(c) for c in columns]
            column = f", feature column {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}"
        raise DataError(
            f"{where}, {label} field {name!r}{column}: {int(bad.sum())} NaN or infinite values in {len(rows)} "
            "examples. Remove or impute them; FederatedDataset.from_frame imputes missing values by federated "
            "statistics."
        )


def same_fields(first: Mapping[str, Tensor], other: Mapping[str, Tensor], label: str, reference: str = "train") -> None:
    """Refuse examples whose fields, shapes of an example or dtypes differ from the first ones'.

    Raises:
        DataError: naming both, the field and what differs.
    """
    if first.keys() != other.keys():
        raise DataError(
            f"{label} has fields {sorted(other)}, {reference} has {sorted(first)}. All examples need the same fields."
        )
    for name, tensor in first.items():
        mine = other[name]
        if mine.shape[1:] != tensor.shape[1:] or mine.dtype != tensor.dtype:
            raise DataError(
                f"{label}, field {name!r}: shape [n, {', '.join(map(str, mine.shape[1:]))}] and dtype {mine.dtype}, "
                f"but {reference} has [n, {', '.join(map(str, tensor.shape[1:]))}] and {tensor.dtype}. "
                "Give all clients and splits the same columns and dtype."
            )


def digest_fields(digest: Any, fields: Mapping[str, Tensor]) -> None:
    """Add names, dtypes, shapes and contents of fields to a hash."""
    for name, tensor in fields.items():
        digest.update(f"{len(name)}:{name};{tensor.dtype};{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
