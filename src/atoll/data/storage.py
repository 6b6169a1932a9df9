"""A dataset on disk: one raw file for each packed tensor, mapped into memory instead of read.

A directory holds `dataset.json`, which says what the files are, and for each split its offsets and one file per field,
little-endian, as they stand in memory. Opening costs what the offsets cost; an example is read when it is used. Pages
are mapped privately: what a program writes to such a tensor never reaches the file.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from atoll.data.files import Seen
from atoll.data.names import Numbered, PackedNames
from atoll.data.packed import Split, offsets_of, same_fields
from atoll.data.preprocessing import Preprocessing
from atoll.errors import AtollError, DataError, invalid

HEADER = "dataset.json"
SPLITS = ("train", "validation", "test")

_FORMAT, _VERSION = "atoll dataset", 1
_PIECE = 1 << 24
_FEW_NAMES = 10_000
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a directory holds; attributes as those of `FederatedDataset`.

    Attributes:
        fingerprint: of the data, as they were when they were written.
        files: what the files looked like when they were opened.
        sums: BLAKE2b of each file, as it was when it was written.
    """

    clients: Sequence[str]
    splits: Mapping[str, Split]
    holdout: Mapping[str, Tensor] | None
    name: str
    features: tuple[str, ...]
    preprocessing: Preprocessing | None
    fingerprint: str
    files: tuple[Seen, ...]
    sums: Mapping[str, str]

    def damaged(self) -> list[str]:
        """The files whose contents are not those that were written; reads all of them."""
        paths = {seen.path.name: seen.path for seen in self.files}
        return [str(paths[name]) for name, expected in self.sums.items() if _sum_of(paths[name]) != expected]


class Writer:
    """Writes a dataset piece by piece into a directory that appears when it is whole.

    Args:
        directory: where; must not exist, or be empty.
        clients: the names.
        splits: which of "train", "validation" and "test" will come.

    Raises:
        InvalidArgument: when the directory holds something.
    """

    def __init__(self, directory: str | Path, clients: Sequence[str], splits: Sequence[str]) -> None:
        self._goal = Path(directory)
        if self._goal.exists() and (not self._goal.is_dir() or any(self._goal.iterdir())):
            raise invalid(
                "directory", str(self._goal), "a directory that does not exist or is empty", "Choose another one."
            )
        self._clients, self._splits = clients, tuple(splits)
        self._goal.parent.mkdir(parents=True, exist_ok=True)
        self._folder = self._goal.with_name(f".{self._goal.name}.partial-{os.getpid()}")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._files: dict[str, tuple[BinaryIO, Any]] = {}
        self._sizes: dict[str, list[Tensor]] = {split: [] for split in splits}
        self._like: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file, _sum in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, parts: Mapping[str, Split]) -> None:
        """Append the examples of the next clients.

        Args:
            parts: a split of the same clients for each of the splits announced.

        Raises:
            DataError: when fields differ from those before, or cannot be stored.
        """
        for split in self._splits:
            self._sizes[split].append(parts[split].sizes)
            self._append_fields(split, parts[split].fields)

    def finish(
        self,
        *,
        holdout: Mapping[str, Tensor] | None,
        name: str,
        features: Sequence[str],
        preprocessing: object,
    ) -> Path:
        """Write what is left, but the header; the data can be read from the directory this returns."""
        if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
            raise invalid(
                "preprocessing",
                type(preprocessing).__name__,
                "an atoll Preprocessing or None",
                "Save it beside the data.",
            )
        if holdout is not None:
            self._append_fields("holdout", holdout)
        for split, sizes in self._sizes.items():
            self._append(f"{split}.offsets.bin", offsets_of(torch.cat(sizes)))
        if not isinstance(self._clients, Numbered):
            packed = self._clients if isinstance(self._clients, PackedNames) else PackedNames.of(self._clients)
            for file, array in zip(("names.bin", "names.offsets.bin"), packed.packed, strict=True):
                self._append(file, torch.from_numpy(array if array.flags.writeable else array.copy()))
        files: dict[str, Any] = {}
        for file, (handle, sums) in self._files.items():
            files[file] = {"bytes": handle.tell(), "blake2b": sums.hexdigest()}
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        self._header: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "name": name,
            "clients": len(self._clients),
            "names": "numbered" if isinstance(self._clients, Numbered) else "packed",
            "features": list(features),
            "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
            "fingerprint": "",
            "splits": {
                label: [
                    {"name": field, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
                    for field, tensor in fields.items()
                ]
                for label, fields in self._like.items()
            },
            "files": files,
        }
        self._write_header()
        return self._folder

    def publish(self, fingerprint: str) -> None:
        """Enter the fingerprint and make the directory appear under its name."""
        self._header["fingerprint"] = fingerprint
        self._write_header()
        os.replace(self._folder, self._goal)

    def _write_header(self) -> None:
        with (self._folder / HEADER).open("w", encoding="utf-8") as file:
            json.dump(self._header, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())

    def _append_fields(self, label: str, fields: Mapping[str, Tensor]) -> None:
        if label in self._like:
            same_fields(self._like[label], fields, label, "what was written before")
        else:
            self._like[label] = {name: tensor[:0] for name, tensor in fields.items()}
        for place, (name, tensor) in enumerate(fields.items()):
            if tensor.dtype not in _DTYPES.values():
                raise DataError(
                    f"{label} field {name!r}: dtype {tensor.dtype} cannot be stored. Convert it to one of "
                    f"{', '.join(_DTYPES)}."
                )
            if 0 in tensor.shape[1:]:
                raise DataError(f"{label} field {name!r}: its examples have no values. Leave the field out.")
            self._append(f"{label}.{place}.bin", tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        if sys.byteorder != "little":
            raise DataError("Datasets are stored little-endian, and this machine is not. Save them on another one.")
        if name not in self._files:
            self._files[name] = ((self._folder / name).open("wb"), hashlib.blake2b(digest_size=32))
        file, sums = self._files[name]
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE].data
            file.write(piece)
            sums.update(piece)


