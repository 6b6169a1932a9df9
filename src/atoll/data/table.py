"""A recipe that turns a table whose rows name their owner into a federated dataset.

The order is the point: rows are divided by client and cut into training, validation and test before anything looks
at a value; what the columns mean is then settled by federated statistics over the training rows alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.data.cells import Raw, raw, text
from atoll.data.cutting import TEST, TRAIN, VALIDATION, check_fractions, cut
from atoll.data.dataset import FederatedDataset
from atoll.data.frames import Frame, need_columns, one_of, read_frame
from atoll.data.packed import divide
from atoll.data.preprocessing import Label, Options, Preprocessing, settle
from atoll.errors import DataError, invalid


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A table as it was read: rows in `order` are divided by client at `offsets` and cut by `codes`."""

    features: list[str]
    names: tuple[str, ...]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    codes: NDArray[Any]
    cells: Raw
    where: str

    @property
    def training(self) -> list[Raw]:
        """Each client's training rows."""
        return [
            self.cells.take(self.order[start + np.flatnonzero(self.codes[start:stop] == TRAIN)])
            for start, stop in pairwise(self.offsets.tolist())
        ]


@dataclass(frozen=True, slots=True)
class Table:
    """How to read a table; made by `table`, bound to a source by `bind`. Attributes are the arguments of `table`."""

    client: str
    target: str
    features: tuple[str, ...] | None
    test: float
    validation: float
    seed: int
    stratify: bool
    missing: Literal["mean", "error"]
    standardise: bool
    positive: Label | None
    classes: tuple[Label, ...] | None
    task: Literal["auto", "classification", "regression"]
    categorical: tuple[str, ...]
    categories: tuple[tuple[str, tuple[str, ...]], ...]
    indicators: tuple[str, ...] | None
    drop: tuple[str, ...]
    name: str

    def bind(
        self, source: Frame | str | Path, *, preprocessing: Preprocessing | None = None, client: str | None = None
    ) -> FederatedDataset:
        """Read a source by this recipe.

        Args:
            source: a pandas DataFrame or the path of a .csv, .csv.gz or .parquet file.
            preprocessing: one settled elsewhere (a site receives the federation's); None settles it over the
                clients of this source.
            client: the one client whose table this is, as a site has it; None: rows name their owners. The column
                that names owners may be missing then, or name somebody else in all rows; where it names several, the
                rows of this one are taken.

        Returns:
            The dataset, clients sorted by name, with `features` and `preprocessing`.

        Raises:
            DataError: when the source, a column or a row cannot be used; the message says which and what to do.
        """
        read = self._read(source, client)
        if preprocessing is None:
            preprocessing = settle(read.training, **self.options(read.features))
        else:
            self._same_columns(preprocessing, read.features)
        x, y = preprocessing.encode(read.cells, read.where)
        assert y is not None
        parts = divide({"x": x, "y": y}, torch.as_tensor(read.offsets), read.codes, torch.as_tensor(read.order))
        return FederatedDataset(
            read.names,
            parts[TRAIN],
            validation=parts[VALIDATION] if self.validation > 0 else None,
            test=parts[TEST] if self.test > 0 else None,
            name=self.name,
            features=preprocessing.features,
            preprocessing=preprocessing,
        )

    def training(self, source: Frame | str | Path, client: str) -> Raw:
        """A site's own training rows, of which statistics are taken before the preprocessing is agreed.

        Raises:
            DataError: as for `bind`.
        """
        (cells,) = self._read(source, client).training
        return cells

    def options(self, features: Sequence[str]) -> Options:
        """What the recipe says about columns, for `preprocessing.agree`.

        Args:
            features: the columns to predict from.
        """
        return {
            "target": self.target,
            "missing": self.missing,
            "standardise": self.standardise,
            "positive": self.positive,
            "classes": self.classes,
            "task": self.task,
            "categorical": [name for name in self.categorical if name in features],
            "categories": {name: values for name, values in self.categories if name in features},
            "indicators": self.indicators,
        }

    def _read(self, source: Frame | str | Path, client: str | None) -> "_Read":
        frame, where = read_frame(source)
        if client is not None:
            frame = self._own(frame, where, client)
        features = self._columns(frame, where)
        if len(frame) == 0:
            raise DataError(f"{where} has no rows.")
        names, owner = self._owners(frame, where)
        order = np.argsort(owner, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(names)))]).astype(np.int64)
        codes = cut(
            names,
            offsets,
            test=self.test,
            validation=self.validation,
            seed=self.seed,
            labels=self._strata(frame, where)[order] if self.stratify else None,
        )
        cells = raw(frame, features, self.target, categorical=self.categorical, where=where)
        self._refuse_unusable(cells, owner, names, where)
        return _Read(features, names, order, offsets, codes, cells, where)

    def _own(self, frame: Frame, where: str, client: str) -> Frame:
        """The rows of one client, under its name."""
        if self.client in frame.columns:
            need = [text(value) for value in frame[self.client].tolist()]
            owners = sorted(set(need))
            if client in owners:
                frame = frame[np.asarray([owner == client for owner in need], dtype=bool)]
            elif len(owners) > 1:
                raise DataError(
                    f"{where}: column {self.client!r} names {len(owners)} owners and {client!r} is none of them. Give "
                    "the table of this client alone."
                )
        return frame.reset_index(drop=True).assign(**{self.client: client})

    def _columns(self, frame: Frame, where: str) -> list[str]:
        need_columns(frame, [self.client], where, "client")
        need_columns(frame, [self.target], where, "target")
        need_columns(frame, self.drop, where, "drop")
        need_columns(frame, self.categorical, where, "categorical")
        need_columns(frame, [name for name, _ in self.categories], where, "categories")
        need_columns(frame, self.indicators or (), where, "indicators")
        if self.features is not None:
            need_columns(frame, self.features, where, "features")
            chosen = list(self.features)
        else:
            chosen = [str(column) for column in frame.columns if column not in (self.client, self.target)]
        chosen = [column for column in chosen if column not in self.drop]
        if not chosen:
            raise DataError(
                f"{where} has no feature columns left beside client {self.client!r} and target {self.target!r}. "
                "Name some with features=[...] or drop fewer."
            )
        need_columns(frame, chosen, where, "features")
        return chosen

    def _owners(self, frame: Frame, where: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        column = frame[self.client]
        missing = int(column.isna().sum())
        if missing:
            raise DataError(
                f"{where}: {missing} of {len(frame)} rows have no client in column {self.client!r}. Fill it in or "
                "leave those rows out."
            )
        values: list[Any] = column.tolist()
        distinct = list(dict.fromkeys(values))
        if all(isinstance(value, (int, float)) for value in distinct):
            distinct.sort()
        else:
            distinct.sort(key=text)
        places = {value: place for place, value in enumerate(distinct)}
        owner = np.fromiter((places[value] for value in values), dtype=np.int64, count=len(values))
        return tuple(text(value) for value in distinct), owner

    def _strata(self, frame: Frame, where: str) -> NDArray[np.int64]:
        column = frame[self.target]
        self._refuse_missing_target(int(column.isna().sum()), len(frame), where)
        values: list[Any] = column.tolist()
        distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        places = {value: place for place, value in enumerate(distinct)}
        return np.fromiter((places[value] for value in values), dtype=np.int64, count=len(values))

    def _refuse_missing_target(self, missing: int, rows: int, where: str) -> None:
        if missing:
            raise DataError(
                f"{where}: {missing} of {rows} rows have no target in column {self.target!r}. Leave those rows out; "
                "a target is never imputed."
            )

    def _refuse_unusable(self, cells: Raw, owner: NDArray[np.int64], names: Sequence[str], where: str) -> None:
        target = cells.target
        assert target is not None
        if target.kind == "empty":
            self._refuse_missing_target(cells.rows, cells.rows, where)
        elif target.kind == "numeric":
            self._refuse_missing_target(int(np.isnan(target.numbers).sum()), cells.rows, where)
        else:
            self._refuse_missing_target(sum(value is None for value in target.texts.tolist()), cells.rows, where)
        for name, column in [*cells.columns.items(), (self.target, target)]:
            if column.kind != "numeric":
                continue
            rows = np.flatnonzero(np.isinf(column.numbers))
            if len(rows):
                who = [names[place] for place in np.unique(owner[rows])]
                shown = ", ".join(repr(client) for client in who[:3]) + (", ..." if len(who) > 3 else "")
                raise DataError(
                    f"{where}, column {name!r}: {len(rows)} infinite values at {shown}. Correct them or leave them "
                    "empty (missing)."
                )

    def _same_columns(self, preprocessing: Preprocessing, features: Sequence[str]) -> None:
        settled = [column.name for column in preprocessing.columns]
        if preprocessing.target != self.target or set(settled) != set(features):
            raise invalid(
                "preprocessing",
                f"target {preprocessing.target!r}, columns {settled}",
                f"made for target {self.target!r} and columns {list(features)}",
                "Use the recipe it was made with.",
            )


def table(
    *,
    client: str,
    target: str,
    features: Sequence[str] | None = None,
    test: float = 0.2,
    validation: float = 0.0,
    seed: int = 0,
    stratify: bool = False,
    missing: Literal["mean", "error"] = "mean",
    standardise: bool = True,
    positive: Label | None = None,
    classes: Sequence[Label] | None = None,
    task: Literal["auto", "classification", "regression"] = "auto",
    categorical: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    indicators: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    name: str = "",
) -> Table:
    """A recipe for reading a table whose rows name their owner.

    Numeric columns are standardised, with missing values at the mean; text, boolean and categorical columns become
    one indicator per category; where values are missing in training rows, an indicator says so. Means, variances
    and categories come from federated statistics.

    Args:
        client: the column that names the client.
        target: the column to predict. Text, booleans and whole numbers of up to twenty values are classes, in sorted
            order; other numbers are quantities.
        features: the columns to predict from; by default all others.
        test: fraction of each client's rows for test, in [0, 1).
        validation: fraction of each client's rows for validation, in [0, 1).
        seed: of the cut.
        stratify: whether the cut keeps each client's label shares.
        missing: "mean" imputes numbers, "error" refuses missing values.
        standardise: whether numbers are shifted to mean 0 and scaled to variance 1.
        positive: the class that becomes 1 of a binary target.
        classes: the classes in order, where some may be absent from training rows.
        task: "classification" or "regression" where the target's values do not say.
        categorical: columns whose numbers are codes of categories.
        categories: the categories of some columns, in order; by default those that occur in training rows. Declared
            categories and indicators make the features the same for every cut and every federation.
        indicators: the columns that get an indicator of missing values; by default those with missing values in
            training rows.
        drop: columns to leave out.
        name: what the data are.

    Returns:
        The recipe.

    Raises:
        InvalidArgument: when arguments are out of range or contradict each other.
    """
    check_fractions(test, validation)
    if missing not in ("mean", "error"):
        raise one_of("missing", missing, ("mean", "error"))
    if task not in ("auto", "classification", "regression"):
        raise one_of("task", task, ("auto", "classification", "regression"))
    declared = {} if categories is None else dict(categories)
    lists: dict[str, object] = {
        "features": features,
        "categorical": categorical,
        "indicators": indicators,
        "drop": drop,
        "classes": classes,
        **{f"categories[{column!r}]": values for column, values in declared.items()},
    }
    for argument, value in lists.items():
        if isinstance(value, str):
            raise invalid(argument, value, "a list", f"Pass [{value!r}].")
    if client == target:
        raise invalid("target", target, "another column than client")
    if features is not None:
        for column in (client, target):
            if column in features:
                raise invalid("features", list(features), f"without the client and target columns ({column!r})")
        if len(set(features)) < len(features):
            raise invalid("features", list(features), "columns that are all different")
    return Table(
        client,
        target,
        None if features is None else tuple(features),
        test,
        validation,
        seed,
        stratify,
        missing,
        standardise,
        positive,
        None if classes is None else tuple(classes),
        task,
        tuple(categorical),
        tuple((column, tuple(values)) for column, values in declared.items()),
        None if indicators is None else tuple(indicators),
        tuple(drop),
        name,
    )
