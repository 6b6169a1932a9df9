"""Clients and their examples, stored packed: one tensor per field with all clients one after the other.

A client is a pair of offsets. Ten thousand clients are ten thousand and one integers, not ten thousand objects, and
a tile of clients is a slice or a gather of one tensor.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.arrays import TARGET, fields_of, stack_items
from atoll.data.cutting import TEST, TRAIN, VALIDATION, check_fractions, cut
from atoll.data.files import Seen, check_files
from atoll.data.frames import Frame, pandas
from atoll.data.names import Numbered, PackedNames, Population, named, some
from atoll.data.packed import Split, check_finite, digest_fields, divide, groups_of, labels_of, offsets_of, same_fields
from atoll.errors import DataError, invalid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atoll.data.lazy import LazyDataset
    from atoll.data.storage import Stored

_FEW_CLASSES = 50


@dataclass(frozen=True, slots=True, eq=False)
class ClientData:
    """One client's examples, as views of the packed tensors; a split the dataset lacks is None."""

    name: str
    train: dict[str, Tensor]
    validation: dict[str, Tensor] | None
    test: dict[str, Tensor] | None


class FederatedDataset(Population):
    """The examples of a population of clients.

    Attributes:
        clients: the names, in order.
        train: training examples; every client has at least one.
        validation: examples for choosing, or None.
        test: examples for the final measure, or None.
        holdout: examples that belong to no client, for measuring the global model, or None.
        name: what the data are.
        features: names of the columns of "x", or empty.
        preprocessing: how a table became these tensors, or None.
    """

    __slots__ = (
        "_damaged",
        "_files",
        "_fingerprint",
        "features",
        "holdout",
        "name",
        "preprocessing",
        "test",
        "train",
        "validation",
    )

    train: Split
    validation: Split | None
    test: Split | None
    holdout: Mapping[str, Tensor] | None
    name: str
    features: tuple[str, ...]
    preprocessing: Any

    def __init__(
        self,
        clients: Sequence[str],
        train: Split,
        *,
        validation: Split | None = None,
        test: Split | None = None,
        holdout: Mapping[str, Tensor] | None = None,
        name: str = "",
        features: Sequence[str] = (),
        preprocessing: Any = None,
    ) -> None:
        """Check and hold packed examples.

        Args:
            clients: one name per client, all different.
            train: training examples of every client.
            validation: validation examples, same fields as train.
            test: test examples, same fields as train.
            holdout: fields [n, ...] of examples that belong to no client.
            name: what the data are, for reports.
            features: names of the columns of "x".
            preprocessing: how a table became these tensors.

        Raises:
            DataError: when a client has no training examples, a name repeats, a value is NaN or infinite, or fields
                differ between splits.
        """
        self._set(
            clients if isinstance(clients, Numbered | PackedNames) else tuple(clients),
            train,
            validation,
            test,
            None if holdout is None else dict(holdout),
            name,
            tuple(features),
            preprocessing,
        )
        self._check()

    def _set(
        self,
        clients: Sequence[str],
        train: Split,
        validation: Split | None,
        test: Split | None,
        holdout: Mapping[str, Tensor] | None,
        name: str,
        features: tuple[str, ...],
        preprocessing: Any,
    ) -> None:
        self.clients = clients
        self.train = train
        self.validation = validation
        self.test = test
        self.holdout = holdout
        self.name = name
        self.features = features
        self.preprocessing = preprocessing
        self._places = None
        self._fingerprint: str | None = None
        self._files: tuple[Seen, ...] = ()
        self._damaged: Callable[[], list[str]] | None = None

    @staticmethod
    def trusted(
        clients: Sequence[str],
        train: Split,
        *,
        validation: Split | None,
        test: Split | None,
        holdout: Mapping[str, Tensor] | None,
        name: str,
        features: tuple[str, ...],
        preprocessing: Any = None,
        files: tuple[Seen, ...] = (),
    ) -> "FederatedDataset":
        """A dataset made of parts that were checked already, for those who checked them; arguments as in `__init__`.

        Args:
            files: what the files looked like from which parts are mapped; the rest as for the class.
        """
        made = object.__new__(FederatedDataset)
        made._set(clients, train, validation, test, holdout, name, features, preprocessing)
        made._files = files
        return made

    def _derive(
        self,
        clients: Sequence[str],
        train: Split,
        validation: Split | None,
        test: Split | None,
        holdout: Mapping[str, Tensor] | None,
    ) -> "FederatedDataset":
        """A dataset made of parts already checked."""
        return FederatedDataset.trusted(
            clients,
            train,
            validation=validation,
            test=test,
            holdout=holdout,
            name=self.name,
            features=self.features,
            preprocessing=self.preprocessing,
            # Views of mapped files, or a holdout that is one, may be among the parts.
            files=self._files,
        )

    # --- construction ------------------------------------------------------------------------------------------------

    @staticmethod
    def from_arrays(
        clients: Mapping[str, Any],
        *,
        test: Mapping[str, Any] | float | None = None,
        validation: Mapping[str, Any] | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        holdout: Any = None,
        name: str = "",
        features: Sequence[str] = (),
    ) -> "FederatedDataset":
        """Pack one set of arrays per client.

        Args:
            clients: for each client (x, y) or a mapping of named fields, each [n, ...]: numpy arrays, tensors or
                lists. Numbers become float32 and labels int64; floating torch tensors keep their dtype.
            test: the same for test examples (clients may be missing), or the fraction to cut from each client.
            validation: the same for validation.
            seed: of the cut, where a fraction is given.
            stratify: whether the cut keeps each client's label shares.
            holdout: (x, y) or named fields that belong to no client.
            name: what the data are.
            features: names of the columns of "x".

        Returns:
            The dataset, clients in the order of the mapping.

        Raises:
            DataError: when the arrays cannot be packed; the message names the client and the field.
        """
        if not isinstance(clients, Mapping):
            raise invalid(
                "clients", type(clients).__name__, "a mapping of client names to (x, y)", 'Pass {"a": (x, y), ...}.'
            )
        names = tuple(named(client) for client in clients)
        if not names:
            raise DataError("clients is empty: a federated dataset needs at least one client with one example.")
        owned = [fields_of(value, f"client {client!r}") for client, value in clients.items()]
        train = _packed(names, owned, "train")
        splits: dict[str, Split | None] = {"test": None, "validation": None}
        fractions = {"test": 0.0, "validation": 0.0}
        for split, given in (("test", test), ("validation", validation)):
            if given is None:
                continue
            if isinstance(given, Mapping):
                splits[split] = _packed(names, _aligned(names, given, owned[0], split), split)
            else:
                fractions[split] = given
        data = FederatedDataset(
            names,
            train,
            validation=splits["validation"],
            test=splits["test"],
            holdout=None if holdout is None else fields_of(holdout, "holdout"),
            name=name,
            features=features,
        )
        if any(value != 0.0 for value in fractions.values()):
            return data.split(**fractions, seed=seed, stratify=stratify)
        return data

    @staticmethod
    def from_packed(
        fields: Mapping[str, Any],
        offsets: Any,
        clients: Sequence[str] | None = None,
        *,
        validation: Split | float | None = None,
        test: Split | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        holdout: Any = None,
        name: str = "",
        features: Sequence[str] = (),
    ) -> "FederatedDataset":
        """Take examples that are packed already.

        Args:
            fields: one array [N, ...] per field, all clients one after the other.
            offsets: int64 [clients + 1], where each client's examples start.
            clients: names; "0" to "n-1" by default.
            validation: a split, or the fraction to cut from each client.
            test: a split, or the fraction to cut from each client.
            seed: of the cut, where a fraction is given.
            stratify: whether the cut keeps each client's label shares.
            holdout: (x, y) or named fields that belong to no client.
            name: what the data are.
            features: names of the columns of "x".

        Returns:
            The dataset.

        Raises:
            DataError: when the parts do not fit together.
        """
        train = Split(fields_of(fields, "fields"), torch.as_tensor(offsets, dtype=torch.int64))
        data = FederatedDataset(
            Numbered(len(train.offsets) - 1) if clients is None else clients,
            train,
            validation=validation if isinstance(validation, Split) else None,
            test=test if isinstance(test, Split) else None,
            holdout=None if holdout is None else fields_of(holdout, "holdout"),
            name=name,
            features=features,
        )
        cut_test = 0.0 if test is None or isinstance(test, Split) else test
        cut_validation = 0.0 if validation is None or isinstance(validation, Split) else validation
        if cut_test != 0.0 or cut_validation != 0.0:
            return data.split(test=cut_test, validation=cut_validation, seed=seed, stratify=stratify)
        return data

    @staticmethod
    def from_torch(
        clients: Mapping[str, Any],
        *,
        test: Mapping[str, Any] | float | None = None,
        validation: Mapping[str, Any] | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        holdout: Any = None,
        name: str = "",
        features: Sequence[str] = (),
    ) -> "FederatedDataset":
        """Read torch map-style datasets once and pack what they yield.

        Args:
            clients: for each client a dataset with `__len__` and `__getitem__` yielding (x, y) or named values.
            test: the same for test examples, or the fraction to cut from each client.
            validation: the same for validation.
            seed: of the cut, where a fraction is given.
            stratify: whether the cut keeps each client's label shares.
            holdout: a torch dataset of examples that belong to no client.
            name: what the data are.
            features: names of the columns of "x".

        Returns:
            The dataset, clients in the order of the mapping.

        Raises:
            DataError: when a dataset is not map-style, is empty or yields items of different forms.
        """

        def read(sources: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
            return {client: stack_items(source, f"client {client!r}") for client, source in sources.items()}

        return FederatedDataset.from_arrays(
            read(clients),
            test=read(test) if isinstance(test, Mapping) else test,
            validation=read(validation) if isinstance(validation, Mapping) else validation,
            seed=seed,
            stratify=stratify,
            holdout=None if holdout is None else stack_items(holdout, "holdout"),
            name=name,
            features=features,
        )

    @staticmethod
    def from_frame(
        source: Frame | str | Path,
        *,
        client: str,
        target: str,
        features: Sequence[str] | None = None,
        test: float = 0.2,
        validation: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> "FederatedDataset":
        """Read a table whose rows say which client they belong to.

        Rows are cut into train, validation and test first; missing values, categories and scales are then settled
        by federated statistics over the training rows.

        Args:
            source: a pandas DataFrame or the path of a .csv, .csv.gz or .parquet file.
            client: the column that names the client.
            target: the column to predict.
            features: the columns to predict from; by default all others.
            test: fraction of each client's rows for test.
            validation: fraction of each client's rows for validation.
            seed: of the cut.
            options: further arguments of `atoll.table`.

        Returns:
            The dataset, with `features` and `preprocessing`.

        Raises:
            DataError: when a column is missing or the rows cannot be used.
        """
        from atoll.data.table import table

        recipe = table(
            client=client, target=target, features=features, test=test, validation=validation, seed=seed, **options
        )
        return recipe.bind(source)

    @staticmethod
    def from_source(
        clients: int | Sequence[str],
        load: Callable[[str], Any],
        *,
        sizes: Any = None,
        validation: Split | float | None = None,
        test: Split | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        holdout: Any = None,
        name: str = "",
        features: Sequence[str] = (),
        version: str = "",
    ) -> "LazyDataset":
        """A population whose examples are made when a cohort asks for them, and forgotten after its round.

        Args:
            clients: names, or how many clients "0" to "n-1" there are.
            load: called with a client's name; returns (x, y) or a mapping of named fields, each [n, ...], n >= 1, the
                same for the same client whenever it is called. The first client is loaded at once, to learn the form.
            sizes: int64 [clients], examples `load` returns for each client, where that is known; it is then checked.
            validation: a split of all clients, or the fraction to cut from each client.
            test: a split of all clients, or the fraction to cut from each client. The cut of a client depends on the
                seed and its name alone.
            seed: of the cut, where a fraction is given.
            stratify: whether the cut keeps each client's label shares.
            holdout: (x, y) or named fields that belong to no client.
            name: what the data are.
            features: names of the columns of "x".
            version: part of the fingerprint; change it when `load` begins to return other examples.

        Returns:
            The population; `draw(cohort)` gives a packed dataset.

        Raises:
            DataError: when what `load` returns for the first client cannot be used.
        """
        from atoll.data.lazy import LazyDataset, Loaded

        if isinstance(clients, bool) or (isinstance(clients, int) and clients < 1):
            raise invalid("clients", clients, "names, or a number of clients of at least 1")
        names = Numbered(clients) if isinstance(clients, int) else clients
        return LazyDataset(
            names,
            Loaded(names, load, version),
            sizes=sizes,
            validation=validation,
            test=test,
            seed=seed,
            stratify=stratify,
            holdout=None if holdout is None else fields_of(holdout, "holdout"),
            name=name,
            features=features,
        )

    @staticmethod
    def from_parquet(
        source: str | Path,
        *,
        client: str,
        target: str | None = None,
        features: Sequence[str] | None = None,
        fields: Mapping[str, str | Sequence[str]] | None = None,
        validation: Split | float | None = None,
        test: Split | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        holdout: Any = None,
        name: str = "",
    ) -> "LazyDataset":
        """A population whose examples stay in Parquet files; a cohort reads the row groups it needs.

        The column of clients is read once, to learn whose rows are where. Columns are taken as they are, without the
        encoding and scaling of `from_frame`: they must be numbers, or lists of numbers of one length. Clients stand in
        the order of their first row. Reading is fast where a client's rows are neighbours and row groups are small
        (some ten thousand rows); for many rounds over large row groups, `save` the population once and `open` it.

        Args:
            source: a .parquet file, or a directory of them, read in the order of their names.
            client: the column that names the client: text or whole numbers.
            target: the column that becomes "y".
            features: the columns that become "x", float32 [n, columns]; by default all others. One column of lists
                becomes [n, length].
            fields: instead of target and features, which column becomes which field: a name for [n] (or a column of
                lists, [n, length]), a list of names for [n, columns].
            validation: a split of all clients, or the fraction to cut from each client.
            test: a split of all clients, or the fraction to cut from each client.
            seed: of the cut, where a fraction is given.
            stratify: whether the cut keeps each client's label shares.
            holdout: (x, y) or named fields that belong to no client.
            name: what the data are.

        Returns:
            The population; `draw(cohort)` gives a packed dataset.

        Raises:
            DataError: when a file or a column is missing or cannot be used; the message names it and the remedy.
        """
        from atoll.data.lazy import LazyDataset
        from atoll.data.parquet import open_parquet

        found = open_parquet(source, client=client, target=target, features=features, fields=fields)
        return LazyDataset(
            found.clients,
            found,
            sizes=found.sizes,
            validation=validation,
            test=test,
            seed=seed,
            stratify=stratify,
            holdout=None if holdout is None else fields_of(holdout, "holdout"),
            name=name,
            features=found.features,
        )

    # --- on disk -----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the data to a directory from which `open` maps them.

        Args:
            directory: where; must not exist, or be empty. It appears when everything is written.

        Raises:
            InvalidArgument: when the directory holds something.
            DataError: when a dtype cannot be stored.
        """
        from atoll.data.storage import write

        splits = {label: split for label, split in self._splits().items() if split is not None}
        write(
            directory,
            self.clients,
            [splits],
            tuple(splits),
            holdout=self.holdout,
            name=self.name,
            features=self.features,
            preprocessing=self.preprocessing,
            fingerprint=self.fingerprint(),
        )

    @staticmethod
    def open(directory: str | Path) -> "FederatedDataset":
        """Map data that `save` wrote.

        Nothing but offsets is read: examples come from the disk when they are used, and can be more than fit into
        memory. The fingerprint is the one stored; `verify` compares it with the contents. What is written to the
        tensors stays in this process.

        Args:
            directory: where.

        Returns:
            The dataset.

        Raises:
            DataError: when the directory holds no dataset, or a damaged one; the message names the file.
        """
        from atoll.data.storage import read

        stored = read(directory)
        made = FederatedDataset.restored(stored)
        made._fingerprint = stored.fingerprint
        return made

    @staticmethod
    def restored(stored: "Stored") -> "FederatedDataset":
        """The dataset of a directory that was read, not knowing its fingerprint yet."""
        made = FederatedDataset.trusted(
            stored.clients,
            stored.splits["train"],
            validation=stored.splits.get("validation"),
            test=stored.splits.get("test"),
            holdout=stored.holdout,
            name=stored.name,
            features=stored.features,
            preprocessing=stored.preprocessing,
            files=stored.files,
        )
        made._damaged = stored.damaged
        return made

    @property
    def directory(self) -> Path | None:
        """Where these data were opened from, for another process to open them too; None for any others."""
        return None if self._damaged is None else self._files[0].path.parent

    def verify(self) -> None:
        """Read all the data and compare them with the fingerprint they were saved with.

        Data that were not opened from a directory have nothing to be compared with, and pass.

        Raises:
            DataError: naming the files that are damaged.
        """
        if self._damaged is None:
            return
        self.check_unchanged()
        if self._digest() == self._fingerprint:
            return
        folder, damaged = str(self._files[0].path.parent), self._damaged()
        if damaged:
            raise DataError(
                f"{', '.join(damaged)}: the contents are not those that were saved. Write the dataset again, or copy "
                "it again from where it is whole."
            )
        raise DataError(
            f"the data opened from {folder!r} are not those that were saved, although its files are: the header was "
            "changed, or this program wrote to the tensors. Open the directory again."
        )

    def check_unchanged(self) -> None:
        """Refuse to go on when a file these data are mapped from is not as it was; a few microseconds for each file.

        Data in memory never change behind a run's back: nothing is done.

        Raises:
            DataError: naming the file, what changed and the way out.
        """
        check_files(self._files)

    # --- looking up --------------------------------------------------------------------------------------------------

    def __getitem__(self, client: str) -> ClientData:
        place = self.index(client)
        return ClientData(
            client,
            self.train.client(place),
            None if self.validation is None else self.validation.client(place),
            None if self.test is None else self.test.client(place),
        )

    def __repr__(self) -> str:
        counts = f"train={len(self.train)}"
        for label, split in (("validation", self.validation), ("test", self.test)):
            if split is not None:
                counts += f", {label}={len(split)}"
        if self.holdout is not None:
            counts += f", holdout={len(next(iter(self.holdout.values())))}"
        title = f"{self.name!r}, " if self.name else ""
        return f"FederatedDataset({title}clients={len(self.clients)}, {counts})"

    # --- in a round --------------------------------------------------------------------------------------------------

    def draw(self, clients: Sequence[str]) -> "FederatedDataset":
        """Examples of a cohort: packed data are at hand already, so this is the dataset itself."""
        return self

    def sample(self) -> "FederatedDataset":
        """Examples to try a model on: packed data are at hand already, so this is the dataset itself."""
        return self

    def has(self, split: str) -> bool:
        """Whether there are examples for "train", "validation" or "test"."""
        part = self._splits()[split]
        return part is not None and len(part) > 0

    def chunks(self, split: str) -> Iterator[tuple[Sequence[str], Split]]:
        """All clients and their examples of a split, in the order of the clients: for packed data, in one piece.

        Args:
            split: "train", "validation" or "test", one the data have.
        """
        part = self._splits()[split]
        if part is None:
            raise invalid("split", split, "one the data have", f"Cut it with data.split({split}=0.2).")
        yield self.clients, part

    def _splits(self) -> dict[str, Split | None]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    # --- deriving ----------------------------------------------------------------------------------------------------

    def select(self, clients: Sequence[str]) -> "FederatedDataset":
        """The dataset of some clients, in the order given.

        Args:
            clients: names, at least one, all different.

        Returns:
            A dataset with its own packed tensors and the same holdout.

        Raises:
            InvalidArgument: when a name is unknown, repeated, or none is given.
        """
        if isinstance(clients, str) or len(clients) == 0:
            raise invalid("clients", clients, "a sequence of at least one client name", 'For example ["a", "b"].')
        rows = torch.from_numpy(self.places(clients))
        return self._derive(
            tuple(clients),
            self.train.take(rows),
            None if self.validation is None else self.validation.take(rows),
            None if self.test is None else self.test.take(rows),
            self.holdout,
        )

    def to(self, device: torch.device | str) -> "FederatedDataset":
        """The same dataset with its tensors on a device."""
        made = self._derive(
            self.clients,
            self.train.to(device),
            None if self.validation is None else self.validation.to(device),
            None if self.test is None else self.test.to(device),
            None if self.holdout is None else {name: tensor.to(device) for name, tensor in self.holdout.items()},
        )
        made._fingerprint = self._fingerprint
        return made

    def pooled(self) -> "FederatedDataset":
        """One client "pooled" that holds everybody's examples: the same tensors under new offsets."""

        def whole(split: Split | None) -> Split | None:
            return None if split is None else Split(split.fields, torch.tensor([0, len(split)]))

        return self._derive(
            ("pooled",),
            Split(self.train.fields, torch.tensor([0, len(self.train)])),
            whole(self.validation),
            whole(self.test),
            self.holdout,
        )

    def split(
        self, *, test: float = 0.2, validation: float = 0.0, seed: int = 0, stratify: bool = False
    ) -> "FederatedDataset":
        """Cut each client's training examples into training, validation and test.

        The cut of a client depends on the seed and its name alone. At least one example stays for training; a
        client too small for the fraction gives none. Where there is an integer field "cut_group" [N], examples of a
        client with the same number stay together (pictures of one track, windows of one recording): the fractions are
        then of its groups.

        Args:
            test: fraction of each client's examples, in [0, 1).
            validation: fraction of each client's examples, in [0, 1).
            seed: of the cut.
            stratify: whether to keep each client's label shares; "y" must be integer labels [N].

        Returns:
            The dataset with the new splits; a split that is not cut stays as it was.

        Raises:
            InvalidArgument: when a fraction is out of range or the split exists already.
        """
        check_fractions(test, validation)
        for argument, value, existing in (("test", test, self.test), ("validation", validation, self.validation)):
            if value > 0 and existing is not None:
                raise invalid(argument, value, f"0, as the data have {argument} examples already")
        labels: NDArray[np.int64] | None = None
        if stratify:
            labels = labels_of(self.train.fields, "stratify=True").cpu().numpy()
        codes = cut(
            self.clients, self.train.offsets.numpy(), test=test, validation=validation, seed=seed, labels=labels,
            groups=groups_of(self.train.fields),
        )  # fmt: skip
        parts = divide(self.train.fields, self.train.offsets, codes)
        return self._derive(
            self.clients,
            parts[TRAIN],
            parts[VALIDATION] if validation > 0 else self.validation,
            parts[TEST] if test > 0 else self.test,
            self.holdout,
        )

    # --- describing --------------------------------------------------------------------------------------------------

    def class_counts(self) -> tuple[list[str], NDArray[np.int64]] | None:
        """Training examples of each class at each client.

        Returns:
            The names of the classes and int64 [clients, classes]; None where "y" is not integer labels [N].
        """
        target = self.train.fields.get(TARGET)
        if target is None or target.ndim != 1 or target.is_floating_point() or target.is_complex():
            return None
        values, place = np.unique(target.cpu().numpy(), return_inverse=True)
        owner = np.repeat(np.arange(len(self)), self.train.sizes.numpy())
        counts = np.bincount(owner * len(values) + place.reshape(-1), minlength=len(self) * len(values))
        classes = tuple(getattr(self.preprocessing, "classes", ()))
        names = [str(classes[v]) if 0 <= v < len(classes) else str(v) for v in values.tolist()]
        return names, counts.reshape(len(self), len(values)).astype(np.int64)

    def describe(self) -> Frame:
        """Counts by client.

        Returns:
            A frame with one row per client: client, train, validation and test counts, then training examples per
            class (the number of distinct classes, above fifty), or the mean of a numeric target.
        """
        none = np.zeros(len(self), dtype=np.int64)
        columns: dict[str, Any] = {
            "client": list(self.clients),
            "train": self.train.sizes.numpy(),
            "validation": none if self.validation is None else self.validation.sizes.numpy(),
            "test": none if self.test is None else self.test.sizes.numpy(),
        }
        counted = self.class_counts()
        target = self.train.fields.get(TARGET)
        if counted is not None:
            names, counts = counted
            if len(names) <= _FEW_CLASSES:
                columns |= {f"class {name}": counts[:, place] for place, name in enumerate(names)}
            else:
                columns["classes"] = (counts > 0).sum(axis=1)
        elif target is not None and target.ndim == 1 and target.is_floating_point():
            owner = torch.arange(len(self)).repeat_interleave(self.train.sizes)
            sums = torch.zeros(len(self), dtype=torch.float64).index_add_(0, owner, target.cpu().double())
            columns["target mean"] = (sums / self.train.sizes).numpy()
        return pandas().DataFrame(columns)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw how labels and examples spread over clients.

        Args:
            path: where to save the picture (.png, .svg, .pdf), or None.

        Returns:
            The matplotlib figure: a bar of label counts per client, or a histogram of sizes above forty clients.
        """
        from atoll.data.plotting import distribution

        return distribution(self, path)

    def fingerprint(self) -> str:
        """The identity of the data: BLAKE2b over names, offsets and contents, as hex; kept after the first call."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=32)
        digest.update(f"{len(self.clients)};".encode())
        names = iter(self.clients)
        while part := "".join([f"{len(client)}:{client}" for client in islice(names, 1 << 16)]):
            digest.update(part.encode())
        for label, split in self._splits().items():
            if split is not None:
                digest.update(f"|{label}|".encode())
                digest.update(split.offsets.contiguous().numpy().data)
                digest_fields(digest, split.fields)
        if self.holdout is not None:
            digest.update(b"|holdout|")
            digest_fields(digest, self.holdout)
        return digest.hexdigest()

    # --- checking ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if len(self.clients) == 0:
            raise DataError("clients is empty: a federated dataset needs at least one client with one example.")
        if not isinstance(self.clients, Numbered):
            for client in self.clients:
                named(client)
            places = self._index()
            if len(places) < len(self.clients):
                twice = next(name for place, name in enumerate(self.clients) if places[name] != place)
                raise DataError(
                    f"client {twice!r} appears more than once. Give every client a name of its own, or join its "
                    "examples."
                )
        for label, split in self._splits().items():
            if split is None:
                continue
            if len(split.offsets) - 1 != len(self.clients):
                raise DataError(
                    f"{label} has {len(split.offsets) - 1} clients, clients has {len(self.clients)} names. "
                    "Give one name and one pair of offsets per client; equal offsets mean no examples."
                )
            same_fields(self.train.fields, split.fields, label)
            check_finite(label, split.fields, split.offsets, self.clients, self.features)
        empty = torch.nonzero(self.train.sizes == 0).reshape(-1)
        if len(empty):
            raise DataError(
                f"{some([self.clients[int(i)] for i in empty[:3]], len(empty))} no training examples. "
                "One is enough; leave clients without any out."
            )
        if self.holdout is not None:
            lengths = {len(tensor) for tensor in self.holdout.values()}
            if len(lengths) != 1 or 0 in lengths:
                raise DataError("holdout: fields must have one length, at least 1. Pass holdout=None for none.")
            same_fields(self.train.fields, self.holdout, "holdout")
            check_finite("holdout", self.holdout, None, self.clients, self.features)


def _packed(names: Sequence[str], owned: Sequence[Mapping[str, Tensor]], label: str) -> Split:
    first = owned[0]
    for name, fields in zip(names, owned, strict=True):
        same_fields(first, fields, f"client {name!r}", f"client {names[0]!r}")
    sizes = torch.tensor([len(next(iter(fields.values()))) for fields in owned], dtype=torch.int64)
    if label == "train" and int(sizes.min()) == 0:
        without = [name for name, size in zip(names, sizes, strict=True) if int(size) == 0]
        raise DataError(
            f"{some(without[:3], len(without))} no training examples. One is enough; leave clients without any out."
        )
    return Split({field: torch.cat([fields[field] for fields in owned]) for field in first}, offsets_of(sizes))


def _aligned(
    names: Sequence[str], given: Mapping[str, Any], like: Mapping[str, Tensor], label: str
) -> list[dict[str, Tensor]]:
    strangers = [client for client in given if client not in set(names)]
    if strangers:
        close = difflib.get_close_matches(str(strangers[0]), list(names)[:1000], n=1)
        raise invalid(
            label,
            strangers[0],
            f"a mapping whose names are clients ({len(names)} of them)",
            f"Did you mean {close[0]!r}?" if close else "Examples of nobody go to holdout=.",
        )
    nothing = {field: tensor[:0] for field, tensor in like.items()}
    return [
        fields_of(given[client], f"client {client!r} ({label})") if client in given else nothing for client in names
    ]
