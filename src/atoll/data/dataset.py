"""Clients and their examples, stored packed: one tensor per field with all clients one after the other.

A client is a pair of offsets. Ten thousand clients are ten thousand and one integers, not ten thousand objects, and
a tile of clients is a slice or a gather of one tensor.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.arrays import TARGET, fields_of, stack_items
from atoll.data.cutting import TEST, TRAIN, VALIDATION, check_fractions, cut
from atoll.data.frames import Frame, pandas
from atoll.errors import DataError, invalid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW_CLASSES = 50


class Numbered(Sequence[str]):
    """The names "0" to "n-1" of clients that have none of their own, made when asked for."""

    __slots__ = ("_count",)

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(str(i) for i in range(self._count)[index])
        return str(range(self._count)[index])

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self._count))

    def __contains__(self, value: object) -> bool:
        return self.find(value) is not None

    def find(self, value: object) -> int | None:
        """The place of a name, or None."""
        if isinstance(value, str) and value.isascii() and value.isdigit() and (value == "0" or value[0] != "0"):
            place = int(value)
            return place if place < self._count else None
        return None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Numbered):
            return self._count == other._count
        if isinstance(other, (tuple, list)):
            named = cast(Sequence[object], other)
            return len(named) == self._count and all(a == b for a, b in zip(self, named, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(("Numbered", self._count))

    def __repr__(self) -> str:
        return f"Numbered({self._count})"


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The examples of all clients for one purpose, packed.

    Attributes:
        fields: one tensor [N, ...] per field, all clients one after the other.
        offsets: int64 [clients + 1] on the CPU; client i holds the rows from offsets[i] to offsets[i + 1].
    """

    fields: Mapping[str, Tensor]
    offsets: Tensor

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

    @property
    def sizes(self) -> Tensor:
        """Examples of each client: int64 [clients]."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def client(self, index: int) -> dict[str, Tensor]:
        """The examples of the client at a place in [0, clients), as views."""
        if not 0 <= index < len(self.offsets) - 1:
            raise invalid("index", index, f"in [0, {len(self.offsets) - 1})")
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return {name: tensor[start:stop] for name, tensor in self.fields.items()}

    def to(self, device: torch.device | str) -> "Split":
        """The same split with its fields on a device; the offsets stay on the CPU."""
        return Split({name: tensor.to(device) for name, tensor in self.fields.items()}, self.offsets)

    def take(self, clients: Tensor) -> "Split":
        """The split of some clients, in the order given: int64 [k] places, gathered into new tensors."""
        sizes = self.sizes[clients]
        offsets = _offsets(sizes)
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(sizes)
        rows = self.offsets[:-1][clients].repeat_interleave(sizes) + within
        return Split(gather(self.fields, rows), offsets)


@dataclass(frozen=True, slots=True, eq=False)
class ClientData:
    """One client's examples, as views of the packed tensors; a split the dataset lacks is None."""

    name: str
    train: dict[str, Tensor]
    validation: dict[str, Tensor] | None
    test: dict[str, Tensor] | None


