"""Federated preprocessing of tables: what a column means is settled from counts and sums, never from pooled rows.

A statistic has a client half, `local`, that sees one client's raw columns and returns counts, sums and category
counts, and a server half, `merge` and `finish`, that sees only those. Two rounds settle a table:

1. `survey`: rows, missing values, sums and category counts of each column; gives means, categories and classes.
2. `spread`: sums of squares around the agreed means; gives population variances. Squares around the mean do not
   cancel, as the difference of E[x^2] and E[x]^2 does for columns far from zero.

Missing numbers take the mean, and count as the mean in the variance: the result is that of a mean imputer followed
by a standard scaler, fitted on all clients' training rows at once.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.analytics import Statistic
from atoll.data.cells import Cells, Kind, Raw, raw, text
from atoll.data.frames import Frame, need_columns
from atoll.errors import DataError, invalid

Label = str | int | bool

FEW = 20
"""Most distinct whole numbers that make a target a set of classes rather than a quantity."""

MANY = 1000
"""Most categories of one column; above it the column is an identifier rather than a category."""

_VERSION = 1


# --- statistics: client half, server half ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ColumnSums:
    """What one column contributes to the survey.

    Attributes:
        kind: as `Cells.kind`.
        present: cells with a value.
        missing: cells without.
        total: sum of the numbers.
        counts: cells per category; for a target of whole numbers, per value while there are few.
    """

    kind: Kind
    present: int
    missing: int
    total: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class Survey:
    """Counts, sums and categories of all columns of a group of clients.

    Attributes:
        rows: training rows.
        columns: of each feature.
        target: of the target.
        labels: "text", "truth", "whole" or "real": what the target's values are.
    """

    rows: int
    columns: Mapping[str, ColumnSums]
    target: ColumnSums
    labels: str


def survey() -> Statistic[Raw, Survey, Survey]:
    """The first round: rows, missing values, sums and category counts of every column."""

    def local(table: Raw) -> Survey:
        if table.target is None:
            raise DataError("A survey needs the target column; this table has none.")
        columns = {name: _column_sums(cells, table.rows) for name, cells in table.columns.items()}
        target = _column_sums(table.target, table.rows)
        labels = "truth" if table.truth else "text" if target.kind == "categorical" else "real"
        if table.whole:
            labels = "whole"
            values, counts = np.unique(table.target.numbers, return_counts=True)
            if len(values) <= FEW:
                target = replace(target, counts={str(int(v)): int(n) for v, n in zip(values, counts, strict=True)})
        return Survey(table.rows, columns, target, labels)

    def merge(a: Survey, b: Survey) -> Survey:
        if a.labels != b.labels:
            raise DataError(
                f"The target's values are {a.labels} at some clients and {b.labels} at others. Write them in one way "
                "everywhere."
            )
        columns = {name: _merge_columns(name, sums, b.columns[name]) for name, sums in a.columns.items()}
        target = _merge_columns("target", a.target, b.target)
        # A client with too many distinct values sends no counts: then the union has too many as well.
        if a.labels == "whole" and not (a.target.counts and b.target.counts and len(target.counts) <= FEW):
            target = replace(target, counts={})
        return Survey(a.rows + b.rows, columns, target, a.labels)

    return Statistic(local, merge, lambda sums: sums)


def spread(means: Mapping[str, float]) -> Statistic[Raw, Mapping[str, float], Mapping[str, float]]:
    """The second round: each numeric column's sum of squared distances from its agreed mean."""

    def local(table: Raw) -> Mapping[str, float]:
        # An overflow leaves here as an infinite sum; `settle` refuses it with the column's name.
        with np.errstate(over="ignore"):
            return {name: float(np.nansum((table.columns[name].numbers - mean) ** 2)) for name, mean in means.items()}

    def merge(a: Mapping[str, float], b: Mapping[str, float]) -> Mapping[str, float]:
        return {name: value + b[name] for name, value in a.items()}

    return Statistic(local, merge, lambda sums: sums)