def read(directory: str | Path) -> Stored:
    """Map a directory that `Writer` wrote.

    Args:
        directory: where.

    Returns:
        What it holds; the tensors are mapped, not read.

    Raises:
        DataError: when there is no dataset, or its header and its files do not fit together; the message names the
            file.
    """
    folder = Path(directory)
    path = folder / HEADER
    if not path.is_file():
        raise DataError(
            f"No dataset in {str(folder)!r} (looked for {HEADER} in {str(folder.resolve())!r}). Check the path; "
            "data.save(directory) writes one."
        )
    seen = [Seen.of(path)]
    try:
        header = _Header(path)
        files = header.mapping("files")
        for name in files:
            # A name with a path in it could lead out of the directory.
            if Path(name).name != name:
                raise header.wrong(f"names a file {name!r} outside the directory")
            found = Seen.of(folder / name)
            if found.size != header.file(name)["bytes"]:
                raise DataError(
                    f"{str(folder / name)!r} has {found.size} bytes, {HEADER} says {header.file(name)['bytes']}: the "
                    "file is damaged or was changed. Write the dataset again, or copy it again from where it is whole."
                )
            seen.append(found)
        return _stored(folder, header, tuple(seen))
    except AtollError as error:
        if str(folder) in str(error):
            raise
        raise DataError(f"{str(path)!r} and its files do not fit together: {error} Write the dataset again.") from error


def _stored(folder: Path, header: "_Header", seen: tuple[Seen, ...]) -> Stored:
    count = header.whole("clients")
    splits: dict[str, Split] = {}
    holdout: dict[str, Tensor] | None = None
    described = header.mapping("splits")
    if "train" not in described or not set(described) <= {*SPLITS, "holdout"}:
        raise header.wrong(f"has splits {sorted(described)}")
    for label in described:
        fields = {
            field["name"]: _map(folder, header, f"{label}.{place}.bin", _DTYPES[field["dtype"]], field["shape"])
            for place, field in enumerate(header.fields(label))
        }
        if label == "holdout":
            holdout = fields
        else:
            offsets = _map(folder, header, f"{label}.offsets.bin", torch.int64, [])
            splits[label] = Split(fields, offsets)
            if len(offsets) != count + 1:
                raise header.wrong(f"says {count} clients, but {label} has {len(offsets) - 1}")
        same_fields(splits["train"].fields, fields, label)
    if count < 1 or int(splits["train"].sizes.min()) < 1:
        raise header.wrong("has a client without training examples")
    clients: Sequence[str] = Numbered(count)
    if header.text("names") == "packed":
        clients = PackedNames(
            _map(folder, header, "names.bin", torch.uint8, []).numpy(),
            _map(folder, header, "names.offsets.bin", torch.int64, []).numpy(),
        )
        if len(clients) != count:
            raise header.wrong(f"says {count} clients, but there are {len(clients)} names")
        clients = tuple(clients) if count <= _FEW_NAMES else clients
    preprocessing = header.content["preprocessing"]
    return Stored(
        clients,
        splits,
        holdout,
        header.text("name"),
        tuple(str(name) for name in cast(list[object], header.content["features"])),
        None if preprocessing is None else Preprocessing.from_dict(preprocessing),
        header.text("fingerprint"),
        seen,
        {name: header.file(name)["blake2b"] for name in header.mapping("files")},
    )