class FederatedDataset:
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
        "_fingerprint",
        "_places",
        "clients",
        "features",
        "holdout",
        "name",
        "preprocessing",
        "test",
        "train",
        "validation",
    )

    clients: Sequence[str]
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
            clients if isinstance(clients, Numbered) else tuple(clients),
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
        self._places: dict[str, int] | None = None
        self._fingerprint: str | None = None

    def _derive(
        self,
        clients: Sequence[str],
        train: Split,
        validation: Split | None,
        test: Split | None,
        holdout: Mapping[str, Tensor] | None,
    ) -> "FederatedDataset":
        """A dataset made of parts already checked."""
        made = object.__new__(FederatedDataset)
        made._set(clients, train, validation, test, holdout, self.name, self.features, self.preprocessing)
        return made

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
        names = tuple(_named(client) for client in clients)
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

    # --- looking up --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.clients)

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __contains__(self, client: object) -> bool:
        return self._find(client) is not None

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

    def _find(self, client: object) -> int | None:
        if isinstance(self.clients, Numbered):
            return self.clients.find(client)
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self.clients)}
        return self._places.get(client) if isinstance(client, str) else None

    def index(self, client: str) -> int:
        """The place of a client in [0, clients).

        Raises:
            InvalidArgument: when there is no such client.
        """
        place = self._find(client)
        if place is None:
            shown = ", ".join(repr(name) for name in self.clients[:5]) + (", ..." if len(self) > 5 else "")
            close = difflib.get_close_matches(str(client), self.clients, n=1) if len(self) <= 10_000 else []
            hint = f"Did you mean {close[0]!r}?" if close else ""
            raise invalid("client", client, f"one of the {len(self)} clients ({shown})", hint)
        return place

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
        places = [self.index(client) for client in clients]
        if len(set(places)) < len(places):
            raise invalid("clients", clients, "names that are all different")
        rows = torch.tensor(places, dtype=torch.int64)
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
        client too small for the fraction gives none.

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
            self.clients, self.train.offsets.numpy(), test=test, validation=validation, seed=seed, labels=labels
        )
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
            digest = hashlib.blake2b(digest_size=32)
            digest.update(f"{len(self.clients)};".encode())
            for client in self.clients:
                digest.update(f"{len(client)}:{client}".encode())
            for label, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
                if split is not None:
                    digest.update(f"|{label}|".encode())
                    digest.update(split.offsets.contiguous().numpy().tobytes())
                    _digest_fields(digest, split.fields)
            if self.holdout is not None:
                digest.update(b"|holdout|")
                _digest_fields(digest, self.holdout)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    # --- checking ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if len(self.clients) == 0:
            raise DataError("clients is empty: a federated dataset needs at least one client with one example.")
        if not isinstance(self.clients, Numbered):
            for client in self.clients:
                _named(client)
            self._places = {name: place for place, name in enumerate(self.clients)}
            if len(self._places) < len(self.clients):
                twice = next(name for place, name in enumerate(self.clients) if self._places[name] != place)
                raise DataError(
                    f"client {twice!r} appears more than once. Give every client a name of its own, or join its "
                    "examples."
                )
        for label, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if split is None:
                continue
            if len(split.offsets) - 1 != len(self.clients):
                raise DataError(
                    f"{label} has {len(split.offsets) - 1} clients, clients has {len(self.clients)} names. "
                    "Give one name and one pair of offsets per client; equal offsets mean no examples."
                )
            _same_fields(self.train.fields, split.fields, label)
            self._check_finite(label, split.fields, split.offsets)
        empty = torch.nonzero(self.train.sizes == 0).reshape(-1)
        if len(empty):
            raise DataError(
                f"{_listed([self.clients[int(i)] for i in empty[:3]], len(empty))} no training examples. "
                "One is enough; leave clients without any out."
            )
        if self.holdout is not None:
            lengths = {len(tensor) for tensor in self.holdout.values()}
            if len(lengths) != 1 or 0 in lengths:
                raise DataError("holdout: fields must have one length, at least 1. Pass holdout=None for none.")
            _same_fields(self.train.fields, self.holdout, "holdout")
            self._check_finite("holdout", self.holdout, None)

    def _check_finite(self, label: str, fields: Mapping[str, Tensor], offsets: Tensor | None) -> None:
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
                where = _listed([self.clients[int(i)] for i in owners[:3]], len(owners), verb=False)
            column = ""
            if tensor.ndim == 2:
                columns = [int(c) for c in torch.nonzero(bad.any(dim=0)).reshape(-1)]
                shown = [f"{c} ({self.features[c]!r})" if c < len(self.features) else str(c) for c in columns]
                column = f", feature column {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}"
            raise DataError(
                f"{where}, {label} field {name!r}{column}: {int(bad.sum())} NaN or infinite values in {len(rows)} "
                "examples. Remove or impute them; FederatedDataset.from_frame imputes missing values by federated "
                "statistics."
            )


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
        out[code] = Split(gather(fields, packed if order is None else order[packed]), _offsets(sizes))
    return out


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def _named(client: object) -> str:
    if not isinstance(client, str) or not client:
        raise invalid("client", client, "a name: a string that is not empty", "Pass str(name).")
    return client


def _listed(names: Sequence[str], count: int, *, verb: bool = True) -> str:
    shown = ", ".join(repr(name) for name in names)
    more = f" and {count - len(names)} more" if count > len(names) else ""
    has = (" has" if count == 1 else " have") if verb else ""
    return f"client{'' if count == 1 else 's'} {shown}{more}{has}"


def _packed(names: Sequence[str], owned: Sequence[Mapping[str, Tensor]], label: str) -> Split:
    first = owned[0]
    for name, fields in zip(names, owned, strict=True):
        _same_fields(first, fields, f"client {name!r}", f"client {names[0]!r}")
    sizes = torch.tensor([len(next(iter(fields.values()))) for fields in owned], dtype=torch.int64)
    if label == "train" and int(sizes.min()) == 0:
        without = [name for name, size in zip(names, sizes, strict=True) if int(size) == 0]
        raise DataError(
            f"{_listed(without[:3], len(without))} no training examples. One is enough; leave clients without any out."
        )
    return Split({field: torch.cat([fields[field] for fields in owned]) for field in first}, _offsets(sizes))


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


def _same_fields(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], label: str, reference: str = "train"
) -> None:
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


def _digest_fields(digest: Any, fields: Mapping[str, Tensor]) -> None:
    for name, tensor in fields.items():
        digest.update(f"{len(name)}:{name};{tensor.dtype};{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