def _column_sums(cells: Cells, rows: int) -> ColumnSums:
    if cells.kind == "numeric":
        gone = int(np.isnan(cells.numbers).sum())
        kind: Kind = "numeric" if gone < rows else "empty"
        with np.errstate(over="ignore"):
            total = float(np.nansum(cells.numbers))
        return ColumnSums(kind, rows - gone, gone, total)
    counts = dict(Counter(cast(list[str], [value for value in cells.texts.tolist() if value is not None])))
    present = sum(counts.values())
    return ColumnSums("categorical" if counts else "empty", present, rows - present, 0.0, counts)


def _merge_columns(name: str, a: ColumnSums, b: ColumnSums) -> ColumnSums:
    if "empty" not in (a.kind, b.kind) and a.kind != b.kind:
        raise DataError(
            f"Column {name!r} holds numbers at some clients and text at others. Write it in one way everywhere, or "
            f"pass categorical=[{name!r}]."
        )
    counts = dict(a.counts)
    for value, count in b.counts.items():
        counts[value] = counts.get(value, 0) + count
    kind = b.kind if a.kind == "empty" else a.kind
    return ColumnSums(kind, a.present + b.present, a.missing + b.missing, a.total + b.total, counts)


# --- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """How one column of a table becomes columns of x.

    Attributes:
        name: the table's column.
        kind: "numeric" or "categorical".
        mean: what missing numbers become, in the column's unit.
        shift: subtracted from numbers.
        scale: divides numbers.
        categories: one column of x for each, in this order.
        indicator: whether a further column of x says that the value was missing.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    mean: float = 0.0
    shift: float = 0.0
    scale: float = 1.0
    categories: tuple[str, ...] = ()
    indicator: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of x."""
        values = (self.name,) if self.kind == "numeric" else tuple(f"{self.name}={value}" for value in self.categories)
        return (*values, f"{self.name} missing") if self.indicator else values


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How rows of a table become examples; settled once, the same at every client.

    Attributes:
        columns: the table's columns in the order of x.
        target: the column to predict.
        classes: class k of y is the k-th value; None for a numeric target.
        missing: "mean", or "error" when no value may be missing.
        categorical: columns whose numbers are codes of categories.
    """

    columns: tuple[Column, ...]
    target: str
    classes: tuple[Label, ...] | None
    missing: Literal["mean", "error"] = "mean"
    categorical: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of x."""
        return tuple(name for column in self.columns for name in column.features)

    def transform(self, frame: Frame) -> tuple[Tensor, Tensor | None]:
        """Turn rows of a table into examples.

        Args:
            frame: a pandas DataFrame with the feature columns; the target may be absent.

        Returns:
            x float32 [n, features] and y, int64 [n] of classes or float32 [n]; None without a target column. A
            category that was not met in training is all zeros.

        Raises:
            DataError: when a column is missing or of another kind, or a label is unknown or missing.
        """
        where = "the frame"
        names = [column.name for column in self.columns]
        need_columns(frame, names, where, "features")
        target = self.target if self.target in [str(column) for column in frame.columns] else None
        return self.encode(raw(frame, names, target, categorical=self.categorical, where=where), where)

    def encode(self, table: Raw, where: str) -> tuple[Tensor, Tensor | None]:
        """Turn cells into examples; see `transform`."""
        x = np.zeros((table.rows, len(self.features)), dtype=np.float64)
        start = 0
        for column in self.columns:
            width = len(column.features)
            self._encode_column(column, table.columns[column.name], x[:, start : start + width], where)
            start += width
        y = None if table.target is None else self._encode_target(table.target, where)
        return torch.as_tensor(x.astype(np.float32)), y

    def _encode_column(self, column: Column, cells: Cells, out: NDArray[np.float64], where: str) -> None:
        if cells.kind not in (column.kind, "empty"):
            raise DataError(
                f"{where}, column {column.name!r}: {cells.kind} values, but the column was {column.kind} when the "
                "preprocessing was made. Write it as in the training table."
            )
        rows = len(out)
        if cells.kind == "empty":
            gone = np.ones(rows, dtype=bool)
        elif column.kind == "numeric":
            gone = np.isnan(cells.numbers)
        else:
            gone = np.asarray([value is None for value in cells.texts.tolist()], dtype=bool)
        if self.missing == "error" and bool(gone.any()):
            raise DataError(
                f"{where}, column {column.name!r}: {int(gone.sum())} of {rows} values are missing and "
                'missing="error" allows none. Fill them in or use missing="mean".'
            )
        if column.kind == "numeric":
            values = np.full(rows, column.mean) if cells.kind == "empty" else np.where(gone, column.mean, cells.numbers)
            out[:, 0] = (values - column.shift) / column.scale
        elif cells.kind == "categorical":
            places = {value: place for place, value in enumerate(column.categories)}
            found = np.asarray([places.get(value, -1) for value in cells.texts.tolist()], dtype=np.int64)
            known = np.flatnonzero(found >= 0)
            out[known, found[known]] = 1.0
        if column.indicator:
            out[:, -1] = gone

    def _encode_target(self, cells: Cells, where: str) -> Tensor:
        kind = "numeric" if cells.kind == "numeric" else "categorical"
        gone = (
            np.isnan(cells.numbers)
            if kind == "numeric"
            else np.asarray([value is None for value in cells.texts.tolist()], dtype=bool)
        )
        if cells.kind == "empty" or bool(gone.any()):
            count = "all" if cells.kind == "empty" else str(int(gone.sum()))
            raise DataError(f"{where}, target {self.target!r}: {count} values are missing. Leave those rows out.")
        if self.classes is None:
            if kind != "numeric":
                raise DataError(f"{where}, target {self.target!r}: text where numbers are expected.")
            return torch.as_tensor(cells.numbers.astype(np.float32))
        places = {text(value): place for place, value in enumerate(self.classes)}
        values = cells.numbers.tolist() if kind == "numeric" else cells.texts.tolist()
        written = [text(value) for value in values]
        strange = Counter(value for value in written if value not in places)
        if strange:
            value, count = strange.most_common(1)[0]
            raise DataError(
                f"{where}, target {self.target!r}: label {value!r} ({count} rows) is not one of the classes "
                f"{', '.join(map(repr, self.classes))} met in training rows. Name all classes with classes=[...], or "
                "cut with stratify=True."
            )
        return torch.as_tensor(np.asarray([places[value] for value in written], dtype=np.int64))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {
            "version": _VERSION,
            "target": self.target,
            "classes": None if self.classes is None else list(self.classes),
            "missing": self.missing,
            "categorical": list(self.categorical),
            "columns": [
                {
                    "name": column.name,
                    "kind": column.kind,
                    "mean": column.mean,
                    "shift": column.shift,
                    "scale": column.scale,
                    "categories": list(column.categories),
                    "indicator": column.indicator,
                }
                for column in self.columns
            ],
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_dict` wrote.

        Raises:
            DataError: when the record is of another version or damaged.
        """
        if record.get("version") != _VERSION:
            raise DataError(
                f"A preprocessing record of version {record.get('version')!r} cannot be read; this Atoll reads "
                f"{_VERSION}. Make it again from the data."
            )
        try:
            columns = tuple(
                Column(
                    name=str(column["name"]),
                    kind=_one("kind", column["kind"], ("numeric", "categorical")),
                    mean=_finite(column["mean"]),
                    shift=_finite(column["shift"]),
                    scale=_finite(column["scale"]),
                    categories=tuple(str(value) for value in column["categories"]),
                    indicator=bool(column["indicator"]),
                )
                for column in record["columns"]
            )
            classes = record["classes"]
            return Preprocessing(
                columns,
                str(record["target"]),
                None if classes is None else tuple(_label(value) for value in classes),
                _one("missing", record["missing"], ("mean", "error")),
                tuple(str(name) for name in record["categorical"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"A damaged preprocessing record: {error!r}. Make it again from the data.") from error


def _one(name: str, value: object, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}")
    return value


def _finite(value: object) -> float:
    number = float(cast(Any, value))
    if not np.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _label(value: object) -> Label:
    if not isinstance(value, (str, int)):
        raise TypeError(f"class {value!r}")
    return value


def settle(
    clients: Sequence[Raw],
    *,
    target: str,
    missing: Literal["mean", "error"],
    standardise: bool,
    positive: Label | None,
    classes: Sequence[Label] | None,
    task: str,
    categorical: Sequence[str],
    categories: Mapping[str, Sequence[str]],
    indicators: Sequence[str] | None,
) -> Preprocessing:
    """Agree on a preprocessing: two rounds of statistics over clients.

    Args:
        clients: each client's raw training rows.
        target: the target's column.
        missing: "mean" or "error".
        standardise: whether numbers are shifted to mean 0 and scaled to variance 1.
        positive: the class that becomes 1 of a binary target.
        classes: the classes in order; None to take those that occur.
        task: "auto", "classification" or "regression".
        categorical: columns whose numbers are codes of categories.
        categories: of some columns, declared; the others' are those that occur.
        indicators: columns that get an indicator of missing values; None: those with missing values.

    Returns:
        The preprocessing.

    Raises:
        DataError: when a column cannot be used.
        InvalidArgument: when the target does not fit task, positive or classes.
    """
    options: Options = {
        "target": target, "missing": missing, "standardise": standardise, "positive": positive, "classes": classes,
        "task": task, "categorical": categorical, "categories": categories, "indicators": indicators,
    }  # fmt: skip
    found = survey().over(clients)
    means = means_of(found, options)
    squares: Mapping[str, float] = spread(means).over(clients) if standardise else {}
    return agree(found, squares, options)


class Options(TypedDict):
    """What a recipe says about a table, as the arguments of `settle`."""

    target: str
    missing: Literal["mean", "error"]
    standardise: bool
    positive: Label | None
    classes: Sequence[Label] | None
    task: str
    categorical: Sequence[str]
    categories: Mapping[str, Sequence[str]]
    indicators: Sequence[str] | None


def means_of(found: Survey, options: Options) -> dict[str, float]:
    """The means of numeric columns after the first round.

    Raises:
        DataError: a column cannot be used.
    """
    _check_columns(found, options["missing"], options["categories"])
    return {name: sums.total / sums.present for name, sums in found.columns.items() if sums.kind == "numeric"}


def agree(found: Survey, squares: Mapping[str, float], options: Options) -> Preprocessing:
    """The preprocessing after both rounds.

    Args:
        found: of the first.
        squares: of the second, around `means_of(found)`; empty where nothing is standardised.
        options: of the recipe.

    Raises:
        DataError: a column cannot be used.
        InvalidArgument: the target does not fit task, positive or classes.
    """
    means, columns = means_of(found, options), list[Column]()
    categories, indicators, standardise = options["categories"], options["indicators"], options["standardise"]
    for name, sums in found.columns.items():
        indicator = sums.missing > 0 if indicators is None else name in indicators
        if sums.kind == "categorical" or name in categories:
            kinds = tuple(categories.get(name, sorted(sums.counts)))
            columns.append(Column(name, "categorical", categories=kinds, indicator=indicator))
        else:
            mean = means[name]
            if not np.isfinite(mean):
                raise _overflow(name)
            scale = _scale(name, mean, squares[name], found.rows) if standardise else 1.0
            shift = mean if standardise else 0.0
            columns.append(Column(name, "numeric", mean, shift, scale, indicator=indicator))
    agreed = _agree_classes(found, options["target"], options["positive"], options["classes"], options["task"])
    return Preprocessing(tuple(columns), options["target"], agreed, options["missing"], tuple(options["categorical"]))


def _check_columns(found: Survey, missing: str, categories: Mapping[str, Sequence[str]]) -> None:
    for name, sums in found.columns.items():
        if name in categories:
            if sums.kind == "numeric":
                raise DataError(
                    f"Column {name!r} has declared categories but holds numbers. Pass categorical=[{name!r}] as well."
                )
            strange = sorted(set(sums.counts) - set(categories[name]))
            if strange:
                raise DataError(
                    f"Column {name!r}: category {strange[0]!r} ({sums.counts[strange[0]]} training rows) is not among "
                    f"the declared {', '.join(map(repr, categories[name]))}. Declare it or correct the rows."
                )
        elif sums.kind == "empty":
            raise DataError(
                f"Column {name!r} has no value in any of the {found.rows} training rows. Leave it out with "
                f"drop=[{name!r}]."
            )
        if missing == "error" and sums.missing:
            raise DataError(
                f"Column {name!r}: {sums.missing} of {found.rows} training values are missing and "
                'missing="error" allows none. Fill them in or use missing="mean".'
            )
        if len(sums.counts) > MANY:
            raise DataError(
                f"Column {name!r} has {len(sums.counts)} categories, more than {MANY}: an identifier rather than a "
                f"category. Leave it out with drop=[{name!r}] or group its values."
            )


def _scale(name: str, mean: float, squares: float, rows: int) -> float:
    variance = squares / rows
    if not np.isfinite(variance):
        raise _overflow(name)
    # Rounding leaves a constant column a variance of the order of (n * mean * eps)^2; dividing by it would blow up.
    eps = float(np.finfo(np.float64).eps)
    if variance <= rows * eps * variance + (rows * mean * eps) ** 2:
        return 1.0
    return float(np.sqrt(variance))


def _overflow(name: str) -> DataError:
    return DataError(
        f"Column {name!r}: values so large that their mean or variance overflows. Rescale them or take logarithms."
    )


def _agree_classes(
    found: Survey, target: str, positive: Label | None, classes: Sequence[Label] | None, task: str
) -> tuple[Label, ...] | None:
    numeric = found.labels == "real" or (found.labels == "whole" and not found.target.counts)
    if task == "regression" or (task == "auto" and numeric and classes is None and positive is None):
        if found.labels in ("text", "truth"):
            raise invalid("task", task, f"'classification' for target {target!r}, whose values are {found.labels}")
        for argument, value in (("positive", positive), ("classes", classes)):
            if value is not None:
                raise invalid(argument, value, "None for a numeric target", 'Or use task="classification".')
        return None
    if found.labels == "real":
        raise invalid(
            "task",
            task,
            f"'regression' for target {target!r}, whose values are real numbers",
            "Store classes as integers or text to classify.",
        )
    if classes is not None:
        agreed = tuple(classes)
        strange = [value for value in found.target.counts if value not in {text(label) for label in agreed}]
        if strange:
            raise invalid("classes", list(classes), f"all the labels of {target!r}, {strange[0]!r} among them")
        if len({text(label) for label in agreed}) < len(agreed) or len(agreed) < 2:
            raise invalid("classes", list(classes), "at least two different labels")
    elif not found.target.counts:
        raise invalid(
            "task",
            task,
            f"'regression' for target {target!r}, which has more than {FEW} distinct whole numbers",
            "Name the classes with classes=[...] to classify nevertheless.",
        )
    elif found.labels == "whole":
        agreed = tuple(sorted(int(value) for value in found.target.counts))
    elif found.labels == "truth":
        agreed = tuple(value == "True" for value in sorted(found.target.counts))
    else:
        agreed = tuple(sorted(found.target.counts))
    if positive is None:
        return agreed
    places = [text(label) for label in agreed]
    if text(positive) not in places:
        raise invalid("positive", positive, f"one of the classes of {target!r}: {', '.join(map(repr, agreed))}")
    if len(agreed) != 2:
        raise invalid("positive", positive, f"None unless the target is binary; {target!r} has {len(agreed)} classes")
    chosen = agreed[places.index(text(positive))]
    return (agreed[1 - places.index(text(positive))], chosen)
