"""The cells of a table, one by one: what each column's values are, before anything is known about the column.

Every decision here looks at one cell, or at which kinds of cell a column holds; sums over rows are for
`preprocessing`, client by client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from atoll.data.frames import Frame, pandas
from atoll.errors import DataError

Kind = Literal["numeric", "categorical", "empty"]


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """One column, cell by cell, before anything is known about it but its own values.

    Attributes:
        kind: "numeric", "categorical", or "empty" when no cell has a value.
        numbers: float64 [n], NaN where missing; for numeric columns.
        texts: object [n] of str, None where missing; for categorical columns.
    """

    kind: Kind
    numbers: NDArray[np.float64]
    texts: NDArray[np.object_]

    def take(self, rows: NDArray[np.int64]) -> "Cells":
        """The cells of some rows, in the order given."""
        return Cells(
            self.kind,
            self.numbers[rows] if len(self.numbers) else self.numbers,
            self.texts[rows] if len(self.texts) else self.texts,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Columns of one client's table, or of any rows.

    Attributes:
        rows: how many.
        columns: the cells of each feature.
        target: the cells of the target; None when there is none.
        whole: whether the target's numbers come from an integer column.
        truth: whether the target's texts come from booleans.
    """

    rows: int
    columns: Mapping[str, Cells]
    target: Cells | None
    whole: bool = False
    truth: bool = False

    def take(self, rows: NDArray[np.int64]) -> "Raw":
        """Some rows, in the order given."""
        return replace(
            self,
            rows=len(rows),
            columns={name: cells.take(rows) for name, cells in self.columns.items()},
            target=None if self.target is None else self.target.take(rows),
        )


def raw(
    frame: Frame, features: Sequence[str], target: str | None, *, categorical: Sequence[str] = (), where: str
) -> Raw:
    """Read the cells of a table.

    Args:
        frame: a pandas DataFrame with the columns.
        features: the columns to predict from.
        target: the column to predict, or None.
        categorical: features whose numbers are codes of categories.
        where: what to call the table in messages.

    Returns:
        The cells, row by row as in the frame.

    Raises:
        DataError: when a column is of a kind that cannot be used; the message names it and the remedy.
    """
    columns = {name: _cells(frame[name], name, name in categorical, where) for name in features}
    if target is None:
        return Raw(len(frame), columns, None)
    types = pandas().api.types
    values = frame[target]
    cells = _cells(values, target, False, where)
    present = values.dropna()
    truth = cells.kind == "categorical" and all(isinstance(v, (bool, np.bool_)) for v in present.tolist())
    whole = cells.kind == "numeric" and (
        bool(types.is_integer_dtype(values.dtype)) or all(isinstance(v, (int, np.integer)) for v in present.tolist())
    )
    return Raw(len(frame), columns, cells, whole, truth)


def text(value: Any) -> str:
    """How a category or a client is written: whole numbers without a decimal point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _cells(column: Any, name: str, coded: bool, where: str) -> Cells:
    pd = pandas()
    types = pd.api.types
    dtype = column.dtype
    missing = column.isna().to_numpy(dtype=bool)
    none = np.empty(0, dtype=np.float64), np.empty(0, dtype=object)
    if bool(missing.all()):
        return Cells("empty", *none)
    if types.is_datetime64_any_dtype(dtype) or types.is_timedelta64_dtype(dtype) or types.is_complex_dtype(dtype):
        raise DataError(
            f"{where}, column {name!r}: values of type {dtype} cannot be used as they are. Turn them into numbers "
            f"(days since a date, for example) or leave them out with drop=[{name!r}]."
        )
    listed = isinstance(dtype, pd.CategoricalDtype)
    boolean = types.is_bool_dtype(dtype)
    if types.is_numeric_dtype(dtype) and not boolean and not listed and not coded:
        return Cells("numeric", column.to_numpy(dtype=np.float64, na_value=np.nan), none[1])
    values: list[Any] = column.tolist()
    if not (boolean or listed or coded or types.is_numeric_dtype(dtype)):
        kinds = {_sort(value) for value, gone in zip(values, missing, strict=True) if not gone}
        if kinds == {"number"}:
            numbers = [np.nan if gone else float(value) for value, gone in zip(values, missing, strict=True)]
            return Cells("numeric", np.asarray(numbers, dtype=np.float64), none[1])
        _refuse_mixed(values, missing, kinds, name, where)
    texts = np.empty(len(values), dtype=object)
    texts[:] = [None if gone else text(value) for value, gone in zip(values, missing, strict=True)]
    return Cells("categorical", none[0], texts)


def _sort(value: object) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "boolean"
    if isinstance(value, (int, float, np.integer, np.floating)):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__


def _refuse_mixed(values: list[Any], missing: NDArray[np.bool_], kinds: set[str], name: str, where: str) -> None:
    """A text column that is mostly numbers hides a code for missing values; encoding it would hide that for good."""
    strange = kinds - {"text", "number", "boolean"}
    if strange:
        raise DataError(
            f"{where}, column {name!r}: values of type {', '.join(sorted(strange))} cannot be used. Keep numbers, "
            f"text or booleans, or leave the column out with drop=[{name!r}]."
        )
    present = [value for value, gone in zip(values, missing, strict=True) if not gone]
    other = [value for value in present if not _numeric(value)]
    if other and len(other) * 2 < len(present):
        raise DataError(
            f"{where}, column {name!r}: {len(present) - len(other)} numbers and {len(other)} other values such as "
            f"{other[0]!r}. If these mean missing, replace them by empty cells (pandas: na_values); if the column "
            f"is a category, pass categorical=[{name!r}]."
        )


def _numeric(value: object) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        float(cast(Any, value))
    except (TypeError, ValueError):
        return False
    return True
