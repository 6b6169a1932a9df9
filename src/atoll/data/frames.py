"""Tables from disk: reading them, and the errors about columns."""

import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from atoll.errors import DataError, InvalidArgument, invalid

# pandas publishes no types; this alias is a pandas.DataFrame for the reader.
Frame: TypeAlias = Any

_READ = (".csv", ".csv.gz", ".parquet")


def pandas() -> Any:
    """The pandas module, loaded when a table is first met."""
    return import_module("pandas")


def need(module: str, package: str, purpose: str, *, extra: str) -> Any:
    """Import a package of an extra.

    Args:
        module: what is imported.
        package: what is installed.
        purpose: what needs it, the subject of the message.
        extra: Atoll's extra that brings it.

    Raises:
        DataError: naming the package and how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f'{purpose} needs {package}, which is not installed. Install it: pip install "atoll[{extra}]".'
        ) from error


def read_frame(source: object) -> tuple[Frame, str]:
    """Read a table.

    Args:
        source: a pandas DataFrame or the path of a .csv, .csv.gz or .parquet file.

    Returns:
        The frame, and what to call it in messages.

    Raises:
        DataError: when the file does not exist, is empty or cannot be parsed.
        InvalidArgument: when the source is of another kind.
    """
    pd = pandas()
    if isinstance(source, pd.DataFrame):
        return source, "the frame"
    if not isinstance(source, (str, Path)):
        raise invalid("source", type(source).__name__, f"a pandas DataFrame or a path ending in {', '.join(_READ)}")
    path = Path(source)
    if not path.name.lower().endswith(_READ):
        raise invalid("source", str(path), f"a path ending in {', '.join(_READ)}", "Other files: read a DataFrame.")
    if not path.is_file():
        raise DataError(f"No file {str(path)!r} (looked in {str(path.resolve().parent)!r}). Check the path.")
    parquet = path.name.lower().endswith(".parquet")
    if parquet:
        need("pyarrow", "pyarrow", f"Reading {path.name!r}", extra="parquet")
    try:
        return (pd.read_parquet if parquet else pd.read_csv)(path), repr(str(path))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{str(path)!r} cannot be read as a table: {error}. Check that the file is whole.") from error


def need_columns(frame: Frame, columns: Sequence[str], where: str, argument: str) -> None:
    """Refuse a table without the named columns, or with a column name twice.

    Args:
        frame: the table.
        columns: the names it must have.
        where: what to call the table.
        argument: which argument named them.

    Raises:
        DataError: naming the column, the table, the columns there are and the closest one.
    """
    present = [str(column) for column in frame.columns]
    for column in columns:
        if column not in present:
            raise missing_column(column, present, where, argument)
        if present.count(column) > 1:
            raise DataError(f"{where} has {present.count(column)} columns named {column!r}. Rename all but one.")


def missing_column(column: str, present: Sequence[str], where: str, argument: str) -> DataError:
    """The error for a column a table does not have."""
    close = difflib.get_close_matches(column, present, n=1)
    if not close:
        close = [name for name in present if name.lower() == column.lower()][:1]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(repr(name) for name in present[:30]) + (", ..." if len(present) > 30 else "")
    return DataError(f"{argument}={column!r}: {where} has no such column. It has {shown}.{hint}")


def one_of(argument: str, value: object, allowed: Sequence[str]) -> InvalidArgument:
    """The error for a word outside a short list."""
    return invalid(argument, value, f"one of {', '.join(repr(word) for word in allowed)}")
