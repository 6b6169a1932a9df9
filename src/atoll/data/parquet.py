"""Clients' rows in Parquet files: one pass over the column of clients, then only the row groups a cohort needs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.arrays import TARGET, tensor_of
from atoll.data.files import Seen
from atoll.data.frames import missing_column, need
from atoll.data.names import Numbered, PackedNames
from atoll.data.packed import Split, offsets_of
from atoll.errors import DataError, invalid

_FEW_NAMES = 10_000


@dataclass(frozen=True, slots=True)
class Group:
    """A row group.

    Attributes:
        file: which of the files.
        index: its number in the file.
    """

    file: int
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Parquet:
    """A source of clients' examples, see `atoll.data.lazy.Source`.

    Attributes:
        clients: names, in the order of their first rows.
        sizes: int64 [clients], rows of each.
        features: names of the columns of "x".
        files: what the files looked like.
        footers: of each file, parsed.
        groups: the row groups of all files, in order.
        starts: int64 [groups + 1], the row at which each begins, counted over all files.
        offsets: int64 [clients + 1], where each client's rows begin in `order`.
        order: int64 [rows], the rows client by client; None where they stand so already.
        columns: which columns make each field.
        stacked: fields of several columns, side by side, float32.
    """

    clients: Sequence[str]
    sizes: NDArray[np.int64]
    features: tuple[str, ...]
    files: tuple[Seen, ...]
    footers: tuple[Any, ...]
    groups: tuple[Group, ...]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    order: NDArray[np.int64] | None
    columns: Mapping[str, tuple[str, ...]]
    stacked: frozenset[str]

    def read(self, places: NDArray[np.int64]) -> Split:
        """The rows of the clients at places int64 [k], in the order given; reads whole row groups, one at a time.

        Raises:
            DataError: when a value is missing, or lists differ in length.
        """
        sizes = torch.from_numpy(self.sizes[places])
        offsets = offsets_of(sizes)
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(sizes)
        rows = (torch.from_numpy(self.offsets[:-1][places]).repeat_interleave(sizes) + within).numpy()
        if self.order is not None:
            rows = self.order[rows]
        group = np.searchsorted(self.starts, rows, side="right") - 1
        by_group = np.argsort(group, kind="stable")
        needed, begins = np.unique(group[by_group], return_index=True)
        bounds = [*begins.tolist(), len(rows)]
        out: dict[str, Tensor] = {}
        wanted = list(dict.fromkeys(name for names in self.columns.values() for name in names))
        opened, reader = -1, None
        for turn, number in enumerate(needed.tolist()):
            where = self.groups[number]
            if where.file != opened:
                opened, reader = where.file, _open(self.files[where.file].path, self.footers[where.file])
            table = _read_group(reader, where.index, wanted, self.files[where.file].path)
            at = by_group[bounds[turn] : bounds[turn + 1]]
            for field, names in self.columns.items():
                values = self._values(table, field, names, rows[at] - self.starts[number], self.files[where.file].path)
                if field not in out:
                    out[field] = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype)
                if values.shape[1:] != out[field].shape[1:] or values.dtype != out[field].dtype:
                    raise DataError(
                        f"{str(self.files[where.file].path)!r}, field {field!r}: {list(values.shape[1:])} values of "
                        f"{values.dtype} per row, {list(out[field].shape[1:])} of {out[field].dtype} elsewhere. Write "
                        "all files with the same schema, and lists of one length."
                    )
                out[field][torch.from_numpy(at)] = values
        return Split(out, offsets)

    def identity(self) -> str:
        """Length and footer of each file, and the columns that are read."""
        digest = hashlib.blake2b(digest_size=32)
        for seen in self.files:
            digest.update(f"{seen.size};".encode())
            digest.update(_footer_bytes(seen.path))
        return f"parquet;{digest.hexdigest()};{sorted(self.columns.items())}"

    def _values(self, table: Any, field: str, names: tuple[str, ...], rows: NDArray[np.int64], path: Path) -> Tensor:
        where = repr(str(path))
        if field not in self.stacked:
            return tensor_of(_column(table, names[0], rows, where), field, where)
        columns = [_column(table, name, rows, where) for name in names]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32, copy=False))


def open_parquet(
    source: str | Path,
    *,
    client: str,
    target: str | None,
    features: Sequence[str] | None,
    fields: Mapping[str, str | Sequence[str]] | None,
) -> Parquet:
    """Learn which rows are whose. Arguments as those of `FederatedDataset.from_parquet`.

    Raises:
        DataError: when a file or a column is missing or cannot be used; the message names it and the remedy.
        InvalidArgument: when arguments contradict each other.
    """
    need("pyarrow", "pyarrow", f"Reading {str(source)!r}", extra="parquet")
    files = tuple(Seen.of(path) for path in _paths(source))
    footers = tuple(_footer(seen.path) for seen in files)
    schema = footers[0].schema.to_arrow_schema()
    for seen, footer in zip(files, footers, strict=True):
        if not footer.schema.to_arrow_schema().equals(schema):
            raise DataError(
                f"{str(seen.path)!r} has other columns or types than {str(files[0].path)!r}. Write all files with the "
                "same schema, or keep other files out of the directory."
            )
    where = repr(str(source))
    columns, stacked, shown = _fields(schema, client, target, features, fields, where)
    groups = tuple(Group(f, g) for f, footer in enumerate(footers) for g in range(footer.num_row_groups))
    counts = [footers[group.file].row_group(group.index).num_rows for group in groups]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if not starts[-1]:
        raise DataError(f"{where} has no rows.")
    _refuse_missing(footers, files, {name for names in columns.values() for name in names})
    clients, offsets, order = _owners(files, footers, schema, client, where)
    return Parquet(clients, np.diff(offsets), shown, files, footers, groups, starts, offsets, order, columns, stacked)


def _paths(source: str | Path) -> list[Path]:
    if not isinstance(source, str | Path):
        raise invalid("source", type(source).__name__, "the path of a .parquet file or of a directory of them")
    path = Path(source)
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.parquet"))
    if not found:
        raise DataError(f"{str(path)!r} holds no .parquet files. Check the path.")
    return found


def _footer(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read as Parquet: {error}. Check that the file is whole.") from error


def _open(path: Path, footer: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, metadata=footer)


def _read_group(reader: Any, index: int, columns: Sequence[str], path: Path) -> Any:
    import pyarrow as pa

    try:
        return reader.read_row_group(index, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{str(path)!r}: row group {index} cannot be read: {error}. Check that the file is whole."
        ) from error


def _footer_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return file.read(length)


def _fields(
    schema: Any,
    client: str,
    target: str | None,
    features: Sequence[str] | None,
    fields: Mapping[str, str | Sequence[str]] | None,
    where: str,
) -> tuple[dict[str, tuple[str, ...]], frozenset[str], tuple[str, ...]]:
    """Columns of each field, which fields are several side by side, and the names of the columns of "x"."""
    present = list(schema.names)
    asked = {"client": [client]}
    if fields is not None:
        if target is not None or features is not None:
            raise invalid("fields", dict(fields), "given without target and features", "Name the columns of y there.")
        columns = {name: (given,) if isinstance(given, str) else tuple(given) for name, given in fields.items()}
        stacked = frozenset(name for name, given in fields.items() if not isinstance(given, str))
        asked |= {f"fields[{name!r}]": list(names) for name, names in columns.items()}
    else:
        if target is None:
            raise invalid("target", target, "the column to predict", "Or say with fields= which columns are what.")
        if isinstance(features, str):
            raise invalid("features", features, "a list", f"Pass [{features!r}].")
        chosen = [c for c in present if c not in (client, target)] if features is None else list(features)
        columns = {"x": tuple(chosen), TARGET: (target,)}
        asked |= {"target": [target], "features": chosen}
        lists = len(chosen) == 1 and chosen[0] in present and _is_list(schema.field(chosen[0]).type)
        stacked = frozenset[str]() if lists else frozenset({"x"})
    for argument, names in asked.items():
        if not names:
            raise DataError(f"{argument}: {where} has no columns left for it. Name some.")
        for name in names:
            if name not in present:
                raise missing_column(name, present, where, argument)
            if present.count(name) > 1:
                raise DataError(f"{where} has {present.count(name)} columns named {name!r}. Rename all but one.")
            if argument != "client" and name == client:
                raise invalid(argument, name, "another column than client")
    for field, names in columns.items():
        for name in names:
            _refuse_type(schema.field(name).type, name, field in stacked, where)
    return columns, stacked, columns.get("x", ()) if "x" in stacked else ()


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _refuse_type(kind: Any, name: str, stacked: bool, where: str) -> None:
    import pyarrow as pa

    inner = kind.value_type if _is_list(kind) and not stacked else kind
    number = pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)
    if not number:
        raise DataError(
            f"{where}, column {name!r}: values of type {kind} are not numbers. Encode them when the file is written, "
            f"leave the column out, or read the table whole with FederatedDataset.from_frame, which encodes."
        )


def _refuse_missing(footers: Sequence[Any], files: Sequence[Seen], columns: set[str]) -> None:
    """Missing values that the statistics in the footers tell of, before anything is read."""
    for footer, seen in zip(footers, files, strict=True):
        for g in range(footer.num_row_groups):
            group = footer.row_group(g)
            for c in range(group.num_columns):
                column = group.column(c)
                told = column.statistics
                if column.path_in_schema in columns and told is not None and told.has_null_count and told.null_count:
                    raise _missing(column.path_in_schema, told.null_count, repr(str(seen.path)))


def _missing(column: str, count: int, where: str) -> DataError:
    return DataError(
        f"{where}, column {column!r}: {count} missing values. Fill them in, leave those rows out, or read the table "
        "whole with FederatedDataset.from_frame, which imputes by federated statistics."
    )


def _column(table: Any, name: str, rows: NDArray[np.int64], where: str) -> NDArray[Any]:
    """Some rows of a column: [n], or [n, length] for lists."""
    chunked = table.column(name)
    column = chunked.combine_chunks() if chunked.num_chunks != 1 else chunked.chunk(0)
    if not _is_list(column.type):
        if column.null_count:
            raise _missing(name, column.null_count, where)
        return column.to_numpy(zero_copy_only=False)[rows]
    column = column.take(rows)
    values = column.flatten()
    if column.null_count or values.null_count:
        raise _missing(name, column.null_count + values.null_count, where)
    if len(values) % len(rows) or len(np.unique(column.value_lengths().to_numpy(zero_copy_only=False))) > 1:
        raise DataError(f"{where}, column {name!r}: lists of different lengths. Pad or cut them to one.")
    return values.to_numpy(zero_copy_only=False).reshape(len(rows), -1)


def _owners(
    files: Sequence[Seen], footers: Sequence[Any], schema: Any, client: str, where: str
) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64] | None]:
    """Names, offsets int64 [clients + 1], and the rows client by client, None where they stand so."""
    import pyarrow as pa

    pc: Any = import_module("pyarrow.compute")

    kind = schema.field(client).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    whole = pa.types.is_integer(inner)
    if not (whole or pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise DataError(
            f"{where}, column {client!r}: values of type {kind} cannot name clients. Write them as text or "
            "whole numbers."
        )
    plain = inner if whole else pa.large_string()
    runs: list[Any] = []
    lengths: list[NDArray[np.int64]] = []
    for seen, footer in zip(files, footers, strict=True):
        reader = _open(seen.path, footer)
        for group in range(footer.num_row_groups):
            column = _read_group(reader, group, [client], seen.path).column(client)
            column = column.cast(plain).combine_chunks()
            if column.null_count:
                raise DataError(
                    f"{str(seen.path)!r}: {column.null_count} rows have no client in column {client!r}. Fill it in "
                    "or leave those rows out."
                )
            if len(column):
                begin = _run_starts(column)
                runs.append(column.take(pa.array(begin)))
                lengths.append(np.diff(begin, append=len(column)))
    # A client's rows may go on in the next row group or file.
    values, length = pa.concat_arrays(runs), np.concatenate(lengths)
    begin = _run_starts(values)
    values, length = values.take(pa.array(begin)), np.add.reduceat(length, begin)
    coded = pc.dictionary_encode(values)
    codes, distinct = coded.indices.to_numpy().astype(np.int64), coded.dictionary
    counts = np.bincount(codes, weights=length, minlength=len(distinct)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    order: NDArray[np.int64] | None = None
    if len(distinct) < len(values):
        by_client = np.argsort(codes, kind="stable")
        run_begin = np.cumsum(length) - length
        sorted_length = length[by_client]
        within = np.arange(offsets[-1]) - np.repeat(np.cumsum(sorted_length) - sorted_length, sorted_length)
        order = np.repeat(run_begin[by_client], sorted_length) + within
    return _named(distinct, whole, client, where), offsets, order


def _run_starts(column: Any) -> NDArray[np.int64]:
    pc: Any = import_module("pyarrow.compute")

    if len(column) == 1:
        return np.zeros(1, dtype=np.int64)
    changes = pc.not_equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(changes) + 1]).astype(np.int64)


def _named(distinct: Any, whole: bool, client: str, where: str) -> Sequence[str]:
    import pyarrow as pa

    if whole:
        if np.array_equal(distinct.to_numpy(zero_copy_only=False), np.arange(len(distinct))):
            return Numbered(len(distinct))
        distinct = distinct.cast(pa.large_string())
    _, bounds, content = distinct.buffers()
    offsets = np.frombuffer(bounds, dtype=np.int64)[distinct.offset : distinct.offset + len(distinct) + 1]
    if int(np.diff(offsets).min()) < 1:
        raise DataError(f"{where}: a row has an empty client in column {client!r}. Fill it in or leave those rows out.")
    text = np.frombuffer(content, dtype=np.uint8)[offsets[0] : offsets[-1]]
    names = PackedNames(text, offsets - offsets[0])
    return tuple(names) if len(names) <= _FEW_NAMES else names