def _map(folder: Path, header: "_Header", name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor [n, *shape] in a file, mapped; n follows from the file's length."""
    size = header.file(name)["bytes"]
    row = prod(shape) * dtype.itemsize
    if row == 0 or size % row:
        raise header.wrong(f"says rows of {row} bytes for {name!r}, which has {size}")
    if size == 0:
        return torch.empty(0, *shape, dtype=dtype)
    return torch.from_file(str(folder / name), shared=False, size=size // dtype.itemsize, dtype=dtype).view(-1, *shape)


class _Header:
    """A header read with suspicion: every look-up checks that what it finds has the right form."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{str(path)!r} is damaged ({error}). Write the dataset again.") from error
        if not isinstance(content, dict) or cast(dict[str, Any], content).get("format") != _FORMAT:
            raise DataError(f"{str(path)!r} does not describe an Atoll dataset. Check the path.")
        self.content = cast(dict[str, Any], content)
        if self.content.get("version") != _VERSION:
            raise DataError(
                f"{str(path)!r} has version {self.content.get('version')!r} of the format; this Atoll reads "
                f"{_VERSION}. Write the dataset again, or install the Atoll that wrote it."
            )
        missing = {"features", "preprocessing"} - self.content.keys()
        if (
            missing
            or not isinstance(self.content["features"], list)
            or not isinstance(self.content["preprocessing"], dict | None)
        ):
            raise self.wrong("lacks features or preprocessing")

    def wrong(self, what: str) -> DataError:
        return DataError(f"{str(self._path)!r} is damaged: it {what}. Write the dataset again.")

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.content.get(key)
        if not isinstance(value, dict):
            raise self.wrong(f"has no {key}")
        return cast(dict[str, Any], value)

    def text(self, key: str) -> str:
        value = self.content.get(key)
        if not isinstance(value, str):
            raise self.wrong(f"has no {key}")
        return value

    def whole(self, key: str) -> int:
        value = self.content.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(f"has no {key}")
        return value

    def file(self, name: str) -> dict[str, Any]:
        value = self.mapping("files").get(name)
        if not (
            isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("blake2b"), str)
        ):
            raise self.wrong(f"does not describe the file {name!r}")
        return cast(dict[str, Any], value)

    def fields(self, label: str) -> list[dict[str, Any]]:
        value = self.mapping("splits")[label]
        fields = cast(list[Any], value) if isinstance(value, list) else []
        for field in fields:
            good = isinstance(field, dict) and isinstance(field.get("name"), str) and field.get("dtype") in _DTYPES
            shape = cast(dict[str, Any], field).get("shape") if good else None
            if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in cast(list[Any], shape)):
                raise self.wrong(f"does not describe the fields of {label}")
        if not fields:
            raise self.wrong(f"has no fields of {label}")
        return fields


def write(
    directory: str | Path,
    clients: Sequence[str],
    parts: Iterable[Mapping[str, Split]],
    splits: Sequence[str],
    *,
    holdout: Mapping[str, Tensor] | None,
    name: str,
    features: Sequence[str],
    preprocessing: object,
    fingerprint: str | Callable[[Stored], str],
) -> None:
    """Write a dataset, piece by piece.

    Args:
        directory: where; must not exist, or be empty.
        clients: the names.
        parts: for each run of neighbouring clients, a split for each of `splits`.
        splits: which of "train", "validation" and "test" there are.
        holdout: fields [n, ...] of examples that belong to no client.
        name: what the data are.
        features: names of the columns of "x".
        preprocessing: how a table became these tensors.
        fingerprint: of the data; or what computes it from what was written.

    Raises:
        InvalidArgument: when the directory holds something.
        DataError: when something cannot be stored.
    """
    with Writer(directory, clients, splits) as writer:
        for part in parts:
            writer.add(part)
        folder = writer.finish(holdout=holdout, name=name, features=features, preprocessing=preprocessing)
        writer.publish(fingerprint if isinstance(fingerprint, str) else fingerprint(read(folder)))


def _sum_of(path: Path) -> str:
    sums = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sums.update(piece)
    return sums.hexdigest()
